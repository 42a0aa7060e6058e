"""Makes mask2former.npz: predictions, losses and gradients of transformers' Mask2Former, in
float64, for random maps of an encoder, random weights and given points.

    python tests/data/make_mask2former.py tests/data/dense

Needs torch, scipy and transformers (5.24), which the tests do not. It says by how much choices
(cells of a mask, uncertain points, assignments) are clear, so that float32 must make the same."""

import pathlib
import sys

import numpy as np
import torch
from transformers import Mask2FormerConfig, SwinConfig
from transformers.models.mask2former import modeling_mask2former as theirs

TABLES = ("level_embed", "level_embed.weight", "queries_embedder.weight", "queries_features.weight")
STRIDES, CHANNELS, SIZE = (4, 8, 16, 32), (3, 4, 5, 6), (64, 96)
SEED = 4
WIDTH, QUERIES, CLASSES, POINTS, SLOTS = 64, 7, 5, 40, 5
CONFIG = Mask2FormerConfig(
    backbone_config=SwinConfig(
        embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 1, 1], window_size=2,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    ),
    feature_size=WIDTH, mask_feature_size=WIDTH, hidden_dim=WIDTH, num_attention_heads=4,
    encoder_layers=2, encoder_feedforward_dim=32, decoder_layers=5, dim_feedforward=48,
    num_queries=QUERIES, num_labels=CLASSES, train_num_points=POINTS, dropout=0.0,
)  # fmt: skip


class Head(torch.nn.Module):
    """Pixel decoder, transformer module and classifier, under the names of the whole model."""

    def __init__(self) -> None:
        super().__init__()
        self.model = torch.nn.Module()
        self.model.pixel_level_module = torch.nn.Module()
        decoder = theirs.Mask2FormerPixelDecoder(CONFIG, feature_channels=list(CHANNELS))
        self.model.pixel_level_module.decoder = decoder
        self.model.transformer_module = theirs.Mask2FormerTransformerModule(WIDTH, CONFIG)
        self.class_predictor = torch.nn.Linear(WIDTH, CLASSES + 1)

    def forward(self, maps):
        pixels = self.model.pixel_level_module.decoder(maps)
        made = self.model.transformer_module(
            multi_scale_features=pixels.multi_scale_features, mask_features=pixels.mask_features
        )
        states = made.intermediate_hidden_states
        classes = [self.class_predictor(x.transpose(0, 1)) for x in states]
        return pixels, classes, list(made.masks_queries_logits)


def randomize(head: Head, seed: int) -> None:
    """Values that float16 has, of about the size that training gives."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in head.named_parameters():
            drawn = torch.randn(value.shape, generator=generator)
            if value.ndim > 1 and not name.endswith(TABLES):
                drawn *= (value[0].numel()) ** -0.5
            elif name.endswith("weight") and value.ndim == 1:
                drawn = 1 + 0.2 * drawn
            elif value.ndim == 1:
                drawn *= 1.5 if "offsets" in name else 0.2
            value.copy_(drawn.half().float())


def class_map(r: np.random.Generator, classes: list[int]) -> np.ndarray:
    """Blobs of some classes, unlabelled elsewhere."""
    out = np.full(SIZE, 255)
    y, x = np.mgrid[: SIZE[0], : SIZE[1]]
    for k in classes:
        centre, side = r.uniform(0.2, 0.8, 2) * SIZE, r.uniform(12, 30, 2)
        out[(np.abs(y - centre[0]) < side[0]) & (np.abs(x - centre[1]) < side[1])] = k
    return out.astype(np.uint8)


def present(labels: np.ndarray) -> list[int]:
    counts = np.bincount(labels.ravel(), minlength=256)[:CLASSES]
    return [k for k in np.argsort(-counts, kind="stable").tolist() if counts[k]]


def margin_of_masks(masks) -> float:
    """How far the logits that decide what a query sees are from 0."""
    sizes = [(SIZE[0] // s, SIZE[1] // s) for s in STRIDES[:0:-1]]
    least = np.inf
    for i, logits in enumerate(masks[:-1]):
        small = torch.nn.functional.interpolate(logits, sizes[i % 3], mode="bilinear")
        least = min(least, float(small.detach().abs().min()))
    return least


def main(folder: str, seed: int) -> None:
    r = np.random.default_rng(seed)
    head = Head()
    randomize(head, seed)
    state = {f"state/{k}": v.detach().numpy().astype("f2") for k, v in head.named_parameters()}
    head = head.double()
    maps = [
        r.normal(size=(3, c, SIZE[0] // s, SIZE[1] // s)).astype("f2")
        for s, c in zip(STRIDES, CHANNELS, strict=True)
    ]
    labels = np.stack([class_map(r, [0, 3, 1, 4]), class_map(r, [2]), np.full(SIZE, 255)])
    labels = labels.astype(np.uint8)
    given = [torch.from_numpy(x).double().requires_grad_() for x in maps]
    pixels, classes, masks = head(given)
    print("margin of masks", margin_of_masks(masks))
    kept = [present(x) for x in labels]
    mask_labels = [
        torch.from_numpy(np.stack([x == k for k in ks]) if ks else np.zeros((0, *SIZE))).double()
        for x, ks in zip(labels, kept, strict=True)
    ]
    class_labels = [torch.tensor(ks, dtype=torch.int64) for ks in kept]

    # Points of every set, by true mask; the losses read them in another order.
    sets = len(masks)
    counts = (POINTS, 3 * POINTS, POINTS - int(0.75 * POINTS))
    shapes = ((sets, 3, POINTS, 2), (sets, 3, SLOTS, counts[1], 2), (sets, 3, SLOTS, counts[2], 2))
    match, candidates, fresh = (r.random(shape).astype("f4") for shape in shapes)
    query = np.full((sets, 3, SLOTS), -1)
    criterion = theirs.Mask2FormerLoss(CONFIG, {}).double()
    rows = np.zeros((sets, 3))
    gap, total = np.inf, 0
    for s in range(sets):
        queue = [match[s, b][None] for b in range(3)]

        def rand(*shape, device=None, queue=queue):
            out = queue.pop(0)
            assert out.shape == shape, (out.shape, shape)
            return torch.from_numpy(out).double()

        torch_rand, torch.rand = torch.rand, rand
        try:
            indices = criterion.matcher(masks[s], classes[s], mask_labels, class_labels)
            order = [(b, m) for b, (_, tgt) in enumerate(indices) for m in tgt.tolist()]
            for b, (src, tgt) in enumerate(indices):
                query[s, b, tgt.numpy()] = src.numpy()
            queue += [np.stack([x[s, b, m] for b, m in order]) for x in (candidates, fresh)]
            number = criterion.get_num_masks(class_labels, "cpu")
            losses = criterion.loss_masks(masks[s], mask_labels, indices, number)
            losses |= criterion.loss_labels(classes[s], class_labels, indices)
        finally:
            torch.rand = torch_rand
        names = ("loss_cross_entropy", "loss_mask", "loss_dice")
        rows[s] = [float(losses[name].detach()) for name in names]
        total = total + sum(w * losses[n] for w, n in zip((2, 5, 5), names, strict=True))
        src = torch.tensor([query[s, b, m] for b, m in order])
        logits = masks[s][torch.tensor([b for b, _ in order]), src][:, None]
        points = torch.from_numpy(np.stack([candidates[s, b, m] for b, m in order])).double()
        size = theirs.sample_point(logits, points, align_corners=False)[:, 0].abs().sort()[0]
        k = int(0.75 * POINTS)
        gap = min(gap, float((size[:, k] - size[:, k - 1]).min()))
    print("gap of uncertain points", gap)
    total.backward()
    full = torch.nn.functional.interpolate(masks[-1], SIZE, mode="bilinear", align_corners=False)
    scores = torch.einsum("bqk,bqhw->bkhw", classes[-1].softmax(-1)[..., :-1], full.sigmoid())
    arrays = {f"map/{i}": x for i, x in enumerate(maps)} | {"labels": labels}
    arrays |= {f"pixels/{i}": x for i, x in enumerate(pixels.multi_scale_features)}
    arrays |= {"features": pixels.mask_features[:, ::4]}
    arrays |= {"classes": torch.stack(classes), "masks": torch.stack(masks)}
    arrays |= {"scores": scores[:, :, ::8, ::8], "losses": rows, "query": query}
    arrays |= {"points/match": match, "points/candidates": candidates, "points/fresh": fresh}
    for name, value in head.named_parameters():
        flat = value.grad.flatten()
        arrays[f"gradient/{name}"] = flat[:: max(1, flat.numel() // 500)]
    for i, value in enumerate(given):
        arrays[f"gradient_map/{i}"] = value.grad
    plain = {k: v.detach().numpy() if isinstance(v, torch.Tensor) else v for k, v in arrays.items()}
    plain = {k: v.astype("f4") if v.dtype == np.float64 else v for k, v in plain.items()}
    np.savez_compressed(pathlib.Path(folder) / "mask2former.npz", **state, **plain)
    print(rows, query.tolist())


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else SEED)
