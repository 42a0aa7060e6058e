"""Layouts in which other projects store vision transformers: one table a layout, which maps their
arrays to ours and back. Numbered layers and our stacked layer axis are converted in `vit_weights`.

A tree is flat here: {path: array}, such as `encoder/blocks/attention/qkv/kernel` [L, D, 3 D]. Two
paths are no parameters of our models but arrays that a file may have: `encoder/positions` [1, R, D]
is its position table, with or without a row for cls, and `encoder/blocks/scale1`, `scale2` [L, D]
are LayerScale, which is multiplied into the preceding matrix. Layouts of dense tasks (detectron2,
mmseg) have what `models.vit_maps` adds: `encoder/blocks/gamma1`, `gamma2`, layer scale that is
kept, and tables of relative positions, an array a block, since their sizes differ.

L blocks, D width, h heads, p pixels a patch.

The layouts in `MODERN` are those in which Transformers stores the encoders that later methods take
as teachers: DINOv2 with and without registers, DINOv3, and the image towers of SigLIP and SigLIP 2.
There layer scale is kept as `encoder/blocks/gamma1` and `gamma2`. The pooling head of SigLIP and
mask tokens have no counterpart here.
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from m3i_jax.interop.layout_entries import (
    HALVES,
    IMAGENET,
    Layout,
    LayoutEntry,
    flat_table,
    joined_qkv,
    linear_weight,
    norm_weights,
    patch_side,
    patch_weight,
    query_value_bias,
    require_rgb_patches,
    single_array,
)

_OURS = "encoder/blocks"


def timm_blocks(theirs: str, ours: str, *, norms: str = "norm{n}.") -> list[LayoutEntry]:
    entries: list[LayoutEntry] = []
    for n in (1, 2):
        entries += norm_weights(f"{theirs}.{{l}}.{norms.format(n=n)}", f"{ours}/norm{n}")
        entries += linear_weight(f"{theirs}.{{l}}.mlp.fc{n}", f"{ours}/mlp/fc{n}")
    entries += linear_weight(f"{theirs}.{{l}}.attn.qkv", f"{ours}/attention/qkv")
    return entries + linear_weight(f"{theirs}.{{l}}.attn.proj", f"{ours}/attention/out")


def timm_encoder() -> list[LayoutEntry]:
    """Returns the encoder of timm, MAE and SiameseIM: qkv is one matrix with rows [q | k | v], in
    the order of our columns."""
    entries = [
        *patch_weight("patch_embed.proj"),
        single_array("cls_token", "encoder/cls_token"),
        single_array("pos_embed", "encoder/positions", flat_table),
    ]
    entries += [
        *norm_weights("norm_pre.", "encoder/embedding_norm"),
        *timm_blocks("blocks", "encoder/blocks"),
        *norm_weights("norm.", "encoder/norm"),
    ]
    entries += [
        single_array(f"blocks.{{l}}.ls{n}.gamma", f"encoder/blocks/scale{n}") for n in (1, 2)
    ]
    for theirs in ("reg_token", "register_tokens"):  # timm; DINOv2's own files
        entries.append(single_array(theirs, "encoder/registers"))
    entries += linear_weight("blocks.{l}.mlp.gate", "encoder/blocks/mlp/gate")  # `plain_names`
    for n in ("q", "k"):
        ours = f"encoder/blocks/attention/norm_{n}"
        entries += norm_weights(f"blocks.{{l}}.attn.{n}_norm.", ours)
    return entries


def _detectron2() -> list[LayoutEntry]:
    """ViTDet's backbone: names of timm, without a final norm, and relative positions by row and
    column. The position table has a row for cls, which is not used."""
    return [
        *timm_encoder(),
        single_array("blocks.{l}.attn.rel_pos_h", "encoder/relative/block{l}/rows"),
        single_array("blocks.{l}.attn.rel_pos_w", "encoder/relative/block{l}/columns"),
    ]


def _mmseg() -> list[LayoutEntry]:
    """The ViT of mmsegmentation's BEiT and MAE. BEiT's keys have no bias."""
    block, ours = "layers.{l}", "encoder/blocks"
    entries = [
        *patch_weight("patch_embed.projection"),
        single_array("cls_token", "encoder/cls_token"),
        single_array("pos_embed", "encoder/positions"),
        *linear_weight(f"{block}.attn.qkv", f"{ours}/attention/qkv"),
        query_value_bias(
            (f"{block}.attn.q_bias", f"{block}.attn.v_bias"), f"{ours}/attention/qkv/bias"
        ),
        *linear_weight(f"{block}.attn.proj", f"{ours}/attention/out"),
        *linear_weight(f"{block}.ffn.layers.0.0", f"{ours}/mlp/fc1"),
        *linear_weight(f"{block}.ffn.layers.1", f"{ours}/mlp/fc2"),
        single_array(
            f"{block}.attn.relative_position_bias_table", "encoder/relative/block{l}/table"
        ),
        *norm_weights("ln1.", "encoder/norm"),
    ]
    for n in (1, 2):
        entries += norm_weights(f"{block}.ln{n}.", f"{ours}/norm{n}")
        entries.append(single_array(f"{block}.gamma_{n}", f"{ours}/gamma{n}"))
    return entries


def _siamese_im() -> list[LayoutEntry]:
    entries = [
        *timm_encoder(),
        *linear_weight("decoder_embed", "decoder/embed"),
        single_array("mask_token", "decoder/mask_token"),
    ]
    entries += [
        *linear_weight("decoder_pos_mlp", "decoder/position_map"),
        *linear_weight("decoder_pred", "decoder/head"),
    ]
    for theirs, ours in (
        ("projector_decoder_blocks", "decoder/projector"),
        ("predictor_decoder_blocks", "decoder/blocks"),
    ):
        entries += timm_blocks(theirs, ours, norms="norm{n}.bn.")
        # with --use_proj_ln
        entries += [
            entry
            for n in (1, 2)
            for entry in norm_weights(f"{theirs}.{{l}}.norm{n}.", f"{ours}/norm{n}")
        ]
    return entries


def _hugging_face() -> list[LayoutEntry]:
    block, ours = "encoder.layer.{l}", "encoder/blocks"
    return [
        *patch_weight("embeddings.patch_embeddings.projection"),
        single_array("embeddings.cls_token", "encoder/cls_token"),
        single_array("embeddings.position_embeddings", "encoder/positions"),
        *norm_weights(f"{block}.layernorm_before.", f"{ours}/norm1"),
        *norm_weights(f"{block}.layernorm_after.", f"{ours}/norm2"),
        *joined_qkv(
            (
                f"{block}.attention.attention.query",
                f"{block}.attention.attention.key",
                f"{block}.attention.attention.value",
            ),
            f"{ours}/attention/qkv",
        ),
        *linear_weight(f"{block}.attention.output.dense", f"{ours}/attention/out"),
        *linear_weight(f"{block}.intermediate.dense", f"{ours}/mlp/fc1"),
        *linear_weight(f"{block}.output.dense", f"{ours}/mlp/fc2"),
        *norm_weights("layernorm.", "encoder/norm"),
    ]


def _clip() -> list[LayoutEntry]:
    block, ours = "encoder.layers.{l}", "encoder/blocks"
    return [
        *patch_weight("embeddings.patch_embedding", bias=False),
        single_array(
            "embeddings.class_embedding",
            "encoder/cls_token",
            lambda a: a[None, None],
            lambda a: a[0, 0],
        ),
        single_array(
            "embeddings.position_embedding.weight",
            "encoder/positions",
            lambda a: a[None],
            lambda a: a[0],
        ),
        *norm_weights("pre_layrnorm.", "encoder/embedding_norm"),
        *norm_weights(f"{block}.layer_norm1.", f"{ours}/norm1"),
        *norm_weights(f"{block}.layer_norm2.", f"{ours}/norm2"),
        *joined_qkv(tuple(f"{block}.self_attn.{n}_proj" for n in "qkv"), f"{ours}/attention/qkv"),  # type: ignore[arg-type]
        *linear_weight(f"{block}.self_attn.out_proj", f"{ours}/attention/out"),
        *linear_weight(f"{block}.mlp.fc1", f"{ours}/mlp/fc1"),
        *linear_weight(f"{block}.mlp.fc2", f"{ours}/mlp/fc2"),
        *norm_weights("post_layernorm.", "encoder/norm"),
    ]


def _google() -> list[LayoutEntry]:
    """Flax layouts: matrices as ours, but with a separate axis for heads, and the patch embedding
    as a convolution [p, p, 3, D]."""
    block, ours = "Transformer/encoderblock_{l}", "encoder/blocks"
    attention = f"{block}/MultiHeadDotProductAttention_1"
    kernels, biases = (
        tuple(f"{attention}/{n}/{part}" for n in ("query", "key", "value"))
        for part in ("kernel", "bias")
    )

    def split_heads(a: np.ndarray, heads: int) -> tuple[np.ndarray, ...]:
        return tuple(part.reshape(*part.shape[:-1], heads, -1) for part in np.split(a, 3, -1))

    def linear(theirs: str, ours: str) -> list[LayoutEntry]:
        return [single_array(f"{theirs}/{part}", f"{ours}/{part}") for part in ("kernel", "bias")]

    def kernel_to_matrix(a: np.ndarray) -> np.ndarray:
        require_rgb_patches(a.shape, a.shape[2], *a.shape[:2])
        return a.reshape(-1, a.shape[-1])

    def matrix_to_kernel(a: np.ndarray, heads: int) -> tuple[np.ndarray]:
        side = patch_side(a)
        return (a.reshape(side, side, 3, -1),)

    return [
        LayoutEntry(
            ("embedding/kernel",),
            "encoder/patch_embed/kernel",
            kernel_to_matrix,
            matrix_to_kernel,
        ),
        single_array("embedding/bias", "encoder/patch_embed/bias"),
        single_array("cls", "encoder/cls_token"),
        single_array("Transformer/posembed_input/pos_embedding", "encoder/positions"),
        *norm_weights(f"{block}/LayerNorm_0/", f"{ours}/norm1", ("scale", "bias")),
        *norm_weights(f"{block}/LayerNorm_2/", f"{ours}/norm2", ("scale", "bias")),
        LayoutEntry(
            kernels,
            f"{ours}/attention/qkv/kernel",
            lambda *a: np.concatenate([x.reshape(len(x), -1) for x in a], -1),
            split_heads,
        ),
        LayoutEntry(
            biases,
            f"{ours}/attention/qkv/bias",
            lambda *a: np.concatenate([x.reshape(-1) for x in a]),
            split_heads,
        ),
        LayoutEntry(
            (f"{attention}/out/kernel",),
            f"{ours}/attention/out/kernel",
            lambda a: a.reshape(-1, a.shape[-1]),
            lambda a, heads: (a.reshape(heads, -1, a.shape[-1]),),
        ),
        single_array(f"{attention}/out/bias", f"{ours}/attention/out/bias"),
        *linear(f"{block}/MlpBlock_3/Dense_0", f"{ours}/mlp/fc1"),
        *linear(f"{block}/MlpBlock_3/Dense_1", f"{ours}/mlp/fc2"),
        *norm_weights("Transformer/encoder_norm/", "encoder/norm", ("scale", "bias")),
    ]


_CLIP_PIXELS = {
    "mean": (0.48145466, 0.4578275, 0.40821073),
    "std": (0.26862954, 0.26130258, 0.27577711),
}
_USUAL = {"activation": "gelu", "norm_eps": 1e-6}
_HEADS = {r"^(head|fc_norm|head_dist|pre_logits)\b": "classifier"}
_MAE_DECODER = {r"^(mask_token|decoder_)": "pixel decoder"}


def _scales(block: str) -> list[LayoutEntry]:
    return [single_array(f"{block}.layer_scale{n}.lambda1", f"{_OURS}/gamma{n}") for n in (1, 2)]


def _dinov2() -> list[LayoutEntry]:
    """Registers come after cls and have no position. With SwiGLU `plain_names` splits `weights_in`
    into gate and value."""
    block = "encoder.layer.{l}"
    attention = f"{block}.attention.attention"
    return [
        *patch_weight("embeddings.patch_embeddings.projection"),
        single_array("embeddings.cls_token", "encoder/cls_token"),
        single_array("embeddings.register_tokens", "encoder/registers"),
        single_array("embeddings.position_embeddings", "encoder/positions"),
        *norm_weights(f"{block}.norm1.", f"{_OURS}/norm1"),
        *norm_weights(f"{block}.norm2.", f"{_OURS}/norm2"),
        *joined_qkv(
            (f"{attention}.query", f"{attention}.key", f"{attention}.value"),
            f"{_OURS}/attention/qkv",
        ),
        *linear_weight(f"{block}.attention.output.dense", f"{_OURS}/attention/out"),
        *linear_weight(f"{block}.mlp.fc1", f"{_OURS}/mlp/fc1"),
        *linear_weight(f"{block}.mlp.fc2", f"{_OURS}/mlp/fc2"),
        *linear_weight(f"{block}.mlp.gate", f"{_OURS}/mlp/gate"),
        *_scales(block),
        *norm_weights("layernorm.", "encoder/norm"),
    ]


def _dinov3() -> list[LayoutEntry]:
    """Keys have no bias, and the 7B model has none of queries and values either."""
    block = "layer.{l}"
    attention = f"{block}.attention"
    kernel = joined_qkv(
        (f"{attention}.q_proj", f"{attention}.k_proj", f"{attention}.v_proj"),
        f"{_OURS}/attention/qkv",
    )[0]
    return [
        *patch_weight("embeddings.patch_embeddings"),
        single_array("embeddings.cls_token", "encoder/cls_token"),
        single_array("embeddings.register_tokens", "encoder/registers"),
        *norm_weights(f"{block}.norm1.", f"{_OURS}/norm1"),
        *norm_weights(f"{block}.norm2.", f"{_OURS}/norm2"),
        kernel,
        query_value_bias(
            (f"{attention}.q_proj.bias", f"{attention}.v_proj.bias"), f"{_OURS}/attention/qkv/bias"
        ),
        *linear_weight(f"{attention}.o_proj", f"{_OURS}/attention/out"),
        *linear_weight(f"{block}.mlp.up_proj", f"{_OURS}/mlp/fc1"),
        *linear_weight(f"{block}.mlp.down_proj", f"{_OURS}/mlp/fc2"),
        *linear_weight(f"{block}.mlp.gate_proj", f"{_OURS}/mlp/gate"),
        *_scales(block),
        *norm_weights("norm.", "encoder/norm"),
    ]


def _siglip() -> list[LayoutEntry]:
    block = "encoder.layers.{l}"
    q, k, v = (f"{block}.self_attn.{n}_proj" for n in "qkv")
    return [
        *patch_weight("embeddings.patch_embedding"),
        single_array(
            "embeddings.position_embedding.weight",
            "encoder/positions",
            lambda a: a[None],
            lambda a: a[0],
        ),
        *norm_weights(f"{block}.layer_norm1.", f"{_OURS}/norm1"),
        *norm_weights(f"{block}.layer_norm2.", f"{_OURS}/norm2"),
        *joined_qkv((q, k, v), f"{_OURS}/attention/qkv"),
        *linear_weight(f"{block}.self_attn.out_proj", f"{_OURS}/attention/out"),
        *linear_weight(f"{block}.mlp.fc1", f"{_OURS}/mlp/fc1"),
        *linear_weight(f"{block}.mlp.fc2", f"{_OURS}/mlp/fc2"),
        *norm_weights("post_layernorm.", "encoder/norm"),
    ]


MODERN = (
    Layout(
        name="dinov2",
        known_by=r"(^|\.)encoder\.layer\.0\.layer_scale1\.lambda1$",
        table=tuple(_dinov2()),
        prefix=r"^(dinov2|dinov2_with_registers)\.",
        unused={r"^classifier\b": "classifier", r"mask_token$": "mask token"},
        settings={"activation": "gelu", "norm_eps": 1e-6, **IMAGENET},
        resizes=True,
    ),
    Layout(
        name="dinov3",
        known_by=r"(^|\.)layer\.0\.attention\.o_proj\.weight$",
        table=tuple(_dinov3()),
        prefix=r"^(dinov3_vit|model|backbone)\.(model\.)?",
        unused={r"mask_token$": "mask token", r"inv_freq$": "periods"},
        settings={
            "activation": "gelu",
            "norm_eps": 1e-5,
            "positions": "rope",
            **IMAGENET,
        },
    ),
    Layout(
        name="siglip",
        known_by=r"(^|\.)embeddings\.patch_embedding\.bias$",
        table=tuple(_siglip()),
        prefix=r"^vision_model\.",
        unused={
            r"^(text_model|logit_scale|logit_bias)\b": "text tower",
            r"^head\.": "pooling head",
            r"position_ids$": "numbers",
        },
        settings={"activation": "gelu_tanh", "norm_eps": 1e-6, **HALVES},
    ),
)

# from the most specific to the most general
LAYOUTS: dict[str, Layout] = {
    layout.name: layout
    for layout in (
        *MODERN,
        Layout(
            name="detectron2",
            known_by=r"^backbone\.net\.blocks\.0\.|^(net\.)?blocks\.0\.attn\.rel_pos_h$",
            table=tuple(_detectron2()),
            prefix=r"^(backbone\.)?net\.",
            unused={
                r"^backbone\.simfp_": "feature pyramid",
                r"^(proposal_generator|roi_heads)\.": "heads",
                r"^pixel_(mean|std)$": "pixel statistics",
            },
            settings={**_USUAL, **IMAGENET},
        ),
        Layout(
            name="mmseg",
            known_by=r"(^|\.)layers\.0\.ffn\.layers\.0\.0\.weight$",
            table=tuple(_mmseg()),
            prefix=r"^backbone\.",
            unused={
                r"^(neck|decode_head|auxiliary_head)\.": "neck and heads",
                r"relative_position_index$": "numbers",
            },
            settings={**_USUAL, **IMAGENET},
        ),
        Layout(
            name="siamese_im",
            known_by=r"^predictor_decoder_blocks\.0\.",
            table=tuple(_siamese_im()),
            unused={
                r"^decoder_pos_embed$": "fixed table",
                r"\.bn\.(running_|num_batches)": "running statistics",
                **_HEADS,
            },
            settings={**_USUAL, **IMAGENET},
            momentum="mm_",
        ),
        Layout(
            name="mae",
            known_by=r"^decoder_blocks\.0\.",
            table=tuple(timm_encoder()),
            unused={**_MAE_DECODER, **_HEADS},
            settings={**_USUAL, **IMAGENET},
        ),
        Layout(
            name="timm",
            known_by=r"^blocks\.0\.attn\.qkv\.weight$",
            table=tuple(timm_encoder()),
            unused={
                **_HEADS,
                **_MAE_DECODER,
                r"^attn_pool\.": "pooling head",
                r"^local_cls_norm\.": "norm of small views",
            },
            settings={**_USUAL, **IMAGENET},
        ),
        Layout(
            name="hf",
            known_by=r"encoder\.layer\.0\.layernorm_before\.weight$",
            table=tuple(_hugging_face()),
            prefix=r"^(vit|deit)\.",
            unused={
                r"^(classifier|pooler)\b": "classifier and pooler",
                r"^decoder\.": "pixel decoder",
                r"mask_token$": "mask token",
            },
            settings={"activation": "gelu", "norm_eps": 1e-12, **HALVES},
        ),
        Layout(
            name="clip",
            known_by=r"encoder\.layers\.0\.self_attn\.q_proj\.weight$",
            table=tuple(_clip()),
            prefix=r"^vision_model\.",
            unused={
                r"^(text_model|text_projection|visual_projection|logit_scale)\b": (
                    "text tower and projections"
                ),
                r"position_ids$": "numbers",
            },
            settings={"activation": "quick_gelu", "norm_eps": 1e-5, **_CLIP_PIXELS},
            patch_bias=False,
        ),
        Layout(
            name="google",
            known_by=r"^Transformer/encoderblock_0/",
            table=tuple(_google()),
            unused={r"^(head|pre_logits)/": "classifier"},
            settings={"activation": "gelu_tanh", "norm_eps": 1e-6, **HALVES},
        ),
    )
}


def layout_of(names: Mapping[str, Any]) -> Layout | None:
    """Returns the layout of a file with these array names, or None.

    >>> layout_of({"blocks.0.attn.qkv.weight": 0}).name, layout_of({"fc.weight": 0})
    ('timm', None)
    """
    return next(
        (
            layout
            for layout in LAYOUTS.values()
            if any(re.search(layout.known_by, name) for name in names)
        ),
        None,
    )
