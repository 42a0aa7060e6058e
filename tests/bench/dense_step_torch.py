"""Training steps of Mask R-CNN (as in ViTDet) and UperNet on a plain ViT in PyTorch, the peer of
tests.bench.dense_peer. It does not use JAX: parameters, batch and random numbers are numpy arrays
under the paths of the JAX parameter tree.

It is what a practitioner would write: torchvision's RoIAlign and NMS, fused attention and AdamW,
maps in channels-last memory, dynamic numbers of proposals and objects.
"""

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torchvision.ops import batched_nms, box_iou, clip_boxes_to_image, roi_align

Arrays = dict[str, np.ndarray]
Tensors = dict[str, torch.Tensor]
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LIMIT = math.log(1000 / 16)  # of a change of size


def to_torch(path: str, array: np.ndarray) -> np.ndarray:
    """An array of the JAX tree in PyTorch's layout."""
    layer = path.split("/")[-2]
    if not path.endswith("kernel"):
        return array
    if array.ndim == 4:
        return array.transpose(3, 2, 0, 1)
    if layer.startswith("deconv"):  # columns are (row, column, channel)
        return array.reshape(len(array), 2, 2, -1).transpose(0, 3, 1, 2)
    if layer == "hidden":  # rows are (7, 7, channel), the maps here (channel, 7, 7)
        return array.reshape(7, 7, -1, array.shape[1]).transpose(3, 2, 0, 1).reshape(
            array.shape[1], -1
        )  # fmt: skip
    return array.T


def load(arrays: Arrays, prefix: str) -> Arrays:
    """{path: array in PyTorch's layout} of the tree below a prefix; a stack of blocks becomes an
    array a block."""
    out: Arrays = {}
    for name, array in arrays.items():
        if not name.startswith(prefix):
            continue
        path = name.removeprefix(prefix)
        if path.startswith("encoder/blocks/"):
            rest = path.removeprefix("encoder/blocks/")
            out |= {
                f"encoder/block{i}/{rest}": to_torch(path, part) for i, part in enumerate(array)
            }
        else:
            out[path] = to_torch(path, array)
    return {path: np.ascontiguousarray(array) for path, array in out.items()}


class Peer:
    """Parameters and the step of a run.

    Args:
      shape: task ("detect" or "segment"), patch, heads, window, global_blocks, strides and what
        the losses need; see `dense_peer.numbers`.
      arrays: params/<path>, table (positions), batch/<name>.
    """

    def __init__(self, shape: dict[str, Any], arrays: Arrays) -> None:
        self.shape = shape
        self.params: Tensors = {
            path: torch.from_numpy(array).requires_grad_()
            for path, array in load(arrays, "params/").items()
        }
        self.table = torch.from_numpy(arrays["table"])
        self.batch = {
            name.removeprefix("batch/"): torch.from_numpy(array)
            for name, array in arrays.items()
            if name.startswith("batch/")
        }
        self.running = {
            path.removesuffix("/scale"): (torch.zeros(len(p)), torch.ones(len(p)))
            for path, p in self.params.items()
            if path.endswith("/scale")
        }
        self.depth = sum(path.endswith("norm1/scale") for path in self.params)
        self.mean, self.std = (255 * torch.tensor(x) for x in (MEAN, STD))
        self.optimize()
        if shape["task"] == "detect":
            self.anchors = [
                anchors(shape["size"] // stride, stride, size, shape["ratios"])
                for stride, size in zip(shape["strides"], shape["anchor_sizes"], strict=True)
            ]

    def named(self, arrays: Arrays, prefix: str) -> Arrays:
        """The arrays of a tree under the names of `params`."""
        return load(arrays, prefix)

    def decays(self, path: str) -> bool:
        return path.endswith("kernel")

    def optimize(self) -> None:
        """Makes the optimizer of all parameters."""
        s, groups = self.shape, {True: [], False: []}
        for path, parameter in self.params.items():
            groups[self.decays(path)].append(parameter)
        self.optimizer = torch.optim.AdamW(
            [
                {"params": groups[True], "weight_decay": s["decay"]},
                {"params": groups[False], "weight_decay": 0.0},
            ],
            lr=s["lr"],
            betas=(0.9, 0.999),
            eps=1e-8,
            fused=True,
        )

    def loss(self) -> torch.Tensor:
        maps = self.maps()
        return self.detect(maps) if self.shape["task"] == "detect" else self.segment(maps)

    def step(self) -> float:
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.params.values(), self.shape["clip"], foreach=True)
        self.optimizer.step()
        return loss.item()

    # layers

    def dense(self, path: str, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.params[f"{path}/kernel"], self.params.get(f"{path}/bias"))

    def conv(self, path: str, x: torch.Tensor, *, bias: bool = True) -> torch.Tensor:
        weight = self.params[f"{path}/kernel"]
        if weight.ndim == 2:
            weight = weight[:, :, None, None]
        added = self.params.get(f"{path}/bias") if bias else None
        return F.conv2d(x, weight, added, padding=weight.shape[-1] // 2)

    def deconv(self, path: str, x: torch.Tensor) -> torch.Tensor:
        return F.conv_transpose2d(
            x, self.params[f"{path}/kernel"], self.params[f"{path}/bias"], stride=2
        )

    def norm(self, path: str, x: torch.Tensor) -> torch.Tensor:
        """Of the last axis."""
        scale, bias = self.params[f"{path}/scale"], self.params[f"{path}/bias"]
        return F.layer_norm(x, scale.shape, scale, bias, 1e-6)

    def channel_norm(self, path: str, x: torch.Tensor) -> torch.Tensor:
        return self.norm(path, x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    def batch_norm(self, path: str, x: torch.Tensor) -> torch.Tensor:
        mean, variance = self.running[path]
        scale, bias = self.params[f"{path}/scale"], self.params[f"{path}/bias"]
        return F.batch_norm(x, mean, variance, scale, bias, True, 0.1, 1e-5)

    # backbone and pyramid

    def maps(self) -> dict[int, torch.Tensor]:
        s, images, size = self.shape, self.batch["image"], self.batch["size"]
        x = (images.float() - self.mean) / self.std
        inside = torch.arange(s["size"]) < size[..., None]
        x = x * (inside[:, 0, :, None, None] & inside[:, 1, None, :, None])
        b, grid, patch = len(x), s["size"] // s["patch"], s["patch"]
        x = x.view(b, grid, patch, grid, patch, 3).transpose(2, 3).reshape(b, grid * grid, -1)
        x = self.dense("encoder/patch_embed", x) + self.table
        for i in range(self.depth):
            window = 0 if i in s["global_blocks"] else s["window"]
            x = self.block(i, x, grid, window)
        x = x.view(b, grid, grid, -1).permute(0, 3, 1, 2)  # channels last in memory
        return self.simple(x) if s["task"] == "detect" else self.rescaled(x)

    def block(self, i: int, x: torch.Tensor, grid: int, window: int) -> torch.Tensor:
        path, (b, n, d) = f"encoder/block{i}", x.shape
        h = self.norm(f"{path}/norm1", x)
        side = window or grid
        if window:
            w = grid // window
            h = h.view(b, w, window, w, window, d).transpose(2, 3).reshape(-1, window**2, d)
        heads = self.shape["heads"]
        qkv = self.dense(f"{path}/attention/qkv", h).unflatten(-1, (3, heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        bias = self.relative(i, q, side)
        h = F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).flatten(2)
        h = self.dense(f"{path}/attention/out", h)
        if window:
            h = h.view(b, w, w, window, window, d).transpose(2, 3).reshape(b, n, d)
        x = x + h
        h = F.gelu(self.dense(f"{path}/mlp/fc1", self.norm(f"{path}/norm2", x)))
        return x + self.dense(f"{path}/mlp/fc2", h)

    def relative(self, i: int, q: torch.Tensor, side: int) -> torch.Tensor | None:
        rows = self.params.get(f"encoder/relative/block{i}/rows")
        if rows is None:
            return None
        columns = self.params[f"encoder/relative/block{i}/columns"]
        offset = torch.arange(side)[:, None] - torch.arange(side) + side - 1
        on_map = q.unflatten(2, (side, side))
        by_row = torch.einsum("bhyxe,yke->bhyxk", on_map, rows[offset])
        by_column = torch.einsum("bhyxe,xke->bhyxk", on_map, columns[offset])
        return (by_row[..., None] + by_column[..., None, :]).reshape(*q.shape[:3], side * side)

    def simple(self, x: torch.Tensor) -> dict[int, torch.Tensor]:
        """ViTDet's pyramid from a map of stride 8."""
        made: dict[int, torch.Tensor] = {}
        for stride in self.shape["strides"][:-1]:
            path = f"pyramid/stride_{stride}"
            y = x
            if stride < self.shape["patch"]:
                y = self.deconv(f"{path}/deconv_0", x)
            elif stride > self.shape["patch"]:
                y = F.max_pool2d(x, stride // self.shape["patch"])
            y = self.channel_norm(f"{path}/norm_0", self.conv(f"{path}/conv_0", y))
            made[stride] = self.channel_norm(f"{path}/norm_1", self.conv(f"{path}/conv_1", y))
        last, before = self.shape["strides"][-1], self.shape["strides"][-2]
        made[last] = made[before][:, :, ::2, ::2]
        return made

    def rescaled(self, x: torch.Tensor) -> dict[int, torch.Tensor]:
        patch, made = self.shape["patch"], {}
        for stride in self.shape["strides"]:
            if stride < patch:
                made[stride] = self.deconv(f"pyramid/stride_{stride}/deconv_0", x)
            else:
                made[stride] = F.max_pool2d(x, stride // patch) if stride > patch else x
        return made

    # segmentation

    def segment(self, maps: dict[int, torch.Tensor]) -> torch.Tensor:
        s, strides = self.shape, self.shape["strides"]

        def layer(name: str, x: torch.Tensor) -> torch.Tensor:
            return F.relu(self.batch_norm(f"head/{name}", self.conv(f"head/{name}", x, bias=False)))

        def resized(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
            return F.interpolate(x, like.shape[2:], mode="bilinear", align_corners=False)

        def cost(name: str, x: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
            kept = (uniform >= s["dropout"]).float() / (1 - s["dropout"])
            logits = self.conv(f"head/{name}", x * kept[..., None, None])
            labels = self.batch["map"]
            whole = F.interpolate(logits, labels.shape[1:], mode="bilinear", align_corners=False)
            total = F.cross_entropy(whole, labels.long(), ignore_index=255, reduction="sum")
            return total / labels.numel()

        top = maps[strides[-1]]
        pooled = [
            resized(layer(f"pool_{n}", F.adaptive_avg_pool2d(top, n)), top) for n in s["pools"]
        ]
        above = layer("pooled", torch.cat([top, *pooled], 1))
        made = [above]
        for stride in strides[-2::-1]:
            lateral = layer(f"lateral_{stride}", maps[stride])
            above = lateral + resized(above, lateral)
            made.insert(0, layer(f"output_{stride}", above))
        x = layer("fuse", torch.cat([resized(y, made[0]) for y in made], 1))
        uniform, width = self.batch["dropout"], x.shape[1]
        loss = cost("classifier", x, uniform[:, :width])
        aux = layer("aux", maps[strides[-2]])
        return loss + s["aux_weight"] * cost("aux_classifier", aux, uniform[:, width:])

    # detection

    def detect(self, maps: dict[int, torch.Tensor]) -> torch.Tensor:
        s, batch = self.shape, self.batch
        logits, deltas = zip(*(self.rpn(maps[stride]) for stride in s["strides"]), strict=True)
        with torch.no_grad():
            found = self.proposals(logits, deltas)
            known = [
                (boxes[classes >= 0], classes[classes >= 0].long(), masks[classes >= 0])
                for boxes, classes, masks in zip(
                    batch["boxes"], batch["classes"], batch["masks"], strict=True
                )
            ]
        loss = self.rpn_loss(torch.cat(logits, 1), torch.cat(deltas, 1), known)
        chosen = [self.regions(i, found[i], *known[i][:2]) for i in range(len(known))]
        return loss + self.box_loss(maps, chosen, known) + self.mask_loss(maps, chosen, known)

    def rpn(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        for i in range(self.shape["rpn_convs"]):
            x = F.relu(self.conv(f"head/rpn/conv_{i}", x))
        logits, deltas = self.conv("head/rpn/logits", x), self.conv("head/rpn/deltas", x)
        return (
            logits.permute(0, 2, 3, 1).flatten(1),
            deltas.permute(0, 2, 3, 1).reshape(len(x), -1, 4),
        )

    def proposals(
        self, logits: tuple[torch.Tensor, ...], deltas: tuple[torch.Tensor, ...]
    ) -> list[torch.Tensor]:
        """Boxes of each image, by falling score."""
        s = self.shape
        scores, boxes, levels = [], [], []
        parts = zip(logits, deltas, self.anchors, strict=True)
        for level, (logits_BxA, deltas_BxAx4, anchors_Ax4) in enumerate(parts):
            score, index = logits_BxA.topk(min(s["candidates"], logits_BxA.shape[1]), 1)
            picked = deltas_BxAx4.gather(1, index[..., None].expand(-1, -1, 4))
            boxes.append(decode(picked, anchors_Ax4[index], (1.0, 1.0, 1.0, 1.0)))
            scores.append(score)
            levels.append(torch.full((score.shape[1],), level))
        score_BxN, boxes_BxNx4, level_N = (
            torch.cat(scores, 1),
            torch.cat(boxes, 1),
            torch.cat(levels),
        )
        out = []
        for score, box, size in zip(score_BxN, boxes_BxNx4, self.batch["size"], strict=True):
            box = clip_boxes_to_image(box, (int(size[0]), int(size[1])))
            keep = ((box[:, 2:] - box[:, :2]) > 0).all(1)
            box, score, level = box[keep], score[keep], level_N[keep]
            keep = batched_nms(box, score, level, s["rpn_nms"])[: s["proposals"]]
            out.append(box[keep])
        return out

    def rpn_loss(
        self, logits_BxA: torch.Tensor, deltas_BxAx4: torch.Tensor, known: list[Any]
    ) -> torch.Tensor:
        s, all_anchors = self.shape, torch.cat(self.anchors)
        loss = logits_BxA.new_zeros(())
        for i, (boxes, _, _) in enumerate(known):
            with torch.no_grad():
                label, owner = match(boxes, all_anchors, 0.3, 0.7, keep_best=True)
                fore, back = sample(
                    label, self.batch["anchor_draws"][i], s["rpn_samples"], s["rpn_samples"] // 2
                )
                places = torch.cat([fore, back])
                target = (torch.arange(len(places)) < len(fore)).float()
            loss = loss + F.binary_cross_entropy_with_logits(
                logits_BxA[i, places], target, reduction="sum"
            )
            if len(fore):
                wanted = encode(boxes[owner[fore]], all_anchors[fore], (1.0, 1.0, 1.0, 1.0))
                loss = loss + (deltas_BxAx4[i, fore] - wanted).abs().sum()
        return loss / (s["rpn_samples"] * len(known))

    @torch.no_grad()
    def regions(
        self, i: int, found: torch.Tensor, boxes: torch.Tensor, classes: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """The sampled regions of an image, foreground first."""
        s, draws = self.shape, self.batch["region_draws"][i]
        places = torch.cat([found, boxes])
        slots = torch.cat([torch.arange(len(found)), s["proposals"] + torch.arange(len(boxes))])
        label, owner = match(boxes, places, 0.5, 0.5, keep_best=False)
        most = int(s["rois"] * s["foreground"])
        fore, back = sample(label, draws[slots], s["rois"], most)
        index = torch.cat([fore, back])
        target = torch.full((len(index),), s["classes"])
        if len(fore):
            target[: len(fore)] = classes[owner[fore]]
        return {"boxes": places[index], "target": target, "owner": owner[fore]}

    def read(
        self, maps: dict[int, torch.Tensor], boxes: list[torch.Tensor], side: int
    ) -> torch.Tensor:
        """RoIAlign of the boxes of every image, each from the map of its size."""
        side_of, stride_of = self.shape["canonical"]
        strides = self.shape["strides"][:-1]
        rois = torch.cat(
            [
                torch.cat([torch.full((len(each), 1), float(i)), each], 1)
                for i, each in enumerate(boxes)
            ]
        )
        area = (rois[:, 3] - rois[:, 1]) * (rois[:, 4] - rois[:, 2])
        level = torch.floor(math.log2(stride_of) + torch.log2(area.sqrt() / side_of + 1e-8))
        low, high = math.log2(strides[0]), math.log2(strides[-1])
        level = level.clamp(low, high)
        out = rois.new_zeros(len(rois), maps[strides[0]].shape[1], side, side)
        for stride in strides:
            mine = (level == math.log2(stride)).nonzero()[:, 0]
            read = roi_align(maps[stride], rois[mine], side, 1 / stride, -1, aligned=True)
            out = out.index_put((mine,), read)
        return out

    def box_loss(
        self, maps: dict[int, torch.Tensor], chosen: list[Any], known: list[Any]
    ) -> torch.Tensor:
        s = self.shape
        x = self.read(maps, [each["boxes"] for each in chosen], 7)
        for i in range(s["box_convs"]):
            x = self.conv(f"head/box/conv_{i}", x)
            x = F.relu(self.channel_norm(f"head/box/norm_{i}", x))
        h = F.relu(self.dense("head/box/hidden", x.flatten(1)))
        logits, deltas = self.dense("head/box/classes", h), self.dense("head/box/deltas", h)
        target = torch.cat([each["target"] for each in chosen])
        share = torch.cat(
            [torch.full((len(each["boxes"]),), 1 / len(each["boxes"])) for each in chosen]
        )
        loss = (F.cross_entropy(logits, target, reduction="none") * share).sum()
        fore = (target < s["classes"]).nonzero()[:, 0]
        if len(fore):
            places = torch.cat([each["boxes"] for each in chosen])[fore]
            objects = torch.cat(
                [boxes[each["owner"]] for each, (boxes, _, _) in zip(chosen, known, strict=True)]
            )
            wanted = encode(objects, places, (10.0, 10.0, 5.0, 5.0))
            own = deltas.view(len(target), -1, 4)[fore, target[fore]]
            loss = loss + ((own - wanted).abs().sum(1) * share[fore]).sum()
        return loss / len(chosen)

    def mask_loss(
        self, maps: dict[int, torch.Tensor], chosen: list[Any], known: list[Any]
    ) -> torch.Tensor:
        s = self.shape
        counts = [len(each["owner"]) for each in chosen]
        boxes = [each["boxes"][:count] for each, count in zip(chosen, counts, strict=True)]
        x = self.read(maps, boxes, 14)
        for i in range(s["mask_convs"]):
            x = self.conv(f"head/mask/conv_{i}", x)
            x = F.relu(self.channel_norm(f"head/mask/norm_{i}", x))
        x = F.relu(self.deconv("head/mask/deconv", x))
        logits = self.conv("head/mask/masks", x)
        target = torch.cat(
            [each["target"][:count] for each, count in zip(chosen, counts, strict=True)]
        )
        with torch.no_grad():
            masks = torch.cat(
                [
                    box_masks(masks[each["owner"]], known_boxes[each["owner"]], places)
                    for each, places, (known_boxes, _, masks) in zip(
                        chosen, boxes, known, strict=True
                    )
                ]
            )
            share = torch.cat([torch.full((n,), 1 / max(n, 1)) for n in counts])
        own = logits[torch.arange(len(target)), target]
        cost = F.binary_cross_entropy_with_logits(own, masks, reduction="none").mean((1, 2))
        return (cost * share).sum() / len(chosen)


def anchors(grid: int, stride: int, size: float, ratios: list[float]) -> torch.Tensor:
    """[grid^2 R, 4] around the corners of the cells."""
    widths = torch.tensor([size / math.sqrt(r) for r in ratios])
    heights = torch.tensor([size * math.sqrt(r) for r in ratios])
    half = torch.stack([-widths, -heights, widths, heights], 1) / 2
    y, x = torch.meshgrid(*(torch.arange(grid) * float(stride),) * 2, indexing="ij")
    return (torch.stack([x, y, x, y], -1)[:, :, None] + half).reshape(-1, 4)


def encode(boxes: torch.Tensor, at: torch.Tensor, weights: tuple[float, ...]) -> torch.Tensor:
    size, own = at[:, 2:] - at[:, :2], boxes[:, 2:] - boxes[:, :2]
    middle, other = at[:, :2] + size / 2, boxes[:, :2] + own / 2
    deltas = torch.cat([(other - middle) / size, torch.log(own / size)], 1)
    return deltas * torch.tensor(weights)


def decode(deltas: torch.Tensor, at: torch.Tensor, weights: tuple[float, ...]) -> torch.Tensor:
    deltas = deltas / torch.tensor(weights)
    size = at[..., 2:] - at[..., :2]
    middle = at[..., :2] + size / 2 + deltas[..., :2] * size
    half = torch.exp(deltas[..., 2:].clamp(max=LIMIT)) * size / 2
    return torch.cat([middle - half, middle + half], -1)


def match(
    boxes: torch.Tensor, at: torch.Tensor, low: float, high: float, *, keep_best: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """(1 foreground, 0 background, -1 neither; the object) of every place."""
    if not len(boxes):
        nothing = torch.zeros(len(at), dtype=torch.long)
        return nothing, nothing
    iou = box_iou(boxes, at)
    best, owner = iou.max(0)
    label = torch.where(best < low, 0, torch.where(best < high, -1, 1))
    if keep_best:
        label[(iou == iou.max(1, keepdim=True).values).any(0)] = 1
    return label, owner


def sample(
    label: torch.Tensor, draws: torch.Tensor, count: int, most: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Places of the sampled foreground and background: those of the largest draws."""
    out = []
    for kind in (1, 0):
        places = (label == kind).nonzero()[:, 0]
        room = most if kind else count - len(out[0])
        if len(places) > room:
            places = places[draws[places].topk(room).indices]
        out.append(places)
    return out[0], out[1]


def box_masks(
    masks: torch.Tensor, frames: torch.Tensor, places: torch.Tensor, out: int = 28
) -> torch.Tensor:
    """Masks in the frames of their boxes, read at out x out places of other boxes: 0 or 1."""
    if not len(masks):
        return masks.new_zeros((0, out, out), dtype=torch.float32)
    centre = (torch.arange(out) + 0.5) / out
    at = places[:, None, :2] + centre[:, None] * (places[:, 2:] - places[:, :2])[:, None]
    size = (frames[:, 2:] - frames[:, :2])[:, None]
    x, y = ((at - frames[:, None, :2]) / size * 2 - 1).unbind(-1)
    grid = torch.stack([x[:, None].expand(-1, out, -1), y[:, :, None].expand(-1, -1, out)], -1)
    read = F.grid_sample(masks[:, None].float(), grid, align_corners=False)
    return (read[:, 0] >= 0.5).float()
