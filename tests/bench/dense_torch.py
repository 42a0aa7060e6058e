"""The training losses of Mask R-CNN on a plain ViT in plain PyTorch with the operations of
torchvision, on a dict of parameters with the names of detectron2. Written from the specification,
to compare numbers and time.

    python -m tests.bench.dense_torch      # eight steps, of UperNet too, against the references'
"""

import pathlib
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torchvision.ops import batched_nms, box_iou, roi_align

Params = dict[str, torch.Tensor]
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
LARGEST = float(np.log(1000 / 16))


def norm(p: Params, name: str, x: torch.Tensor) -> torch.Tensor:
    """Layer norm of the last axis."""
    return F.layer_norm(x, x.shape[-1:], p[f"{name}.weight"], p[f"{name}.bias"], 1e-6)


def channel_norm(p: Params, name: str, x: torch.Tensor) -> torch.Tensor:
    return norm(p, name, x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def linear(p: Params, name: str, x: torch.Tensor) -> torch.Tensor:
    return F.linear(x, p[f"{name}.weight"], p.get(f"{name}.bias"))


def conv(p: Params, name: str, x: torch.Tensor, padding: int = 0) -> torch.Tensor:
    return F.conv2d(x, p[f"{name}.weight"], p.get(f"{name}.bias"), padding=padding)


def deconv(p: Params, name: str, x: torch.Tensor) -> torch.Tensor:
    return F.conv_transpose2d(x, p[f"{name}.weight"], p[f"{name}.bias"], stride=2)


def mlp(p: Params, first: str, second: str, x: torch.Tensor) -> torch.Tensor:
    return linear(p, second, F.gelu(linear(p, first, x)))


def normalised(images: torch.Tensor, size: torch.Tensor) -> torch.Tensor:
    """uint8 [B, S, S, 3] to float [B, 3, S, S], zero outside the content."""
    x = (images - torch.tensor(MEAN)) / torch.tensor(STD)
    rows = torch.arange(images.shape[1])[None, :, None] < size[:, :1, None]
    columns = torch.arange(images.shape[2])[None, None] < size[:, 1:, None]
    return (x * (rows & columns)[..., None]).permute(0, 3, 1, 2)


def offsets(table: torch.Tensor, side: int) -> torch.Tensor:
    """[side, side, C] of relative positions, resized to the side."""
    if len(table) != 2 * side - 1:
        table = F.interpolate(table.T[None], size=2 * side - 1, mode="linear")[0].T
    line = torch.arange(side)
    return table[line[:, None] - line + side - 1]


def relative_attention(p: Params, name: str, x: torch.Tensor, heads: int) -> torch.Tensor:
    """Attention of [B, h, w, C] with decomposed relative positions."""
    b, h, w, c = x.shape
    q, k, v = (
        linear(p, f"{name}.qkv", x)
        .reshape(b, h * w, 3, heads, c // heads)
        .permute(2, 0, 3, 1, 4)
        .unbind(0)
    )
    rows, columns = offsets(p[f"{name}.rel_pos_h"], h), offsets(p[f"{name}.rel_pos_w"], w)
    grid = q.reshape(b, heads, h, w, -1)
    logits = (q * (c // heads) ** -0.5) @ k.mT
    logits = logits.view(b, heads, h, w, h, w)
    logits = logits + torch.einsum("bnhwc,hkc->bnhwk", grid, rows)[..., None]
    logits = logits + torch.einsum("bnhwc,wkc->bnhwk", grid, columns)[..., None, :]
    out = logits.view(b, heads, h * w, h * w).softmax(-1) @ v
    return linear(p, f"{name}.proj", out.transpose(1, 2).reshape(b, h, w, c))


def windowed(p: Params, name: str, x: torch.Tensor, heads: int, side: int) -> torch.Tensor:
    b, h, w, c = x.shape
    down, right = -h % side, -w % side
    x = F.pad(x, (0, 0, 0, right, 0, down))
    rows, columns = (h + down) // side, (w + right) // side
    x = x.view(b, rows, side, columns, side, c).transpose(2, 3).reshape(-1, side, side, c)
    x = relative_attention(p, name, x, heads).view(b, rows, columns, side, side, c)
    return x.transpose(2, 3).reshape(b, h + down, w + right, c)[:, :h, :w]


def vit_map(p: Params, x: torch.Tensor, shape: dict[str, Any]) -> torch.Tensor:
    """[B, C, h, w], the map of the last block."""
    net = "backbone.net"
    x = F.conv2d(
        x,
        p[f"{net}.patch_embed.proj.weight"],
        p[f"{net}.patch_embed.proj.bias"],
        stride=shape["patch"],
    ).permute(0, 2, 3, 1)
    table = p[f"{net}.pos_embed"][:, 1:]
    side = int(table.shape[1] ** 0.5)
    grid = table.view(1, side, side, -1).permute(0, 3, 1, 2)
    if (side, side) != tuple(x.shape[1:3]):
        grid = F.interpolate(grid, size=x.shape[1:3], mode="bicubic")
    x = x + grid.permute(0, 2, 3, 1)
    for i in range(shape["depth"]):
        block = f"{net}.blocks.{i}"
        y = norm(p, f"{block}.norm1", x)
        if i in shape["global"]:
            y = relative_attention(p, f"{block}.attn", y, shape["heads"])
        else:
            y = windowed(p, f"{block}.attn", y, shape["heads"], shape["window"])
        x = x + y
        y = norm(p, f"{block}.norm2", x)
        x = x + mlp(p, f"{block}.mlp.fc1", f"{block}.mlp.fc2", y)
    return x.permute(0, 3, 1, 2)


def simple_pyramid(p: Params, x: torch.Tensor, shape: dict[str, Any]) -> list[torch.Tensor]:
    """Maps of shape["strides"]; the coarsest is every second cell of the one before."""
    out = []
    for stride in shape["strides"][:-1]:
        name, y, at = f"backbone.simfp_{int(np.log2(stride))}", x, 0
        for step in range(int(np.log2(shape["patch"] / stride)) if stride < shape["patch"] else 0):
            if step:
                y, at = F.gelu(channel_norm(p, f"{name}.{at}", y)), at + 2
            y, at = deconv(p, f"{name}.{at}", y), at + 1
        if stride > shape["patch"]:
            y, at = F.max_pool2d(y, stride // shape["patch"]), 1
        y = channel_norm(p, f"{name}.{at}.norm", conv(p, f"{name}.{at}", y))
        y = channel_norm(p, f"{name}.{at + 1}.norm", conv(p, f"{name}.{at + 1}", y, 1))
        out.append(y)
    return [*out, out[-1][:, :, ::2, ::2]]


def anchors(shape: dict[str, Any], grids: list[tuple[int, int]]) -> list[torch.Tensor]:
    out = []
    for (h, w), stride, size in zip(grids, shape["strides"], shape["anchor_sizes"], strict=True):
        sides = [(size / r**0.5, size * r**0.5) for r in shape["anchor_ratios"]]
        base = torch.tensor([[-x / 2, -y / 2, x / 2, y / 2] for x, y in sides])
        y, x = torch.meshgrid(torch.arange(h) * stride, torch.arange(w) * stride, indexing="ij")
        out.append((torch.stack([x, y, x, y], -1).view(-1, 1, 4) + base).reshape(-1, 4))
    return out


def encoded(boxes: torch.Tensor, at: torch.Tensor, weights: tuple[float, ...]) -> torch.Tensor:
    side, goal = at[:, 2:] - at[:, :2], boxes[:, 2:] - boxes[:, :2]
    moved = (boxes[:, :2] + goal / 2 - at[:, :2] - side / 2) / side
    return torch.cat([moved, (goal / side).log()], 1) * torch.tensor(weights)


def decoded(deltas: torch.Tensor, at: torch.Tensor, weights: tuple[float, ...]) -> torch.Tensor:
    deltas = deltas / torch.tensor(weights)
    side = at[:, 2:] - at[:, :2]
    centre = at[:, :2] + side / 2 + deltas[:, :2] * side
    half = side * deltas[:, 2:].clamp(max=LARGEST).exp() / 2
    return torch.cat([centre - half, centre + half], 1)


def drawn(label: torch.Tensor, uniform: torch.Tensor, count: int, share: float) -> Any:
    """Indices of foreground and background samples: those of the largest uniform numbers."""
    chosen, wanted = [], int(count * share)
    for value in (1, 0):
        index = (label == value).nonzero()[:, 0]
        if len(index) > wanted:
            index = index[uniform[index].topk(wanted).indices]
        chosen.append(index)
        wanted = count - len(index)
    return chosen


def label_anchors(at: torch.Tensor, boxes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    if not len(boxes):
        return torch.zeros(len(at)), torch.zeros(len(at), dtype=torch.long)
    iou = box_iou(boxes, at)
    best, index = iou.max(0)
    label = torch.where(best < 0.3, 0, torch.where(best < 0.7, -1, 1))
    label[(iou == iou.max(1, keepdim=True).values).any(0)] = 1
    return label, index


def propose(
    logits: torch.Tensor,
    deltas: torch.Tensor,
    levels: list[torch.Tensor],
    size: torch.Tensor,
    limits: tuple[int, int],
) -> torch.Tensor:
    """Proposals of an image, [P, 4]."""
    found, start = [], 0
    for number, at in enumerate(levels):
        values, index = logits[start : start + len(at)].topk(min(limits[0], len(at)))
        boxes = decoded(deltas[start + index], at[index], (1.0, 1.0, 1.0, 1.0))
        found.append((boxes, values, torch.full_like(index, number)))
        start += len(at)
    boxes, values, level = (torch.cat(parts) for parts in zip(*found, strict=True))
    boxes = torch.minimum(boxes.clamp(min=0), size[[1, 0, 1, 0]].to(boxes))
    full = ((boxes[:, 2:] - boxes[:, :2]) > 0).all(1)
    boxes, values, level = boxes[full], values[full], level[full]
    return boxes[batched_nms(boxes, values, level, 0.7)[: limits[1]]]


def pooled(
    maps: list[torch.Tensor], shape: dict[str, Any], rois: list[torch.Tensor], side: int
) -> torch.Tensor:
    """[R, C, side, side] of the RoIs of all images, each from the level of its size."""
    which = torch.cat([torch.full((len(r), 1), float(i)) for i, r in enumerate(rois)])
    rois5 = torch.cat([which, torch.cat(rois)], 1)
    area = (rois5[:, 3] - rois5[:, 1]) * (rois5[:, 4] - rois5[:, 2])
    reference, stride = shape["canonical"]
    level = (np.log2(stride) + (area.sqrt() / reference + 1e-8).log2()).floor()
    strides = shape["strides"][:-1]
    level = level.clamp(np.log2(strides[0]), np.log2(strides[-1])) - np.log2(strides[0])
    out = maps[0].new_zeros(len(rois5), maps[0].shape[1], side, side)
    for number, at in enumerate(strides):
        index = (level == number).nonzero()[:, 0]
        if len(index):
            out = out.index_copy(
                0, index, roi_align(maps[number], rois5[index], side, 1 / at, -1, True)
            )
    return out


def framed_targets(
    masks: torch.Tensor, boxes: torch.Tensor, rois: torch.Tensor, side: int
) -> torch.Tensor:
    """Masks in the frame of their boxes, read at the bin centres of RoIs: [R, side, side]."""
    bins = (torch.arange(side) + 0.5) / side
    places = []
    for axis in (0, 1):
        low, high = boxes[:, axis, None], boxes[:, axis + 2, None]
        at = rois[:, axis, None] + bins * (rois[:, axis + 2] - rois[:, axis])[:, None]
        places.append((at - low) / (high - low) * 2 - 1)
    x, y = places
    grid = torch.stack([x[:, None, :].expand(-1, side, -1), y[:, :, None].expand(-1, -1, side)], -1)
    return (F.grid_sample(masks[:, None].float(), grid, align_corners=False)[:, 0] >= 0.5).float()


def mask_rcnn_losses(p: Params, batch: dict[str, torch.Tensor], shape: dict[str, Any]) -> Any:
    """[B, 5]: rpn_cls, rpn_loc, cls, box_reg and mask of each image by its own counts."""
    count = len(batch["image"])
    x = normalised(batch["image"], batch["size"])
    maps = simple_pyramid(p, vit_map(p, x, shape), shape)
    head, logits, deltas = "proposal_generator.rpn_head", [], []
    for y in maps:
        for i in range(2):
            y = F.relu(conv(p, f"{head}.conv.conv{i}", y, 1))
        logits.append(
            conv(p, f"{head}.objectness_logits", y).permute(0, 2, 3, 1).reshape(count, -1)
        )
        deltas.append(conv(p, f"{head}.anchor_deltas", y).permute(0, 2, 3, 1).reshape(count, -1, 4))
    levels = anchors(shape, [tuple(m.shape[2:]) for m in maps])
    at, rpn_logits, rpn_deltas = torch.cat(levels), torch.cat(logits, 1), torch.cat(deltas, 1)
    rows, rois, classes, goals, masks = [], [], [], [], []
    total = shape["classes"]
    for i in range(count):
        with torch.no_grad():
            valid = batch["classes"][i] >= 0
            boxes, names = batch["boxes"][i][valid], batch["classes"][i][valid].long()
            label, index = label_anchors(at, boxes)
            fg, bg = drawn(label, batch["uniform/rpn"][i], shape["rpn_samples"], 0.5)
            found = propose(
                rpn_logits[i], rpn_deltas[i], levels, batch["size"][i], shape["proposals"]
            )
            slots = torch.cat(
                [torch.arange(len(found)), shape["proposals"][1] + torch.arange(len(boxes))]
            )
            found = torch.cat([found, boxes])
            if len(boxes):
                best, match = box_iou(boxes, found).max(0)
            else:
                best, match = torch.zeros(len(found)), torch.zeros(len(found), dtype=torch.long)
            uniform = batch["uniform/roi"][i][slots]
            roi_fg, roi_bg = drawn(
                (best >= 0.5).long(), uniform, shape["rois"], shape["roi_foreground"]
            )
            index_fg, roi = index[fg], torch.cat([roi_fg, roi_bg])
            rois.append(found[roi])
            kinds = torch.full((len(roi),), total)
            kinds[: len(roi_fg)] = names[match[roi_fg]]
            classes.append(kinds)
            goals.append(boxes[match[roi_fg]])
            masks.append(batch["masks"][i][valid][match[roi_fg]])
        sampled = torch.cat([fg, bg])
        truth = torch.cat([torch.ones(len(fg)), torch.zeros(len(bg))])
        cost = F.binary_cross_entropy_with_logits(rpn_logits[i][sampled], truth, reduction="sum")
        error = rpn_deltas[i][fg] - encoded(boxes[index_fg], at[fg], (1.0, 1.0, 1.0, 1.0))
        rows.append(torch.stack([cost, error.abs().sum()]) / shape["rpn_samples"])
    y = pooled(maps, shape, rois, 7)
    for i in range(shape["box_convs"]):
        name = f"roi_heads.box_head.conv{i + 1}"
        y = F.relu(channel_norm(p, f"{name}.norm", conv(p, name, y, 1)))
    y = F.relu(linear(p, "roi_heads.box_head.fc1", y.flatten(1)))
    sizes = [len(r) for r in rois]
    scores = linear(p, "roi_heads.box_predictor.cls_score", y).split(sizes)
    moves = linear(p, "roi_heads.box_predictor.bbox_pred", y).view(-1, total, 4).split(sizes)
    foreground = [len(g) for g in goals]
    front = [r[:n] for r, n in zip(rois, foreground, strict=True)]
    y = pooled(maps, shape, front, 14)
    for i in range(shape["mask_convs"]):
        name = f"roi_heads.mask_head.mask_fcn{i + 1}"
        y = F.relu(channel_norm(p, f"{name}.norm", conv(p, name, y, 1)))
    y = F.relu(deconv(p, "roi_heads.mask_head.deconv", y))
    shown = conv(p, "roi_heads.mask_head.predictor", y).split(foreground)
    out = []
    for i, n in enumerate(foreground):
        cls = F.cross_entropy(scores[i], classes[i])
        kind = classes[i][:n]
        error = moves[i][torch.arange(n), kind] - encoded(
            goals[i], front[i], (10.0, 10.0, 5.0, 5.0)
        )
        mask = shown[i].sum() * 0
        if n:
            mask = F.binary_cross_entropy_with_logits(
                shown[i][torch.arange(n), kind], framed_targets(masks[i], goals[i], front[i], 28)
            )
        out.append(torch.cat([rows[i], torch.stack([cls, error.abs().sum() / len(rois[i]), mask])]))
    return torch.stack(out)


def optimiser(p: Params, rate: float, groups: dict[str, tuple[float, float]]) -> Any:
    """AdamW with the factor of the rate and the weight decay of each parameter."""
    made: dict[tuple[float, float], list[torch.Tensor]] = {}
    for name, value in p.items():
        made.setdefault(groups[name], []).append(value)
    return torch.optim.AdamW(
        [{"params": v, "lr": rate * k[0], "weight_decay": k[1]} for k, v in made.items()],
        lr=rate,
        fused=True,
    )


def leaves(arrays: dict[str, np.ndarray]) -> Params:
    return {k: torch.from_numpy(v.copy()).requires_grad_() for k, v in arrays.items()}


def _check() -> None:
    from tests.bench import upernet_torch

    folder = pathlib.Path(__file__).parents[1] / "data" / "dense"
    tiny = {
        "patch": 16,
        "depth": 4,
        "heads": 2,
        "window": 3,
        "global": (1, 3),
        "strides": (4, 8, 16, 32, 64),
        "anchor_sizes": (8, 16, 32, 64, 96),
        "anchor_ratios": (0.5, 1.0, 2.0),
        "canonical": (32, 16),
        "proposals": (16, 32),
        "rpn_samples": 4092,
        "rois": 37,
        "roi_foreground": 0.5,
        "box_convs": 2,
        "mask_convs": 2,
        "classes": 3,
    }
    for name in ("vitdet", "upernet"):
        start, steps = (dict(np.load(folder / f"{name}{end}.npz")) for end in ("", "_steps"))
        state = {k[6:]: v for k, v in start.items() if k.startswith("state/")}
        batch = {k: torch.from_numpy(v) for k, v in start.items() if not k.startswith("state/")}
        groups = {k[6:]: tuple(v.tolist()) for k, v in steps.items() if k.startswith("group/")}
        p = leaves({k: state[k] for k in groups})
        step = optimiser(p, float(steps["rate"]), groups)
        if name == "upernet":
            shape = {
                "patch": 16,
                "grid": 6,
                "depth": 4,
                "heads": 2,
                "blocks": (0, 1, 2, 3),
                "pool_scales": (1, 2, 3, 6),
            }
            rest = {k: torch.from_numpy(v) for k, v in state.items() if k not in groups}
            net = upernet_torch.UperNet(p, rest, shape)
        for number in range(8):
            losses = net.losses(batch) if name == "upernet" else mask_rcnn_losses(p, batch, tiny)
            error = (losses.detach() - torch.from_numpy(steps["losses"][number])).abs().max()
            print(f"{name}, step {number}: largest difference of a loss {error:.1e}")
            step.zero_grad()
            (losses.sum() / (1 if name == "upernet" else len(losses))).backward()
            step.step()


if __name__ == "__main__":
    _check()
