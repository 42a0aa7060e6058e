"""Writes tests/data/dense/dino.npz: what the authors' own DINO makes of small maps.

    git clone https://github.com/IDEA-Research/DINO && git -C DINO checkout faa8520
    PYTHONPATH=. python tests/data/make_dino.py DINO

IDEA-Research/DINO (Apache-2.0) at commit faa8520fe9604c23ad65a48bc583550a44c0e3ab, torch 2.13, on a
CPU: its model, denoising, matcher, criterion and post-processing, in float64, one image at a time
as one process each. Its compiled attention is replaced by its own PyTorch form, and its random
numbers by given ones. Parameters are `dino_reference.parameter`, so that they need not be stored.
"""

import collections
import pathlib
import sys
import types

import numpy as np
import torch

from tests.data import dino_reference as case

ROOT = pathlib.Path(__file__).parent
CUDA = "cuda"


def import_reference(checkout: str) -> None:
    """Makes the checkout importable on a machine without a GPU and without its other models."""
    sys.path.insert(0, checkout)
    sys.modules["MultiScaleDeformableAttention"] = types.ModuleType("MultiScaleDeformableAttention")
    for name in ("convnext", "swin_transformer"):
        module = types.ModuleType(f"models.dino.{name}")
        module.build_convnext = module.build_swin_transformer = None
        sys.modules[f"models.dino.{name}"] = module
    torch.Tensor.cuda = lambda self, *_, **__: self
    to = torch.Tensor.to
    torch.Tensor.to = lambda self, *a, **k: self if a[:1] == (CUDA,) else to(self, *a, **k)


import_reference(sys.argv[1])

from models.dino import deformable_transformer, dn_components  # noqa: E402
from models.dino import dino as reference  # noqa: E402
from models.dino.matcher import HungarianMatcher  # noqa: E402
from models.dino.ops.functions import ms_deform_attn_func  # noqa: E402
from models.dino.ops.modules import ms_deform_attn  # noqa: E402
from models.dino.position_encoding import PositionEmbeddingSineHW  # noqa: E402
from util.misc import NestedTensor  # noqa: E402


class Attention:
    """The reference's own PyTorch form in the place of its compiled one."""

    @staticmethod
    def apply(value, shapes, starts, locations, weights, step):
        sizes = [(int(h), int(w)) for h, w in shapes]
        return ms_deform_attn_func.ms_deform_attn_core_pytorch(value, sizes, locations, weights)


def sines_of_any_width(position):
    """The reference's has 128 features a number whatever the width."""
    features = case.WIDTH // 2
    rate = 10000 ** (2 * (torch.arange(features) // 2).double() / features)
    parts = []
    for i in (1, 0, 2, 3):
        angle = position[..., i, None] * 2 * np.pi / rate
        parts.append(torch.stack([angle[..., 0::2].sin(), angle[..., 1::2].cos()], -1).flatten(-2))
    return torch.cat(parts, -1)


ms_deform_attn.MSDeformAttnFunction = Attention
if case.WIDTH != 256:
    deformable_transformer.gen_sineembed_for_position = sines_of_any_width


class Backbone(torch.nn.Module):
    """Given maps in the place of a backbone's."""

    def __init__(self, channels):
        super().__init__()
        self.num_channels = channels
        self.positions = PositionEmbeddingSineHW(case.WIDTH // 2, 20, 20, normalize=True)

    def __getitem__(self, index):
        assert index == 1
        return self.positions

    def forward(self, samples):
        features = []
        for x in self.maps:
            mask = torch.nn.functional.interpolate(samples.mask[None].float(), size=x.shape[-2:])
            features.append(NestedTensor(x, mask.bool()[0]))
        return features, [self.positions(f).to(torch.float64) for f in features]


def build(width=None, classes=None, **sizes):
    width, levels = width or case.WIDTH, sizes.pop("levels", len(case.CHANNELS) + 1)
    channels = sizes.pop("channels", case.CHANNELS)
    queries = sizes.pop("num_queries", case.QUERIES)
    transformer = deformable_transformer.DeformableTransformer(
        d_model=width,
        nhead=sizes.get("heads", case.HEADS),
        num_queries=queries,
        num_encoder_layers=sizes.get("depth", case.ENCODER_DEPTH),
        num_decoder_layers=sizes.get("depth", case.DEPTH),
        dim_feedforward=sizes.get("hidden", case.HIDDEN),
        dropout=0.0,
        return_intermediate_dec=True,
        query_dim=4,
        deformable_encoder=True,
        deformable_decoder=True,
        num_feature_levels=levels,
        enc_n_points=sizes.get("points", case.POINTS),
        dec_n_points=sizes.get("points", case.POINTS),
        learnable_tgt_init=True,
        two_stage_type="standard",
        embed_init_tgt=True,
        decoder_sa_type="sa",
        module_seq=["sa", "ca", "ffn"],
    )
    return reference.DINO(
        Backbone(channels),
        transformer,
        num_classes=classes or case.CLASSES,
        num_queries=queries,
        aux_loss=True,
        iter_update=True,
        query_dim=4,
        num_feature_levels=levels,
        nheads=sizes.get("heads", case.HEADS),
        two_stage_type="standard",
        two_stage_bbox_embed_share=False,
        two_stage_class_embed_share=False,
        dec_pred_class_embed_share=sizes.get("share", True),
        dec_pred_bbox_embed_share=sizes.get("share", True),
        dn_number=case.DENOISING,
        dn_box_noise_scale=case.BOX_NOISE,
        dn_label_noise_ratio=2 * case.LABEL_NOISE,
        dn_labelbook_size=classes or case.CLASSES,
    )


def given_draws(draws):
    """Puts given numbers in the place of those that denoising draws, in its order."""
    queue = collections.deque(["relabel", "category", "sign", "move"])

    def draw(like, *_, **__):
        name = queue.popleft()
        u = torch.tensor(draws[name], dtype=torch.float64)
        if name == "relabel":
            draw.chosen = torch.nonzero(u[: len(like)] < case.LABEL_NOISE).view(-1)
            return u[: len(like)]
        if name == "category":
            return (u[draw.chosen] * case.CLASSES).long()
        u = u[: len(like)]
        return (u >= 0.5).double() if name == "sign" else u.clone()

    dn_components.torch = types.SimpleNamespace(**{**vars(torch), "rand_like": draw})
    dn_components.torch.randint_like = draw


def main() -> None:
    full = build(
        256, 91, levels=4, channels=[512, 1024, 2048], num_queries=900, heads=8, depth=6,
        hidden=2048, points=4,
    )  # fmt: skip
    print("parameters of the published sizes:", sum(p.numel() for p in full.parameters()))
    torch.set_default_dtype(torch.float64)
    model = build().double()
    with torch.no_grad():
        for name, value in model.named_parameters():
            value.copy_(torch.tensor(case.parameter(name, tuple(value.shape))))
    model.train()
    inputs, out = case.inputs(), {}
    weights = {"loss_ce": 1.0, "loss_bbox": 5.0, "loss_giou": 2.0}
    matcher = HungarianMatcher(cost_class=2.0, cost_bbox=5.0, cost_giou=2.0)
    record = []

    class Recorded(torch.nn.Module):
        def forward(self, *args):
            found = matcher(*args)
            record.append(found)
            return found

    criterion = reference.SetCriterion(
        case.CLASSES, Recorded(), weights, focal_alpha=0.25, losses=["labels", "boxes"]
    )
    criterion.train()
    counts = (inputs["classes"] >= 0).sum(1)
    total = counts.sum()
    post = reference.PostProcess(num_select=case.DETECTIONS)
    maps = [
        torch.tensor(x, dtype=torch.float64).permute(0, 3, 1, 2).requires_grad_()
        for x in inputs["maps"]
    ]
    for i, (h, w) in enumerate(inputs["size"].tolist()):
        n = int(counts[i])
        boxes = torch.tensor(inputs["boxes"][i, :n], dtype=torch.float64)
        x0, y0, x1, y1 = (boxes / torch.tensor([w, h, w, h])).unbind(-1)
        target = {
            "labels": torch.tensor(inputs["classes"][i, :n]).long(),
            "boxes": torch.stack([(x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0], -1),
        }
        mask = torch.ones(1, case.SIDE, case.SIDE, dtype=torch.bool)
        mask[:, :h, :w] = False
        samples = NestedTensor(torch.zeros(1, 3, case.SIDE, case.SIDE), mask)
        model.backbone.maps = [x[i : i + 1] for x in maps]
        given_draws({name: x[i] for name, x in inputs["draws"].items()})
        made = model(samples, [target])
        record.clear()
        losses = criterion(made, [target])
        known = made["dn_meta"]["output_known_lbs_bboxes"]
        sets = [*made["aux_outputs"], made, made["interm_outputs"]]
        matches = [*record[1 : 1 + len(made["aux_outputs"])], record[0], record[-1]]
        for kind, place in (("logits", "pred_logits"), ("boxes", "pred_boxes")):
            out[f"{i}/{kind}"] = torch.stack([s[place][0] for s in sets])
            out[f"{i}/dn_{kind}"] = torch.stack(
                [s[place][0] for s in [*known["aux_outputs"], known]]
            )
        match = np.full((len(sets), case.OBJECTS), -1)
        for row, [(query, objects)] in zip(match, matches, strict=True):
            row[objects.numpy()] = query.numpy()
        out[f"{i}/match"] = torch.tensor(match)
        last = len(made["aux_outputs"])
        names = {"cls": "loss_ce", "l1": "loss_bbox", "giou": "loss_giou"}
        for ours, theirs in names.items():
            rows = [losses[f"{theirs}_{k}"] for k in range(last)] + [losses[theirs]]
            out[f"{i}/{ours}"] = torch.stack(rows) * n
            rows = [losses[f"{theirs}_dn_{k}"] for k in range(last)] + [losses[f"{theirs}_dn"]]
            out[f"{i}/dn_{ours}"] = torch.stack(rows) * n
            out[f"{i}/enc_{ours}"] = losses[f"{theirs}_interm"][None] * n
        loss = sum(
            value * next(w for name, w in weights.items() if key.startswith(name))
            for key, value in losses.items()
            if key.startswith(tuple(weights))
        )
        (loss * n / total).backward()
        [found] = post(made, torch.tensor([[h, w]]))
        for name in ("boxes", "scores", "labels"):
            out[f"{i}/detect_{name}"] = found[name]
        print(f"image {i}: loss {float(loss):.6f}, groups {made['dn_meta']['num_dn_group']}")
    for i, x in enumerate(maps):
        out[f"gradient_of_map/{i}"] = x.grad.permute(0, 2, 3, 1)
    for name, value in model.named_parameters():
        grad = torch.zeros_like(value) if value.grad is None else value.grad
        flat = grad.detach().numpy().ravel()
        out[f"gradient/{name}"] = torch.tensor(case.summary(flat))
        if flat.size <= case.WHOLE:
            out[f"whole_gradient/{name}"] = grad
    arrays = {
        name: value.numpy() if value.dtype == torch.long else value.detach().numpy().astype("f4")
        for name, value in out.items()
    }
    arrays = {k: v.astype("i4") if v.dtype == np.int64 else v for k, v in arrays.items()}
    np.savez_compressed(ROOT / "dense" / "dino.npz", **arrays)


if __name__ == "__main__":
    main()
