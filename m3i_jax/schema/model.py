"""The networks: encoder, decoder, pooling, heads and text tower."""

import dataclasses

from m3i_jax.schema.limits import (
    BELOW_ONE,
    DEPTH,
    EPS,
    HEADS,
    NAME,
    RATIO,
    STD,
    WIDTH,
    ListLimit,
    NumberLimit,
    option,
    section,
)

STAGES = ListLimit(fewest=4, most=4)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Encoder:
    """The encoder. Patch size, width, drop path and freezing apply to every backbone, what begins
    with "ViT" to it alone."""

    patch_size: int = option(
        16, "patch side in pixels, the stride of the dense features [P]", NumberLimit(1, 4096)
    )
    width: int = option(768, "width of the dense features", WIDTH)
    depth: int = option(12, "ViT: number of blocks", DEPTH)
    heads: int = option(12, "ViT: attention heads; must divide width", HEADS)
    mlp_ratio: float = option(4.0, "ViT: hidden width of the MLP divided by the width", RATIO)
    drop_path: float = option(0.1, "stochastic depth rate [P; InternImage-H: 0.2]", BELOW_ONE)
    drop_path_rule: str = option(
        "linear",
        "drop path rate per layer; linear: from 0 to the rate; uniform: the same rate in"
        " every layer [P: linear; InternImage-H: uniform]",
        "linear",
        "uniform",
    )
    cls_token: bool = option(True, "ViT: prepend a learned token")
    positions: str = option(
        "sincos",
        "ViT: position table: fixed sin-cos with row or column first (MAE), or learned; rope:"
        " no table, queries and keys are turned by row and column (DINOv3)",
        "sincos",
        "sincos_columns",
        "learned",
        "rope",
    )
    rope_base: float = option(
        100.0,
        "ViT, positions rope: the longest period, where a side of the view is 2 (DINOv3: 100)",
        NumberLimit(1, 1e6, above=True),
    )
    registers: int = option(
        0,
        "ViT: learned tokens that only the blocks see (DINOv2, DINOv3: 4)",
        NumberLimit(0, 1024),
    )
    norm: str = option(
        "layer", "ViT: LayerNorm, or RMSNorm without mean and offset", "layer", "rms"
    )
    embedding_norm: bool = option(False, "ViT: norm before the first block (CLIP)")
    final_norm: bool = option(False, "ViT: norm after the last block")
    qk_norm: bool = option(False, "ViT: norm of the queries and keys of every head")
    layer_scale: float = option(
        0.0,
        "ViT: initial factor of every channel of a branch, learned (DINOv2, DINOv3: 1e-5); 0: none",
        STD,
    )
    norm_eps: float = option(
        1e-6,
        "ViT: epsilon of the norms (timm, MAE: 1e-6; Hugging Face ViT: 1e-12; CLIP: 1e-5)",
        EPS,
    )
    activation: str = option(
        "gelu",
        "ViT: activation of the MLP: exact GELU, its tanh approximation (Google) or CLIP's; swiglu:"
        " with a third matrix, so mlp_ratio 8/3 has the parameters of 4",
        "gelu",
        "gelu_tanh",
        "quick_gelu",
        "swiglu",
    )
    freeze: bool = option(
        False, "freeze all encoder parameters, so that probes train only the head"
    )
    position_grid: int = option(
        0,
        "ViT: grid side for which the fixed position table is built before it is resized to"
        " the views' grid; 0: the views' grid",
        NumberLimit(0, 4096),
    )
    freeze_patch_embed: bool = option(True, "ViT: freeze the patch embedding at its initial values")


@dataclasses.dataclass(frozen=True, kw_only=True)
class InternImage:
    """The convolutional backbone of the paper's largest run; the defaults are InternImage-H.

    Its dense features have `model.encoder.width` channels and the stride
    `model.encoder.patch_size`: the stride of the third stage, at which the last two stages are
    fused, or that of the last stage, whose map with 8 * width channels is then used as it is.
    """

    width: int = option(
        320,
        "channels of the first stage; each later stage has twice as many",
        NumberLimit(2, 2**16, text="(the stem starts with half of it)"),
    )
    depths: tuple[int, ...] = option(
        (6, 6, 32, 6), "layers per stage", NumberLimit(1, 1024, count=STAGES)
    )
    groups: tuple[int, ...] = option(
        (10, 20, 40, 80),
        "DCNv3 groups per stage; must divide the stage's channels",
        NumberLimit(1, 2**16, count=STAGES),
    )
    norm: str = option(
        "res_post",
        "position of the norms; pre: x + f(n(x)); post: x + n(f(x)); res_post: x + n'(f(n(x)))",
        "pre",
        "post",
        "res_post",
    )
    layer_scale: float = option(
        0.0, "initial value of the layer scale of every branch; 0: no layer scale", STD
    )
    offset_scale: float = option(
        1.0, "scale of DCNv3's sampling points and offsets", NumberLimit(0, 1e3, above=True)
    )
    kernel: int = option(
        5,
        "kernel side of the depth-wise convolution before offsets and masks; odd",
        NumberLimit(1, 63),
    )
    center_scale: bool = option(
        True, "DCNv3 blends in the value at the centre with a learned weight"
    )
    extra_norm: int = option(
        6,
        "stage 3 has an extra norm after every this many layers; 0: no extra norm",
        NumberLimit(0, 1024),
    )
    mlp_ratio: float = option(4.0, "hidden width of the MLP divided by the width", RATIO)
    stem_strides: tuple[int, ...] = option(
        (2, 2),
        "strides of the stem's two convolutions",
        NumberLimit(1, 64, count=ListLimit(fewest=2, most=2)),
    )
    mlp_std: float = option(
        0.02,
        "standard deviation of the MLP's initial input matrices; 0: 1 / sqrt(inputs), for"
        " networks too narrow for 0.02",
        STD,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decoder:
    """The decoder. It predicts dense targets from an image's own visible tokens and one query per
    target position."""

    width: int = option(768, "token width [P]", WIDTH)
    depth: int = option(4, "number of blocks [P]", DEPTH)
    heads: int = option(16, "attention heads [P]; must divide width", HEADS)
    mlp_ratio: float = option(4.0, "hidden width of the MLP divided by the width [P: 3072]", RATIO)
    norm: str = option(
        "layer",
        "layer norm, or batch norm over the batch's tokens as in SiameseIM's code",
        "layer",
        "batch",
    )
    projector_depth: int = option(
        0,
        "blocks between embedding and decoder, present in the target encoder too; 0 [P];"
        " SiameseIM: 2",
        NumberLimit(0, 1024),
    )
    cls: str = option(
        "auto",
        "whether the decoder reads the cls token; auto: unless two images share it",
        "auto",
        "yes",
        "no",
    )
    positions: str = option(
        "relative",
        "position embedding of the queries; relative: to the input view; absolute: MAE's"
        " plain table, for same-view targets only",
        "relative",
        "absolute",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pool:
    """Pooling of an image's own tokens before the category head and the text projection."""

    kind: str = option(
        "attention",
        "attention pooling [P], mean of the patch tokens, or the cls token",
        "attention",
        "mean",
        "cls",
    )
    query: str = option(
        "mean", "query of the attention: the mean token, or a learned token", "mean", "learned"
    )
    width: int = option(768, "output width [P]", WIDTH)
    heads: int = option(16, "attention heads [P]; must divide the encoder's width", HEADS)
    norm: str = option(
        "layer",
        "norm of mean and cls pooling: layer norm, or batch norm without scale and offset"
        " (linear probes)",
        "layer",
        "batch",
    )
    std: float = option(
        0.02, "standard deviation of the initial matrices; 0: 1 / sqrt(inputs)", STD
    )
    projection: bool = option(
        True,
        "linear projection to the output width; false: the pooled token is the output"
        " (MAE's fine-tuning)",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Head:
    """Projector and predictor of global targets; the method sets their number of layers."""

    hidden: int = option(4096, "width of the hidden layers (MoCo v3, BYOL: 4096)", WIDTH)
    width: int = option(256, "output width (MoCo v3, BYOL: 256)", WIDTH)
    prototypes: int = option(
        1024, "number of prototypes, for methods that have them (MSN: 1024)", NumberLimit(1, 2**24)
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Text:
    """The text tower: BERT-Base in size [P], trained from scratch."""

    width: int = option(768, "token width [P]", WIDTH)
    depth: int = option(12, "number of blocks [P]", DEPTH)
    heads: int = option(12, "attention heads [P]; must divide width", HEADS)
    mlp_ratio: float = option(4.0, "hidden width of the MLP divided by the width [P: 3072]", RATIO)
    embed: int = option(768, "width of the joint image-text space", WIDTH)
    pool: str = option(
        "first", "pooling of the caption: first token, last token or mean", "first", "last", "mean"
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Captioner:
    """The decoder that predicts the tokens of captions, with cross-attention to those of an
    image."""

    width: int = option(768, "token width (CapPa: that of the encoder)", WIDTH)
    depth: int = option(6, "number of blocks (CapPa: 6)", DEPTH)
    heads: int = option(12, "attention heads; must divide width", HEADS)
    mlp_ratio: float = option(4.0, "hidden width of the MLP divided by the width", RATIO)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    backbone: str = option(
        "vit",
        "encoder architecture: vit, intern_image (configured by model.intern_image) or a registered"
        " backbone",
        NAME,
    )
    encoder: Encoder = section(Encoder)
    intern_image: InternImage = section(InternImage)
    decoder: Decoder = section(Decoder)
    pool: Pool = section(Pool)
    head: Head = section(Head)
    text: Text = section(Text)
    captioner: Captioner = section(Captioner)
    dtype: str = option(
        "bfloat16",
        "precision of matrix products and of the sum of an encoder's branches (the residual"
        " stream); parameters, norms, softmax and losses stay float32. In bfloat16 a branch below a"
        " 500th of the sum is lost: with layer_scale=1e-5, blocks start as the identity until its"
        " factors have grown",
        "bfloat16",
        "float32",
    )
    scan: bool = option(
        False, "run the blocks in one lax.scan, so that compile time does not grow with depth"
    )
    remat: str = option(
        "none",
        "what the backward pass recomputes: nothing; all but matrix products; all but a few"
        " named tensors per block (names) or per two blocks (half); whole blocks",
        "none",
        "dots",
        "names",
        "half",
        "full",
    )
    keep_gathered: bool = option(
        False,
        "on a mesh with an fsdp axis: keep a block's gathered weights for the backward pass"
        " instead of gathering them again (remat=none always keeps them)",
    )

    category_std: float = option(
        0.0,
        "standard deviation of the initial category weights; 0: Xavier (fine-tuning: 2e-5,"
        " linear probe: 0.01)",
        STD,
    )

    @property
    def pooled(self) -> int:
        """Width of the pooled feature of an image."""
        return self.pool.width if self.pool.projection else self.encoder.width
