"""Writes tests/data/dense/published_dense.npz: what small detectors and segmenters predict whose
weights have the names of InternImage's published ones.

    git clone https://github.com/IDEA-Research/DINO && git -C DINO checkout faa8520
    PYTHONPATH=. python tests/data/make_published_dense.py DINO

The encoder is that of tests/bench/intern_image_torch.py; the heads are DINO of its authors, and
UperNet and Mask2Former of transformers 5.24. Names are those of github.com/OpenGVLab/InternImage at
31c962d (its composite backbone, and the heads of its copies of mmdetection and mmsegmentation).
float64, torch 2.13. Parameters are `published_dense.parameter`, so that they need not be stored."""

import json
import pathlib
import re

import numpy as np
import torch
import torch.nn.functional as F
from transformers import Mask2FormerConfig, SwinConfig, UperNetConfig
from transformers.models.mask2former import modeling_mask2former
from transformers.models.upernet import modeling_upernet

from tests.bench.intern_image_torch import InternImage
from tests.data import make_dino
from tests.data import published_dense as case

ROOT = pathlib.Path(__file__).parent
CHANNELS = [case.NANO.width * 2**i for i in range(4)]
PIXELS, QUERIES = "decode_head.pixel_decoder.", "decode_head.transformer_decoder."
BOXES = "bbox_head.transformer."
RULES = {
    "dino": (
        (r"input_proj\.([012])\.0\.", r"neck.convs.\1.conv."),
        (r"input_proj\.([012])\.1\.", r"neck.convs.\1.gn."),
        (r"input_proj\.3\.0\.", "neck.extra_convs.0.conv."),
        (r"input_proj\.3\.1\.", "neck.extra_convs.0.gn."),
        (r"(transformer\.decoder\.)?class_embed\.", "bbox_head.cls_branches."),
        (r"(transformer\.decoder\.)?bbox_embed\.(\d)\.layers\.", r"bbox_head.reg_branches.\2.L"),
        (r"transformer\.enc_out_class_embed\.", f"bbox_head.cls_branches.{case.DEPTH}."),
        (r"transformer\.enc_out_bbox_embed\.layers\.", f"bbox_head.reg_branches.{case.DEPTH}.L"),
        (r"transformer\.level_embed", BOXES + r"level_embeds"),
        (r"transformer\.tgt_embed", BOXES + r"query_embed"),
        (r"transformer\.decoder\.ref_point_head\.layers\.", BOXES + r"decoder.ref_point_head.L"),
        (r"transformer\.(encoder\.layers\.\d)\.self_attn", BOXES + r"\1.attentions.0"),
        (r"transformer\.(encoder\.layers\.\d)\.norm1", BOXES + r"\1.norms.0"),
        (r"transformer\.(encoder\.layers\.\d)\.norm2", BOXES + r"\1.norms.1"),
        (r"transformer\.(decoder\.layers\.\d)\.self_attn", BOXES + r"\1.attentions.0.attn"),
        (r"transformer\.(decoder\.layers\.\d)\.cross_attn", BOXES + r"\1.attentions.1"),
        (r"transformer\.(decoder\.layers\.\d)\.norm2", BOXES + r"\1.norms.0"),
        (r"transformer\.(decoder\.layers\.\d)\.norm1", BOXES + r"\1.norms.1"),
        (r"transformer\.(decoder\.layers\.\d)\.norm3", BOXES + r"\1.norms.2"),
        (r"transformer\.(.*)\.linear1", BOXES + r"\1.ffns.0.layers.0.0"),
        (r"transformer\.(.*)\.linear2", BOXES + r"\1.ffns.0.layers.1"),
        (r"label_enc", "bbox_head.label_embedding"),
        (r"transformer\.", BOXES),
    ),
    "upernet": (
        (r"(.*)\.batch_norm\.", r"decode_head.\1.bn."),
        (r"classifier\.", "decode_head.conv_seg."),
        (r"", "decode_head."),
    ),
    "mask2former": (
        (r"P\.input_projections\.(\d)\.0", PIXELS + r"input_convs.\1.conv"),
        (r"P\.input_projections\.(\d)\.1", PIXELS + r"input_convs.\1.gn"),
        (r"P\.(.*)\.self_attn\.", PIXELS + r"\1.attentions.0."),
        (r"P\.(.*)\.fc1", PIXELS + r"\1.ffns.0.layers.0.0"),
        (r"P\.(.*)\.fc2", PIXELS + r"\1.ffns.0.layers.1"),
        (r"P\.(.*)\.self_attn_layer_norm", PIXELS + r"\1.norms.0"),
        (r"P\.(.*)\.final_layer_norm", PIXELS + r"\1.norms.1"),
        (r"P\.level_embed", PIXELS + r"level_encoding.weight"),
        (r"P\.adapter_1\.0", PIXELS + r"lateral_convs.0.conv"),
        (r"P\.adapter_1\.1", PIXELS + r"lateral_convs.0.gn"),
        (r"P\.layer_1\.0", PIXELS + r"output_convs.0.conv"),
        (r"P\.layer_1\.1", PIXELS + r"output_convs.0.gn"),
        (r"P\.mask_projection", PIXELS + r"mask_feature"),
        (r"Q\.decoder\.(layers\.\d)\.cross_attn\.", QUERIES + r"\1.attentions.0.attn."),
        (r"Q\.decoder\.(layers\.\d)\.self_attn\.", QUERIES + r"\1.attentions.1.attn."),
        (r"Q\.decoder\.(layers\.\d)\.fc1", QUERIES + r"\1.ffns.0.layers.0.0"),
        (r"Q\.decoder\.(layers\.\d)\.fc2", QUERIES + r"\1.ffns.0.layers.1"),
        (r"Q\.decoder\.(layers\.\d)\.cross_attn_layer_norm", QUERIES + r"\1.norms.0"),
        (r"Q\.decoder\.(layers\.\d)\.self_attn_layer_norm", QUERIES + r"\1.norms.1"),
        (r"Q\.decoder\.(layers\.\d)\.final_layer_norm", QUERIES + r"\1.norms.2"),
        (r"Q\.decoder\.layernorm", QUERIES + r"post_norm"),
        (r"Q\.queries_embedder", "decode_head.query_embed"),
        (r"Q\.queries_features", "decode_head.query_feat"),
        (r"Q\.level_embed", "decode_head.level_embed"),
        (r"Q\.decoder\.mask_predictor\.mask_embedder\.(\d)\.0", r"decode_head.mask_embed.L\1"),
        (r"C\.", "decode_head.cls_embed."),
    ),
}  # fmt: skip


def published(name: str, kind: str) -> str:
    """The published name; a numbered layer of an MLP counts its activations, too."""
    for theirs, ours in RULES[kind]:
        if re.match(theirs, name):
            name = re.sub(f"^{theirs}", ours, name)
            return re.sub(r"\.L(\d)", lambda match: f".{2 * int(match[1])}", name)
    raise ValueError(name)


def fill(module: torch.nn.Module, kind: str, prefix: str = "") -> dict[str, tuple[int, ...]]:
    """Sets the parameters and running statistics, and gives the shapes by published names."""
    shapes = {}
    for own, value in module.state_dict(keep_vars=True).items():
        if own.endswith("num_batches_tracked"):
            continue
        name = published(own, kind) if kind in RULES else prefix + own
        shape = tuple(value.shape)
        if name == "bbox_head.label_embedding.weight":
            shape = (case.CLASSES, shape[1])  # the authors' has a row of no class
        if name.startswith("neck.") and name.endswith("conv.bias"):
            value.data.zero_()
            continue
        if kind == "mask2former" and (match := re.match(r"(.*\.attn)\.([qkv])_proj\.(.*)", name)):
            whole = f"{match[1]}.in_proj_{match[3]}"
            shapes[whole] = (3 * shape[0], *shape[1:])
            part = np.split(case.parameter(whole, shapes[whole]), 3)["qkv".index(match[2])]
        else:
            shapes[name] = shape
            part = case.parameter(name, shape)
        value.data[: len(part)] = torch.from_numpy(part)
    return shapes


def normalised() -> torch.Tensor:
    x = torch.from_numpy(case.images()).double() / 255
    x = (x - torch.tensor(case.MEAN)) / torch.tensor(case.STD)
    for row, (h, w) in zip(x, case.SIZES.tolist(), strict=True):
        row[h:] = 0
        row[:, w:] = 0
    return x.permute(0, 3, 1, 2)


def encoder(kind: str):
    """(maps [B, C, H, W], shapes by name) of one encoder, or of two composed copies."""
    net, first = case.NANO, InternImage(case.NANO).double()
    if kind != "composite":
        shapes = fill(first, "", "backbone.")
        with torch.no_grad():
            return [x.permute(0, 3, 1, 2) for x in first(normalised())], shapes
    second = InternImage(net).double()
    shapes = fill(first, "", "backbone.cb_modules.0.")
    more = fill(second, "", "backbone.cb_modules.1.")
    shapes |= {k: v for k, v in more.items() if "patch_embed" not in k}

    def array(name, *shape):
        shapes[name] = shape
        return torch.from_numpy(case.parameter(name, shape))

    with torch.no_grad():
        start = x = first.patch_embed(normalised())
        fed, made = [], []
        for level in first.levels:
            features, x = level(x)
            fed.append(features.permute(0, 3, 1, 2))
        x = start
        for i, level in enumerate(second.levels):
            total = fed[i]
            for j in range(i + 1, 4):
                name = f"backbone.cb_linears.{i}.{j - i}"
                weight = array(f"{name}.weight", CHANNELS[i], CHANNELS[j], 1, 1)
                deeper = F.conv2d(fed[j], weight, array(f"{name}.bias", CHANNELS[i]))
                total = total + F.interpolate(deeper, size=fed[i].shape[2:], mode="nearest")
            gamma = array(f"backbone.cb_modules.1.gamma{i}", CHANNELS[i])
            features, x = level(x + gamma * total.permute(0, 2, 3, 1))
            made.append(features.permute(0, 3, 1, 2))
    return made, shapes


def dino(maps, shapes):
    model = make_dino.build(
        case.WIDTH, case.CLASSES, channels=CHANNELS[1:], levels=4, num_queries=case.QUERIES,
        heads=case.HEADS, depth=case.DEPTH, hidden=case.HIDDEN, points=4, share=False,
    ).double()  # fmt: skip
    shapes |= fill(model, "dino")
    model.eval()
    mask = torch.ones(2, case.SIDE, case.SIDE, dtype=torch.bool)
    for row, (h, w) in zip(mask, case.SIZES.tolist(), strict=True):
        row[:h, :w] = False
    out = {}
    for i in range(2):
        model.backbone.maps = [x[i : i + 1] for x in maps[1:]]
        samples = make_dino.NestedTensor(torch.zeros(1, 3, case.SIDE, case.SIDE), mask[i : i + 1])
        with torch.no_grad():
            made = model(samples)
        count = min(case.DETECTIONS, case.QUERIES * case.CLASSES)
        post = make_dino.reference.PostProcess(num_select=count)
        [found] = post(made, torch.tensor(case.SIZES[i : i + 1].tolist()))
        out |= {f"{i}/{name}": found[name].numpy() for name in ("boxes", "scores", "labels")}
    return out


def upernet(maps, shapes):
    config = UperNetConfig(
        hidden_size=24, pool_scales=[1, 2, 3, 6], num_labels=case.MAP_CLASSES, auxiliary_channels=8,
        auxiliary_num_convs=1, backbone_config={"model_type": "convnext"},
    )  # fmt: skip
    head = modeling_upernet.UperNetHead(config, CHANNELS).double().eval()
    shapes |= fill(head, "upernet")
    aux = modeling_upernet.UperNetFCNHead(config, CHANNELS).double()
    more = {f"auxiliary_head.{k}": tuple(v.shape) for k, v in aux.state_dict().items()}
    more = {
        k.replace("batch_norm", "bn").replace("classifier", "conv_seg"): v for k, v in more.items()
    }  # noqa: E501
    shapes |= {k: v for k, v in more.items() if not k.endswith("tracked")}
    with torch.no_grad():
        logits = head(maps)
        full = F.interpolate(logits, (case.SIDE, case.SIDE), mode="bilinear", align_corners=False)
    return {"logits": full.permute(0, 2, 3, 1)[:, ::4, ::4].numpy()}


def mask2former(maps, shapes):
    config = Mask2FormerConfig(
        backbone_config=SwinConfig(
            embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 1, 1], window_size=2,
            out_features=["stage1", "stage2", "stage3", "stage4"],
        ),
        feature_size=case.WIDTH, mask_feature_size=case.WIDTH, hidden_dim=case.WIDTH,
        num_attention_heads=case.HEADS, encoder_layers=2, encoder_feedforward_dim=32,
        decoder_layers=4, dim_feedforward=case.HIDDEN, num_queries=case.QUERIES,
        num_labels=case.MAP_CLASSES, dropout=0.0,
    )  # fmt: skip
    whole = torch.nn.Module()
    whole.P = modeling_mask2former.Mask2FormerPixelDecoder(config, feature_channels=CHANNELS)
    whole.Q = modeling_mask2former.Mask2FormerTransformerModule(case.WIDTH, config)
    whole.C = torch.nn.Linear(case.WIDTH, case.MAP_CLASSES + 1)
    whole = whole.double().eval()
    shapes |= fill(whole, "mask2former")
    with torch.no_grad():
        pixels = whole.P(maps)
        made = whole.Q(
            multi_scale_features=pixels.multi_scale_features, mask_features=pixels.mask_features
        )
        classes = whole.C(made.intermediate_hidden_states[-1].transpose(0, 1))
        masks = made.masks_queries_logits[-1].sigmoid()
        # InternImage's copy of mmsegmentation resizes the scores, Mask2Former's authors the masks
        scores = torch.einsum("bqk,bqhw->bkhw", classes.softmax(-1)[..., :-1], masks)
        scores = F.interpolate(scores, (case.SIDE, case.SIDE), mode="bilinear")
    return {"logits": scores.permute(0, 2, 3, 1)[:, ::4, ::4].numpy()}


def main() -> None:
    torch.set_default_dtype(torch.float64)
    out = {}
    for name, head, kind in (
        ("dino", dino, ""), ("composite", dino, "composite"), ("upernet", upernet, ""),
        ("mask2former", mask2former, ""),
    ):  # fmt: skip
        maps, shapes = encoder(kind)
        arrays = head(maps, shapes)
        if name == "composite":  # its neck is the only one of a list
            shapes = {re.sub(r"^neck\.", "neck.0.", k): v for k, v in shapes.items()}
        out |= {f"{name}/{key}": array for key, array in arrays.items()}
        out[f"{name}/shapes"] = np.array(json.dumps(shapes))
        print(name, len(shapes), {key: array.shape for key, array in arrays.items()})
    plain = {k: v.astype("f4") if v.dtype == np.float64 else v for k, v in out.items()}
    np.savez_compressed(ROOT / "dense" / "published_dense.npz", **plain)


if __name__ == "__main__":
    main()
