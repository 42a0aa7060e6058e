"""How Transformers stores the encoders that later methods take as teachers: DINOv2 with and without
registers, DINOv3, and the image towers of SigLIP and SigLIP 2. See `vit_layouts`.

Layer scale is kept as `encoder/blocks/gamma1` and `gamma2`. The pooling head of SigLIP and mask
tokens have no counterpart here.
"""

from m3i_jax.interop.layout_entries import (
    HALVES,
    IMAGENET,
    Layout,
    LayoutEntry,
    joined_qkv,
    linear_weight,
    norm_weights,
    patch_weight,
    query_value_bias,
    single_array,
)

_OURS = "encoder/blocks"


def _scales(block: str) -> list[LayoutEntry]:
    return [single_array(f"{block}.layer_scale{n}.lambda1", f"{_OURS}/gamma{n}") for n in (1, 2)]


def _dinov2() -> list[LayoutEntry]:
    """Registers come after cls and have no position. With SwiGLU `vit_names` takes `weights_in`
    apart into gate and value."""
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
