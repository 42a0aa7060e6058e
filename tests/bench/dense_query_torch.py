"""Training steps of DINO and Mask2Former in PyTorch, of Transformers' modules, a peer of
tests.bench.dense_peer; encoder and its maps are those of tests.bench.dense_step_torch.

Mask2Former is `Mask2FormerForUniversalSegmentation` with that encoder in the place of its own.
Transformers has no DINO. Here, its layers of Deformable DETR (encoder and decoder), its matcher and
its losses make one: choice of queries, denoising, refinement of the boxes and positions are
written around them. Matching is scipy's, image by image.
"""

import types
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import DeformableDetrConfig, Mask2FormerConfig, SwinConfig
from transformers.loss import loss_deformable_detr
from transformers.models.deformable_detr import modeling_deformable_detr as detr
from transformers.models.mask2former import modeling_mask2former as mask2former

from tests.bench.dense_step_torch import Arrays, Peer, to_torch

DEFORMABLE = {
    "sampling_offsets": "offsets",
    "attention_weights": "weights",
    "value_proj": "value",
    "output_proj": "output",
}
ENCODER_LAYER = {
    **{f"self_attn.{theirs}": f"attention/{ours}" for theirs, ours in DEFORMABLE.items()},
    "self_attn_layer_norm": "norm1",
    "mlp.fc1": "fc1",
    "mlp.fc2": "fc2",
    "final_layer_norm": "norm2",
}
DECODER_LAYER = {
    "self_attn.q_proj": "attention/query",
    "self_attn.k_proj": "attention/key",
    "self_attn.v_proj": "attention/value",
    "self_attn.o_proj": "attention/out",
    "self_attn_layer_norm": "norm1",
    **{f"encoder_attn.{theirs}": f"reading/{ours}" for theirs, ours in DEFORMABLE.items()},
    "encoder_attn_layer_norm": "norm2",
    "mlp.fc1": "fc1",
    "mlp.fc2": "fc2",
    "final_layer_norm": "norm3",
}
EDGE = 1e-3  # nearest to 0 and 1 that a share is taken to have a logit


class QueryPeer(Peer):
    """Parameters and the step of a run with a head of queries; see `Peer`.

    Args:
      shape: what `Peer` needs, and `dense_queries.numbers`.
      arrays: as of `Peer`.
    """

    def __init__(self, shape: dict[str, Any], arrays: Arrays) -> None:
        super().__init__(
            shape, {k: v for k, v in arrays.items() if not k.startswith("params/head/")}
        )
        is_dino = shape["task"] == "dino"
        self.head = Dino(shape) if is_dino else Mask2Former(shape, self.batch)
        values = self.named(arrays, "params/")
        with torch.no_grad():
            for name, parameter in self.head.named_parameters():
                parameter.copy_(torch.from_numpy(values[name]))
                self.params[name] = parameter
        self.optimize()

    def named(self, arrays: Arrays, prefix: str) -> Arrays:
        """Encoder and pyramid as in `load`, and the head under the names of its modules."""
        of_head = f"{prefix}head/"
        head = {k.removeprefix(of_head): v for k, v in arrays.items() if k.startswith(of_head)}
        rest = {k: v for k, v in arrays.items() if not k.startswith(of_head)}
        return super().named(rest, prefix) | self.head.arrays(head)

    def decays(self, name: str) -> bool:
        head = getattr(self, "head", None)
        return super().decays(name) or (head is not None and head.decays(name))

    def loss(self) -> torch.Tensor:
        maps = self.maps()
        return self.head(list(maps.values()), self.batch)


class GivenMaps(nn.Module):
    """In the place of Transformers' own encoder: hands on `maps`, whatever the images."""

    maps: Any = None

    def forward(self, images: torch.Tensor) -> Any:
        return types.SimpleNamespace(feature_maps=self.maps)


class Mask2Former(nn.Module):
    """Transformers' model on given maps. True masks are made once, as by its image processor."""

    def __init__(self, shape: dict[str, Any], batch: Any) -> None:
        super().__init__()
        width, strides = shape["width"], shape["strides"]
        category, mask, dice = shape["weights"]
        config = Mask2FormerConfig(
            backbone_config=SwinConfig(
                embed_dim=8, depths=[1] * 4, num_heads=[1] * 4, window_size=2,
                out_features=[f"stage{i}" for i in range(1, 5)],
            ),
            feature_size=width, mask_feature_size=width, hidden_dim=width,
            num_attention_heads=shape["attention_heads"], encoder_layers=shape["encoder_depth"],
            encoder_feedforward_dim=shape["encoder_hidden"], decoder_layers=shape["depth"] + 1,
            dim_feedforward=shape["hidden"], num_queries=shape["queries"],
            num_labels=shape["classes"], train_num_points=shape["points"],
            oversample_ratio=shape["oversample"], importance_sample_ratio=shape["uncertain"],
            no_object_weight=shape["none_weight"], class_weight=category, mask_weight=mask,
            dice_weight=dice, dropout=0.0, use_auxiliary_loss=True,
        )  # fmt: skip
        self.model = mask2former.Mask2FormerForUniversalSegmentation(config)
        pixels = self.model.model.pixel_level_module
        pixels.encoder = GivenMaps()
        pixels.decoder = mask2former.Mask2FormerPixelDecoder(config, shape["channels"])
        self.strides = strides
        self.paths = self._paths()
        self.masks, self.classes = [], []
        for labels in batch["map"]:
            counts = torch.bincount(labels.flatten().long(), minlength=256)[: shape["classes"]]
            found = [k for k in counts.argsort(descending=True, stable=True) if counts[k]]
            self.masks.append(torch.stack([(labels == k).float() for k in found]))
            self.classes.append(torch.stack(found))

    def _paths(self) -> dict[str, np.ndarray]:
        """Paths of the JAX tree, with the place of every number among ours."""
        from m3i_jax.interop.mask2former_weights import load_mask2former

        numbered, start = {}, 0
        for name, parameter in self.model.named_parameters():
            size = parameter.numel()
            place = np.arange(start, start + size, dtype=np.float64)
            numbered[name], start = place.reshape(parameter.shape), start + size
        out: dict[str, np.ndarray] = {}

        def walk(node: Any, path: str) -> None:
            if isinstance(node, dict):
                for key, part in node.items():
                    walk(part, f"{path}/{key}" if path else key)
            else:
                out[path] = np.asarray(node, np.int64)

        walk(load_mask2former(numbered, self.strides), "")
        return out

    def arrays(self, tree: Arrays) -> Arrays:
        flat = np.empty(sum(p.numel() for p in self.model.parameters()), np.float32)
        for path, place in self.paths.items():
            flat[place] = tree[path]
        out, start = {}, 0
        for name, parameter in self.model.named_parameters():
            part = flat[start : start + parameter.numel()]
            out[f"model.{name}"] = part.reshape(parameter.shape)
            start += parameter.numel()
        return out

    def decays(self, name: str) -> bool:
        """Matrices of layers, but not the tables of queries, positions and levels."""
        tables = ("level_embed", "queries_embedder", "queries_features")
        parameter = dict(self.named_parameters()).get(name)
        return (
            parameter is not None
            and parameter.ndim > 1
            and not any(table in name for table in tables)
        )

    def forward(self, maps: list[torch.Tensor], batch: Any) -> torch.Tensor:
        queue = self._points(batch)
        rand, torch.rand = torch.rand, lambda *_, **__: next(queue)
        try:
            self.model.model.pixel_level_module.encoder.maps = maps
            images = batch["image"].permute(0, 3, 1, 2)  # whose shape is read
            made = self.model(images, self.masks, self.classes)
        finally:
            torch.rand = rand
        return made.loss

    def _points(self, batch: Any) -> Any:
        """Given points in the order in which Transformers draws: the last set, then the others.
        Masks of an image share their points."""
        match, candidates, fresh = (
            batch[f"points_{name}"] for name in ("match", "candidates", "fresh")
        )
        counts = [len(masks) for masks in self.masks]
        for s in (len(match) - 1, *range(len(match) - 1)):
            yield from (points[None] for points in match[s])
            for points in (candidates, fresh):
                parts = zip(points[s], counts, strict=True)
                yield torch.cat([part[:count] for part, count in parts])


def query_heads(width: int, classes: int) -> nn.ModuleDict:
    boxes = {f"fc{i}": nn.Linear(width, 4 if i == 3 else width) for i in (1, 2, 3)}
    return nn.ModuleDict({"classes": nn.Linear(width, classes), "boxes": nn.ModuleDict(boxes)})


def box_delta(heads: Any, x: torch.Tensor) -> torch.Tensor:
    boxes = heads["boxes"]
    return boxes["fc3"](F.relu(boxes["fc2"](F.relu(boxes["fc1"](x)))))


def logit(share: torch.Tensor) -> torch.Tensor:
    return detr.inverse_sigmoid(share, EDGE)


def sines(u: torch.Tensor, features: int, temperature: float) -> torch.Tensor:
    rate = temperature ** (2 * (torch.arange(features) // 2) / features)
    angle = u[..., None] * 2 * torch.pi / rate
    return torch.stack([angle[..., 0::2].sin(), angle[..., 1::2].cos()], -1).flatten(-2)


class Dino(nn.Module):
    """DINO on given maps, of Transformers' layers. Modules have the names of the JAX tree."""

    def __init__(self, shape: dict[str, Any]) -> None:
        super().__init__()
        self.shape, width = shape, shape["width"]
        channels, last = shape["channels"], shape["strides"][-1]
        config = DeformableDetrConfig(
            d_model=width, encoder_layers=shape["encoder_depth"], decoder_layers=shape["depth"],
            encoder_ffn_dim=shape["hidden"], decoder_ffn_dim=shape["hidden"],
            encoder_attention_heads=shape["attention_heads"],
            decoder_attention_heads=shape["attention_heads"],
            encoder_n_points=shape["sampled"], decoder_n_points=shape["sampled"],
            num_feature_levels=shape["levels"], dropout=0.0, disable_custom_kernels=True,
            attn_implementation="sdpa",
        )  # fmt: skip
        convs = [nn.Conv2d(c, width, 1) for c in channels]
        convs.append(nn.Conv2d(channels[-1], width, 3, stride=2, padding=1))
        self.projections = nn.ModuleDict(
            {
                f"stride_{stride}": nn.ModuleDict({"conv": conv, "norm": nn.GroupNorm(32, width)})
                for stride, conv in zip((*shape["strides"], 2 * last), convs, strict=True)
            }
        )
        self.level_embedding = nn.Parameter(torch.empty(shape["levels"], width))
        self.dense, self.dense_norm = nn.Linear(width, width), nn.LayerNorm(width)
        self.proposal_heads = query_heads(width, shape["classes"])
        self.encoder = detr.DeformableDetrEncoder(config)
        layers = [detr.DeformableDetrDecoderLayer(config) for _ in range(shape["depth"])]
        self.layers = nn.ModuleList(layers)
        self.position = nn.ModuleDict(
            {"fc1": nn.Linear(2 * width, width), "fc2": nn.Linear(width, width)}
        )
        self.norm, self.heads = nn.LayerNorm(width), query_heads(width, shape["classes"])
        self.content = nn.Parameter(torch.empty(shape["queries"], width))
        self.labels = nn.Parameter(torch.empty(shape["classes"], width))
        matcher = loss_deformable_detr.DeformableDetrHungarianMatcher(2.0, 5.0, 2.0)
        self.criterion = loss_deformable_detr.DeformableDetrImageLoss(
            matcher, shape["classes"], 0.25, ["labels", "boxes"]
        )

    def _place(self, name: str) -> tuple[str, int | None]:
        """Path of the JAX tree of a parameter, and its number in a stack."""
        first, _, rest = name.partition(".")
        if first in ("encoder", "layers"):
            number, _, layer = rest.removeprefix("layers.").partition(".")
            layer, _, leaf = layer.rpartition(".")
            table = ENCODER_LAYER if first == "encoder" else DECODER_LAYER
            path = f"{'encoder' if first == 'encoder' else 'decoder'}/layers/{table[layer]}"
            return f"{path}/{_leaf(path, leaf)}", int(number)
        outer = {
            "projections": "encoder/projections",
            "level_embedding": "encoder/level_embedding",
            "dense": "encoder/proposals/dense",
            "dense_norm": "encoder/proposals/norm",
            "proposal_heads": "encoder/proposals/heads",
            "position": "decoder/position",
            "norm": "decoder/norm",
            "heads": "decoder/heads",
            "content": "content",
            "labels": "labels",
        }[first]
        if not rest:
            return outer, None
        *middle, leaf = rest.split(".")
        path = "/".join([outer, *middle])
        return f"{path}/{_leaf(path, leaf)}", None

    def arrays(self, tree: Arrays) -> Arrays:
        out = {}
        for name, parameter in self.named_parameters():
            path, number = self._place(name)
            array = tree[path] if number is None else tree[path][number]
            out[name] = np.ascontiguousarray(
                to_torch(f"head/{path}", array).reshape(parameter.shape)
            )
        return out

    def decays(self, name: str) -> bool:
        return name in dict(self.named_parameters()) and self._place(name)[0].endswith("kernel")

    def forward(self, maps: list[torch.Tensor], batch: Any) -> torch.Tensor:
        s, size = self.shape, batch["size"]
        read = [*maps, maps[-1]]
        levels = [
            part["norm"](part["conv"](x))
            for part, x in zip(self.projections.values(), read, strict=True)
        ]
        sizes = [(x.shape[2], x.shape[3]) for x in levels]
        image = torch.tensor([side * s["strides"][0] for side in sizes[0]])
        inside, ratios, positions = [], [], []
        for (height, width), level in zip(sizes, self.level_embedding, strict=True):
            rows, columns = (-(-size * torch.tensor([height, width]) // image)).unbind(1)
            shown = (torch.arange(height) < rows[:, None])[:, :, None]
            shown = shown & (torch.arange(width) < columns[:, None])[:, None]
            y, x = shown.float().cumsum(1), shown.float().cumsum(2)
            y, x = y / (y[:, -1:] + 1e-6), x / (x[:, :, -1:] + 1e-6)
            both = [sines(u, s["width"] // 2, 20.0) for u in (y, x)]
            positions.append(torch.cat(both, -1).flatten(1, 2) + level)
            inside.append(shown.flatten(1))
            ratios.append(torch.stack([columns / width, rows / height], -1))
        inside_BxN, ratio_BxLx2 = torch.cat(inside, 1), torch.stack(ratios, 1)
        given = {
            "spatial_shapes": torch.tensor(sizes),
            "spatial_shapes_list": sizes,
            "level_start_index": None,
        }
        memory = self.encoder(
            inputs_embeds=torch.cat([x.flatten(2).transpose(1, 2) for x in levels], 1),
            attention_mask=inside_BxN,
            spatial_position_embeddings=torch.cat(positions, 1),
            valid_ratios=ratio_BxLx2,
            **given,
        ).last_hidden_state
        targets = self._targets(batch)
        chosen = self._select(memory, inside_BxN, ratio_BxLx2, sizes)
        x, start, mask, noised = self._queries(chosen["pred_boxes"].detach(), batch)
        sets = []
        for layer in self.layers:
            detached = start.detach()
            reference = detached[:, :, None] * ratio_BxLx2.repeat(1, 1, 2)[:, None]
            order = (1, 0, 2, 3)
            first = [sines(reference[:, :, 0, i], s["width"] // 2, 10_000.0) for i in order]
            hidden = F.relu(self.position["fc1"](torch.cat(first, -1)))
            x = layer(
                x,
                object_queries_position_embeddings=self.position["fc2"](hidden),
                reference_points=reference,
                encoder_hidden_states=memory,
                encoder_attention_mask=inside_BxN,
                attention_mask=mask,
                **given,
            )
            y = self.norm(x)
            boxes = (box_delta(self.heads, y) + logit(start)).sigmoid()
            sets.append({"logits": self.heads["classes"](y), "pred_boxes": boxes})
            start = (box_delta(self.heads, x) + logit(detached)).sigmoid()
        return self._loss(sets, chosen, targets, noised)

    def _targets(self, batch: Any) -> list[dict[str, torch.Tensor]]:
        out = []
        for boxes, classes, size in zip(
            batch["boxes"], batch["classes"], batch["size"], strict=True
        ):
            shares = boxes[classes >= 0] / size.flip(0).repeat(2)
            low, high = shares[:, :2], shares[:, 2:]
            centred = torch.cat([(low + high) / 2, high - low], 1)
            out.append({"boxes": centred, "class_labels": classes[classes >= 0].long()})
        return out

    def _select(
        self, memory: torch.Tensor, inside: torch.Tensor, ratio: torch.Tensor, sizes: Any
    ) -> dict[str, torch.Tensor]:
        """The tokens that queries start from, by the heads of the encoder."""
        parts = []
        for level, (height, width) in enumerate(sizes):
            y = (torch.arange(height) + 0.5) / (ratio[:, level, 1, None] * height)
            x = (torch.arange(width) + 0.5) / (ratio[:, level, 0, None] * width)
            side = torch.full((len(y), height, width), 0.05 * 2**level)
            grid = [x[:, None].expand(-1, height, -1), y[:, :, None].expand(-1, -1, width)]
            parts.append(torch.stack([*grid, side, side], -1).flatten(1, 2))
        places = torch.cat(parts, 1)
        usable = ((places > 0.01) & (places < 0.99)).all(-1) & inside
        y = self.dense_norm(self.dense(memory.masked_fill(~usable[..., None], 0.0)))
        logits = self.proposal_heads["classes"](y)
        index = logits.detach().max(-1).values.topk(self.shape["queries"], 1).indices[..., None]
        pick = lambda a: a.gather(1, index.expand(-1, -1, a.shape[-1]))
        start = torch.log(places / (1 - places)).masked_fill(~usable[..., None], 1e4)
        boxes = (box_delta(self.proposal_heads, pick(y)) + pick(start)).sigmoid()
        return {"logits": pick(logits), "pred_boxes": boxes}

    def _queries(self, start: torch.Tensor, batch: Any) -> tuple[Any, ...]:
        """Contents, boxes and attention mask of noised objects and queries; and of each image the
        objects and kinds of its noised ones."""
        s, b = self.shape, len(start)
        slots = batch["draw_relabel"].shape[1]
        content = self.content.expand(b, -1, -1)
        classes = torch.zeros(b, slots, dtype=torch.long)
        boxes = torch.full((b, slots, 4), 0.5)
        group = torch.full((b, slots + s["queries"]), -1)
        noised = []
        for i, target in enumerate(self._targets(batch)):
            count = len(target["boxes"])
            groups = max(s["denoising"] // count, 1)
            used = 2 * groups * count
            owner = torch.arange(count).repeat(2 * groups)
            positive = torch.arange(used) % (2 * count) < count
            draw = {
                name: batch[f"draw_{name}"][i, :used]
                for name in ("relabel", "category", "sign", "move")
            }
            other = (draw["category"] * s["classes"]).long()
            kept = target["class_labels"][owner]
            classes[i, :used] = torch.where(draw["relabel"] < s["label_noise"], other, kept)
            at = target["boxes"][owner]
            half = at[:, 2:].repeat(1, 2) / 2
            corners = torch.cat([at[:, :2] - half[:, :2], at[:, :2] + half[:, :2]], 1)
            share = draw["move"] + (~positive).float()[:, None]
            sign = torch.where(draw["sign"] < 0.5, -1.0, 1.0)
            corners = (corners + sign * share * half * s["box_noise"]).clamp(0, 1)
            low, high = corners[:, :2], corners[:, 2:]
            boxes[i, :used] = torch.cat([(low + high) / 2, high - low], 1)
            group[i, :used] = torch.arange(used) // (2 * count)
            noised.append((used, groups, owner, positive))
        matched = torch.arange(group.shape[1]) >= slots
        seen = ((group[:, :, None] == group[:, None]) & (group >= 0)[:, None]) | matched
        return (
            torch.cat([self.labels[classes], content], 1),
            torch.cat([logit(boxes).sigmoid(), start], 1),
            seen[:, None],
            noised,
        )

    def _loss(self, sets: Any, chosen: Any, targets: Any, noised: Any) -> torch.Tensor:
        count, queries = float(sum(len(t["boxes"]) for t in targets)), self.shape["queries"]
        total = torch.zeros(())
        matched = [{k: v[:, -queries:] for k, v in made.items()} for made in sets]
        for made in (*matched, chosen):
            pairs = self.criterion.matcher(made, targets)
            total = total + self._sum(made, targets, pairs, count)
        for made in sets:
            for i, (used, groups, owner, positive) in enumerate(noised):
                own = {k: v[i : i + 1, :used] for k, v in made.items()}
                pairs = [(positive.nonzero()[:, 0], owner[positive])]
                part = self._sum(own, targets[i : i + 1], pairs, count)
                total = total + part / groups
        return total

    def _sum(self, made: Any, targets: Any, pairs: Any, count: float) -> torch.Tensor:
        category = self.criterion.loss_labels(made, targets, pairs, count)["loss_ce"]
        boxes = self.criterion.loss_boxes(made, targets, pairs, count)
        return category + 5 * boxes["loss_bbox"] + 2 * boxes["loss_giou"]


def _leaf(path: str, leaf: str) -> str:
    if leaf == "bias":
        return "bias"
    last = path.rpartition("/")[2]
    return "scale" if last.startswith("norm") else "kernel"
