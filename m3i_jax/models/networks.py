"""ViT, InternImage and the DCNv3 layer for other projects: each is a value with its sizes, a plain
function of (params, images), and on demand a module of flax Linen or NNX with the same parameters.

    vit = m3i_jax.ViT(width=384, depth=12, heads=6, image_size=224)
    params = vit.init(jax.random.key(0))
    tokens = vit(params, images)        # normalised images [B, S, S, 3] -> [B, T, D]
    module = vit.linen()                # a flax.linen.Module
    model = vit.nnx(nnx.Rngs(0))        # a flax.nnx.Module

Parameters are those of `m3i_jax.load(...).params["encoder"]`."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
from flax import linen as nn

from m3i_jax import schema
from m3i_jax.models import (
    backbones,
    intern_image,
    intern_image_backbone,
    intern_image_layer,
    vit,
    vit_backbone,
)
from m3i_jax.models.intern_image import InternImageConfig
from m3i_jax.models.layers import Params
from m3i_jax.registries import not_one_of


def _check(of: str, sizes: Any, settings: type) -> None:
    """Raise ValueError for the first size that a setting of the same name refuses: an unknown norm
    or kind of positions would otherwise be that of the default."""
    for field in dataclasses.fields(settings):
        if not hasattr(sizes, field.name):
            continue
        value, choices = getattr(sizes, field.name), field.metadata["choices"]
        if choices and value not in choices:
            raise ValueError(f"{of}: {field.name}: {not_one_of(repr(value), choices)}")
        limits = field.metadata["limits"]
        is_list = isinstance(value, tuple | list)
        for entry in value if is_list else (value,):
            if limits and (why := limits.wrong(entry)):
                raise ValueError(f"{of}: {field.name}: {entry!r} {why}")
        if is_list and (why := limits.count.wrong(value)):
            raise ValueError(f"{of}: {field.name}: {value!r} {why}")


def _of_name(presets: Mapping[str, Any], name: str) -> Any:
    if name not in presets:
        raise KeyError(f"preset {not_one_of(repr(name), presets)}")
    return presets[name]


def _check_normalised(images: jax.Array) -> None:
    """Raise ValueError for pixels 0..255, which would pass for very large normalised values."""
    if not jax.numpy.issubdtype(images.dtype, jax.numpy.floating):
        raise ValueError(
            f"images have the type {images.dtype}; a network takes normalised floats, (images / 255"
            " - mean) / std with .preprocessing.mean and .std of m3i_jax.load, or use its .features"
        )


class Network:
    """A network as a function of its parameters and its input."""

    def init(self, rng: jax.Array) -> Params:
        """Returns initial parameters, nested dicts of float32 arrays."""
        raise NotImplementedError

    def __call__(self, params: Params, x_BxHxWxC: jax.Array) -> jax.Array:
        """The output. Pure: `jit`, `grad` and `vmap` apply."""
        raise NotImplementedError

    def linen(self, name: str | None = None) -> "LinenNetwork":
        """Returns a module of flax Linen; the parameters are `variables["params"]["network"]`.

        >>> module = DCNv3Layer(width=8, groups=2).linen()
        >>> x = jax.numpy.ones((1, 4, 4, 8))
        >>> variables = jax.eval_shape(module.init, jax.random.key(0), x)
        >>> sorted(variables["params"]["network"])[:3]
        ['depthwise', 'input', 'mask']
        """
        return LinenNetwork(self, name=name)

    def nnx(self, rngs: Any) -> Any:
        """Returns a module of flax NNX; `parameters` is the tree, with an `nnx.Param` at each leaf.

        Args:
          rngs: `nnx.Rngs` with a stream for params.
        """
        from m3i_jax.models.nnx_network import NnxNetwork

        return NnxNetwork(self, rngs=rngs)


class LinenNetwork(nn.Module):
    """A `Network` as a module of flax Linen."""

    network: Any

    @nn.compact
    def __call__(self, x_BxHxWxC: jax.Array) -> jax.Array:
        params = self.param("network", self.network.init)
        return self.network(params, x_BxHxWxC)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ViTNetwork(Network):
    """A vision transformer: tokens [B, T, D] of normalised images [B, S, S, 3], cls first where
    there is one, without a pooling or a head. Stochastic depth is off.

    Attributes:
      image_size: side S in pixels, to which learned positions belong; images of other sides are
        accepted too. Learned positions are resized for them; the others are those of the image's
        own grid, or of `position_grid`, resized (as a run does for small views).
      patch_size, width, depth, heads, mlp_ratio, cls_token, positions, rope_base, registers, norm,
        embedding_norm, final_norm, qk_norm, layer_scale, norm_eps, activation, position_grid: see
        `schema.Encoder`.
      dtype: of matrix products and of the output; parameters are float32.
      scan: run the blocks in one lax.scan, which compiles faster.

    >>> small = ViTNetwork(width=8, depth=2, heads=2, patch_size=8, image_size=32)
    >>> params = jax.eval_shape(small.init, jax.random.key(0))
    >>> jax.eval_shape(small, params, jax.numpy.zeros((2, 32, 32, 3))).shape
    (2, 17, 8)
    """

    image_size: int = 224
    patch_size: int = 16
    width: int = 768
    depth: int = 12
    heads: int = 12
    mlp_ratio: float = 4.0
    cls_token: bool = True
    positions: str = "sincos"
    rope_base: float = 100.0
    registers: int = 0
    norm: str = "layer"
    embedding_norm: bool = False
    final_norm: bool = False
    qk_norm: bool = False
    layer_scale: float = 0.0
    norm_eps: float = 1e-6
    activation: str = "gelu"
    position_grid: int = 0
    dtype: str = "float32"
    scan: bool = False

    def __post_init__(self) -> None:
        _check("ViT", self, schema.Encoder)
        if self.width % self.heads:
            raise ValueError(f"ViT: heads: {self.heads} must divide the width {self.width}")

    @classmethod
    def preset(cls, name: str, **changes: Any) -> "ViTNetwork":
        """Returns a size by name, such as vit_b16, with changes.

        >>> ViTNetwork.preset("vit_s16", image_size=96).width
        384
        """
        return cls(**{**_of_name(vit_backbone.PRESETS, name)["encoder"], **changes})

    @property
    def model(self) -> schema.Model:
        """These sizes as settings of the package."""
        names = {field.name for field in dataclasses.fields(schema.Encoder)}
        values = {k: v for k, v in dataclasses.asdict(self).items() if k in names}
        encoder = schema.Encoder(**values, drop_path=0.0, freeze_patch_embed=False)
        return schema.Model(encoder=encoder, dtype=self.dtype, scan=self.scan)

    def init(self, rng: jax.Array) -> Params:
        return vit.init(self.model, rng, grid=self.image_size // self.patch_size)

    def __call__(self, params: Params, images_BxSxSx3: jax.Array) -> jax.Array:
        _check_normalised(images_BxSxSx3)
        patches = vit.patchify(images_BxSxSx3, self.patch_size)
        grid = images_BxSxSx3.shape[1] // self.patch_size
        return vit.apply(self.model, params, patches, grid=grid)


@dataclasses.dataclass(frozen=True, kw_only=True)
class InternImageNetwork(Network):
    """InternImage: dense features [B, N, D] of normalised images [B, S, S, 3]; `maps` gives the
    maps of its four stages. Stochastic depth is off.

    Attributes:
      config: sizes, `InternImageConfig`; the default is InternImage-H.
      dtype: of matrix products and of the output; parameters are float32.
      scan: run the layers of a stage in one lax.scan, which compiles faster.

    >>> small = InternImageNetwork.preset("internimage_pico")
    >>> params = jax.eval_shape(small.init, jax.random.key(0))
    >>> jax.eval_shape(small, params, jax.numpy.zeros((2, 32, 32, 3))).shape
    (2, 16, 128)
    """

    config: InternImageConfig = InternImageConfig()
    dtype: str = "float32"
    scan: bool = False

    def __post_init__(self) -> None:
        _check("InternImage", self.config, schema.InternImage)

    @classmethod
    def preset(cls, name: str, **changes: Any) -> "InternImageNetwork":
        """Returns a size by name, such as internimage_t, with changes of its `config`.

        >>> InternImageNetwork.preset("internimage_t", fused=0).config.stride
        32
        """
        config = _of_name(intern_image.PRESETS, name)
        return cls(config=dataclasses.replace(config, **changes))

    def init(self, rng: jax.Array) -> Params:
        return intern_image.init(self.config, rng)

    def __call__(self, params: Params, images_BxSxSx3: jax.Array) -> jax.Array:
        _check_normalised(images_BxSxSx3)
        return intern_image.apply(
            self.config, params, images_BxSxSx3, dtype=self.dtype, scan=self.scan
        )

    def maps(self, params: Params, images_BxHxWx3: jax.Array) -> list[jax.Array]:
        """Returns the maps of the four stages, [B, H / s, W / s, C] each."""
        _check_normalised(images_BxHxWx3)
        return intern_image.feature_maps(
            self.config, params, images_BxHxWx3, dtype=self.dtype, scan=self.scan
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class DCNv3Layer(Network):
    """The DCNv3 layer of InternImage with its projections, [B, H, W, C] -> [B, H, W, C], for maps
    of any size. `m3i_jax.dcnv3` is the operator alone, of given offsets and masks.

    Attributes:
      width: channels C.
      groups: G, which divides C.
      kernel: side of the depth-wise convolution before offsets and masks; the operator samples 9
        points.
      offset_scale: factor of points and offsets.
      center_scale: blend in the value at the centre with a learned weight.
      method: of the operator, see `dcnv3.dcnv3`.

    >>> layer = DCNv3Layer(width=8, groups=2)
    >>> params = jax.eval_shape(layer.init, jax.random.key(0))
    >>> jax.eval_shape(layer, params, jax.numpy.ones((1, 5, 6, 8))).shape
    (1, 5, 6, 8)
    """

    width: int
    groups: int
    kernel: int = 3
    offset_scale: float = 1.0
    center_scale: bool = False
    method: str = "auto"

    @property
    def layer(self) -> intern_image_layer.Layer:
        """Its settings within InternImage."""
        return intern_image_layer.Layer(
            width=self.width,
            groups=self.groups,
            norm="pre",
            layer_scale=0.0,
            offset_scale=self.offset_scale,
            kernel=self.kernel,
            center_scale=self.center_scale,
            hidden=self.width,
        )

    def init(self, rng: jax.Array) -> Params:
        return intern_image.init_dcn(self.layer, rng)

    def __call__(self, params: Params, x_BxHxWxC: jax.Array) -> jax.Array:
        return intern_image_layer.dcn(self.layer, params, x_BxHxWxC, self.method)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BackboneNetwork(Network):
    """The encoder of any backbone: features [B, T, D] of normalised images [B, S, S, 3], cls first
    where there is one. Stochastic depth is off.

    Attributes:
      model: settings of the package.
      image_size: side S in pixels, to which positions belong.

    >>> encoder = schema.Encoder(patch_size=8, width=8, depth=1, heads=2)
    >>> small = BackboneNetwork(model=schema.Model(encoder=encoder), image_size=16)
    >>> params = jax.eval_shape(small.init, jax.random.key(0))
    >>> jax.eval_shape(small, params, jax.numpy.zeros((2, 16, 16, 3))).shape
    (2, 5, 8)
    """

    model: schema.Model
    image_size: int

    def init(self, rng: jax.Array) -> Params:
        grid = self.image_size // self.model.encoder.patch_size
        return backbones.get_backbone(self.model).init(self.model, rng, mask_token=False, grid=grid)

    def __call__(self, params: Params, images_BxSxSx3: jax.Array) -> jax.Array:
        _check_normalised(images_BxSxSx3)
        patch = self.model.encoder.patch_size
        patches, grid = vit.patchify(images_BxSxSx3, patch), images_BxSxSx3.shape[1] // patch
        return backbones.get_backbone(self.model).apply(self.model, params, patches, grid=grid)


def _vit_network(model: schema.Model, image_size: int) -> ViTNetwork:
    names = {field.name for field in dataclasses.fields(ViTNetwork)}
    encoder = {k: v for k, v in dataclasses.asdict(model.encoder).items() if k in names}
    return ViTNetwork(**encoder, image_size=image_size, dtype=model.dtype, scan=model.scan)


def _intern_image_network(model: schema.Model, image_size: int) -> InternImageNetwork:
    config = intern_image_backbone.intern_image_config(model)
    return InternImageNetwork(config=config, dtype=model.dtype, scan=model.scan)


# by `Backbone.layout`, which says whose parameters they are
_NETWORKS = {"vit": _vit_network, "intern_image": _intern_image_network}


def network_of(model: schema.Model, image_size: int) -> Network:
    """Returns the network of settings of the package.

    >>> network_of(schema.Model(), 224).width
    768
    """
    make = _NETWORKS.get(backbones.get_backbone(model).layout)
    return make(model, image_size) if make else BackboneNetwork(model=model, image_size=image_size)


# the names of `import m3i_jax`; those of the classes differ from the settings of `schema`
ViT, InternImage, DCNv3 = ViTNetwork, InternImageNetwork, DCNv3Layer
