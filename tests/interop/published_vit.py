"""Names and shapes of vision transformers in the files of other projects, from their public
definitions (timm 1.0, MAE, SiameseIM, Transformers 4 and 5, Google's vision_transformer), and
random weights with them."""

import numpy as np

# {l} layer; in shapes D width, F = 4 D, T = 1 + N tokens, p patch, C classes, W decoder width, G =
# 4 W, P = 3 p p, h heads, d = D / h.
_BLOCK = """
{b}.norm1.weight D | {b}.norm1.bias D | {b}.attn.qkv.weight 3D,D | {b}.attn.qkv.bias 3D
{b}.attn.proj.weight D,D | {b}.attn.proj.bias D
{b}.norm2.weight D | {b}.norm2.bias D | {b}.mlp.fc1.weight F,D | {b}.mlp.fc1.bias F
{b}.mlp.fc2.weight D,F | {b}.mlp.fc2.bias D
"""
_STEM = (
    "cls_token 1,1,D | pos_embed 1,T,D | patch_embed.proj.weight D,3,p,p | patch_embed.proj.bias D"
)
_NORM = "norm.weight D | norm.bias D"


def _timm_block(name: str, width: str = "D", hidden: str = "F", bn: bool = False) -> str:
    text = _BLOCK.replace("{b}", name)
    if bn:
        text = text.replace("norm1.", "norm1.bn.").replace("norm2.", "norm2.bn.")
        text += "".join(f"| {name}.norm{n}.bn.{what} {shape}" for n in (1, 2) for what, shape in (
            ("running_mean", "D"), ("running_var", "D"), ("num_batches_tracked", "")))  # fmt: skip
    return text.replace("D", width).replace("F", hidden)


_HF_BLOCK = """
{b}.layernorm_before.weight D | {b}.layernorm_before.bias D | {b}.layernorm_after.weight D
{b}.layernorm_after.bias D
{b}.attention.attention.query.weight D,D | {b}.attention.attention.query.bias D
{b}.attention.attention.key.weight D,D
{b}.attention.attention.key.bias D | {b}.attention.attention.value.weight D,D
{b}.attention.attention.value.bias D
{b}.attention.output.dense.weight D,D | {b}.attention.output.dense.bias D
{b}.intermediate.dense.weight F,D | {b}.intermediate.dense.bias F | {b}.output.dense.weight D,F
{b}.output.dense.bias D
"""
_HF = """
embeddings.cls_token 1,1,D | embeddings.position_embeddings 1,T,D
embeddings.patch_embeddings.projection.weight D,3,p,p
embeddings.patch_embeddings.projection.bias D | layernorm.weight D | layernorm.bias D
""" + _HF_BLOCK.replace("{b}", "encoder.layer.{l}")
_CLIP = """
embeddings.class_embedding D | embeddings.patch_embedding.weight D,3,p,p
embeddings.position_embedding.weight T,D
pre_layrnorm.weight D | pre_layrnorm.bias D | post_layernorm.weight D | post_layernorm.bias D
{b}.layer_norm1.weight D | {b}.layer_norm1.bias D | {b}.layer_norm2.weight D
{b}.layer_norm2.bias D
{b}.self_attn.q_proj.weight D,D | {b}.self_attn.q_proj.bias D | {b}.self_attn.k_proj.weight D,D
{b}.self_attn.k_proj.bias D
{b}.self_attn.v_proj.weight D,D | {b}.self_attn.v_proj.bias D | {b}.self_attn.out_proj.weight D,D
{b}.self_attn.out_proj.bias D
{b}.mlp.fc1.weight F,D | {b}.mlp.fc1.bias F | {b}.mlp.fc2.weight D,F | {b}.mlp.fc2.bias D
""".replace("{b}", "encoder.layers.{l}")
_GOOGLE = """
cls 1,1,D | embedding/kernel p,p,3,D | embedding/bias D
Transformer/posembed_input/pos_embedding 1,T,D
Transformer/encoder_norm/scale D | Transformer/encoder_norm/bias D
{b}/LayerNorm_0/scale D | {b}/LayerNorm_0/bias D | {b}/LayerNorm_2/scale D | {b}/LayerNorm_2/bias D
{a}/query/kernel D,h,d | {a}/query/bias h,d | {a}/key/kernel D,h,d | {a}/key/bias h,d
{a}/value/kernel D,h,d | {a}/value/bias h,d
{a}/out/kernel h,d,D | {a}/out/bias D | {b}/MlpBlock_3/Dense_0/kernel D,F
{b}/MlpBlock_3/Dense_0/bias F
{b}/MlpBlock_3/Dense_1/kernel F,D | {b}/MlpBlock_3/Dense_1/bias D
"""
_GOOGLE = _GOOGLE.replace("{a}", "{b}/MultiHeadDotProductAttention_1").replace(
    "{b}", "Transformer/encoderblock_{l}"
)

# the arrays of the encoder, and other arrays in such files
ENCODERS = {
    "timm": f"{_STEM} | {_NORM} {_timm_block('blocks.{l}')}",
    "mae": f"{_STEM} | {_NORM} {_timm_block('blocks.{l}')}",
    "siamese_im": f"{_STEM} {_timm_block('blocks.{l}')}",
    "hf": _HF,
    "clip": _CLIP,
    "google": _GOOGLE,
}
OTHERS = {
    "timm": "head.weight C,D | head.bias C",
    "mae": (
        "mask_token 1,1,W | decoder_embed.weight W,D | decoder_embed.bias W | decoder_pos_embed"
        " 1,T,W | decoder_norm.weight W | decoder_norm.bias W | decoder_pred.weight P,W |"
        " decoder_pred.bias P" + _timm_block("decoder_blocks.{l}", "W", "G")
    ),
    "siamese_im": (
        "decoder_pos_embed 1,T,D | mm_cls_token 1,1,D | mm_mask_token 1,1,D |"
        " mm_patch_embed.proj.weight D,3,p,p | mm_patch_embed.proj.bias D | mm_decoder_embed.weight"
        " D,D | mm_decoder_embed.bias D"
        + _timm_block("mm_blocks.{l}")
        + _timm_block("mm_projector_decoder_blocks.{l}", bn=True)
    ),
    "hf": "pooler.dense.weight D,D | pooler.dense.bias D",
    "clip": "embeddings.position_ids 1,T",
    "google": "head/kernel D,C | head/bias C",
}
SIAMESE_DECODER = (
    "decoder_embed.weight D,D | decoder_embed.bias D | mask_token 1,1,D | decoder_pos_mlp.weight"
    " D,2D | decoder_pos_mlp.bias D | decoder_pred.weight D,D | decoder_pred.bias D"
    + _timm_block("projector_decoder_blocks.{l}", bn=True)
    + _timm_block("predictor_decoder_blocks.{l}", bn=True)
)


def shapes(
    text: str, *, width: int, depth: int, heads: int, patch: int, grid: int, classes: int = 10
) -> dict[str, tuple[int, ...]]:
    """{name: shape} of a table of names."""
    decoder = width // 2
    size = {
        "D": width,
        "F": 4 * width,
        "2D": 2 * width,
        "3D": 3 * width,
        "T": 1 + grid * grid,
        "p": patch,
        "C": classes,
        "W": decoder,
        "G": 4 * decoder,
        "3W": 3 * decoder,
        "P": 3 * patch * patch,
        "h": heads,
        "d": width // heads,
    }
    out = {}
    for entry in filter(None, (piece.strip() for piece in text.replace("\n", "|").split("|"))):
        name, _, dims = entry.partition(" ")
        shape = tuple(size[d] if d in size else int(d) for d in filter(None, dims.split(",")))
        for layer in range(depth if "{l}" in name else 1):
            out[name.replace("{l}", str(layer))] = shape
    return out


TINY = {"width": 16, "depth": 2, "heads": 2, "patch": 4, "grid": 3}


def weights(text: str, seed: int = 0, **sizes: int) -> dict[str, np.ndarray]:
    """Random weights with the names of a table; norms near 1, all others small."""
    r = np.random.default_rng(seed)
    return {
        name: r.normal(size=shape).astype(np.float32) * 0.3
        for name, shape in shapes(text, **sizes).items()
    }
