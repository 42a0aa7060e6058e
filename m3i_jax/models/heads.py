"""Small heads beside the decoder and the pooling: projector and predictor of an embedding space
(BYOL, MoCo v3, SimCLR, Barlow Twins, MSN), and one linear map of the encoder's tokens (SimMIM,
data2vec, feature distillation) or of the feature of the image (AM-RADIO).

The method sets the number of layers of a head, the configuration their width (`model.head`). Batch
norm takes the statistics of its batch over all devices; so does the target's projector, with its
own tokens.

x [..., D]: one vector an image, or one a token. K prototypes, W width of the space.
"""

from typing import Any

import jax
import jax.numpy as jnp

from m3i_jax import schema
from m3i_jax.models.initializers import init_params, shapes_of
from m3i_jax.models.layers import BatchNorm, Dense, Params, batch_norm
from m3i_jax.objective.numerics import l2_normalize
from m3i_jax.objective.terms import MlpShape, ProjectionHead


def _dense(model: schema.Model, mlp: MlpShape, layer: int, width: int) -> Dense:
    """Layer of a projector, without a bias before a batch norm, which would remove it."""
    last = layer == mlp.layers - 1
    normed = mlp.last_norm if last else mlp.norm == "batch"
    return Dense(width, jnp.dtype(model.dtype), use_bias=not normed)


def init_mlp(
    model: schema.Model, rng: jax.Array, mlp: MlpShape, width_in: int, width_out: int
) -> Params:
    """Returns parameters of a projector or predictor: `layer_0`, `norm_0`, `layer_1`, ...; the last
    norm has none.

    Matrices are Xavier-uniform or, with `std`, normal; biases 0. Layers before a batch norm have no
    bias.

    >>> call = lambda key: init_mlp(schema.Model(), key, MlpShape(layers=2), 768, 256)
    >>> shapes = jax.eval_shape(call, jax.random.key(0))
    >>> {name: sorted(part) for name, part in shapes.items()}
    {'layer_0': ['kernel'], 'layer_1': ['bias', 'kernel'], 'norm_0': ['bias', 'scale']}
    >>> shapes["layer_1"]["kernel"].shape
    (4096, 256)
    """
    shapes: dict[str, Any] = {}
    for layer in range(mlp.layers):
        last = layer == mlp.layers - 1
        width = width_out if last else model.head.hidden
        shapes[f"layer_{layer}"] = shapes_of(
            _dense(model, mlp, layer, width), jnp.zeros((1, width_in))
        )
        if not last and mlp.norm == "batch":
            shapes[f"norm_{layer}"] = shapes_of(BatchNorm(), jnp.zeros((1, width)))
        width_in = width
    return init_params(rng, shapes, {"kernel": mlp.std} if mlp.std else None)


def apply_mlp(model: schema.Model, params: Params, mlp: MlpShape, x_xD: jax.Array) -> jax.Array:
    """Linear maps with batch norm and ReLU or GELU between them; with `last_norm`, a batch norm
    without scale and offset at the end (MoCo v3).

    Args:
      model: settings; `model.head` and `model.dtype` are read.
      params: as of `init_mlp`.
      mlp: number of layers, and norms.
      x_xD: [..., D]; the statistics of batch norm are over all leading axes.

    Returns:
      [..., W] float32; matrix products are in `model.dtype`.

    >>> model, mlp, x = schema.Model(), MlpShape(layers=3), jnp.zeros((4, 768))
    >>> shapes = jax.eval_shape(lambda key: init_mlp(model, key, mlp, 768, 256), jax.random.key(0))
    >>> jax.eval_shape(lambda params: apply_mlp(model, params, mlp, x), shapes).shape
    (4, 256)
    """
    for layer in range(mlp.layers):
        part = params[f"layer_{layer}"]
        x_xD = _dense(model, mlp, layer, part["kernel"].shape[-1]).apply({"params": part}, x_xD)
        if layer < mlp.layers - 1:
            if mlp.norm == "batch":
                x_xD = BatchNorm().apply({"params": params[f"norm_{layer}"]}, x_xD)
            gelu = mlp.activation == "gelu"
            x_xD = jax.nn.gelu(x_xD, approximate=False) if gelu else jax.nn.relu(x_xD)
    x_xD = x_xD.astype(jnp.float32)
    if mlp.last_norm:
        width = x_xD.shape[-1]
        x_xD = batch_norm(x_xD, jnp.ones(width), jnp.zeros(width))
    return x_xD


def init_projection(
    model: schema.Model, rng: jax.Array, projection: ProjectionHead, prototypes: bool
) -> Params:
    """Returns parameters of an embedding space: those of `projector`, `predictor` and `prototypes`
    [K, W] that it has.

    Prototypes are uniform within 1 / sqrt(W) (MSN, DINO); where their length is trained, it starts
    at 1, `prototype_norms` [K]. Without a projector the space is that of the encoder's features.

    >>> head = ProjectionHead(projector=MlpShape(layers=3), predictor=MlpShape(layers=2))
    >>> call = lambda key: init_projection(schema.Model(), key, head, False)
    >>> sorted(jax.eval_shape(call, jax.random.key(0)))
    ['predictor', 'projector']
    """
    of_projector, of_predictor, of_prototypes = jax.random.split(rng, 3)
    width = model.encoder.width if projection.projector is None else model.head.width
    params: dict[str, Any] = {}
    if projection.projector is not None:
        params["projector"] = init_mlp(
            model, of_projector, projection.projector, model.encoder.width, width
        )
    if projection.predictor is not None:
        params["predictor"] = init_mlp(model, of_predictor, projection.predictor, width, width)
    if prototypes or projection.prototypes:
        params["prototypes"] = _uniform_prototypes(of_prototypes, model.head.prototypes, width)
    if projection.prototypes == "scaled":
        params["prototype_norms"] = jnp.ones(model.head.prototypes)
    return params


def prototype_logits(
    model: schema.Model, params: Params, projection: ProjectionHead, x_xW: jax.Array
) -> jax.Array:
    """Returns similarities [..., K] float32 of embeddings, scaled to length 1, to prototypes of
    length 1 or of a trained length. The product is in `model.dtype`.

    >>> params = {"prototypes": jnp.array([[0.0, 3.0], [4.0, 0.0]])}
    >>> space, x = ProjectionHead(prototypes="unit"), jnp.array([[0.0, 5.0]])
    >>> prototype_logits(schema.Model(), params, space, x).tolist()
    [[1.0, 0.0]]
    """
    dtype = jnp.dtype(model.dtype)
    unit_KxW = l2_normalize(params["prototypes"])
    if projection.prototypes == "scaled":
        unit_KxW = unit_KxW * params["prototype_norms"][:, None]
    return jnp.einsum(
        "...w,kw->...k",
        l2_normalize(x_xW).astype(dtype),
        unit_KxW.astype(dtype),
        preferred_element_type=jnp.float32,
    )


def apply_projector(
    model: schema.Model, params: Params, projection: ProjectionHead, x_xD: jax.Array
) -> jax.Array:
    """Returns the projection of a target or prediction: [..., W] float32, or x itself without a
    projector; in a space with prototypes, the similarities to them, [..., K].

    >>> apply_projector(schema.Model(), {}, ProjectionHead(), jnp.zeros((2, 768))).shape
    (2, 768)
    """
    if projection.projector is not None:
        x_xD = apply_mlp(model, params["projector"], projection.projector, x_xD)
    return prototype_logits(model, params, projection, x_xD) if projection.prototypes else x_xD


def apply_predictor(
    model: schema.Model, params: Params, projection: ProjectionHead, x_xD: jax.Array
) -> jax.Array:
    """Returns the prediction, [..., W]: projector and predictor, as far as the space has them.

    >>> head = ProjectionHead(projector=MlpShape(layers=2))
    >>> model, x = schema.Model(), jnp.zeros((2, 768))
    >>> call = lambda key: init_projection(model, key, head, False)
    >>> shapes = jax.eval_shape(call, jax.random.key(0))
    >>> jax.eval_shape(lambda params: apply_predictor(model, params, head, x), shapes).shape
    (2, 256)
    """
    y_xW = apply_projector(model, params, projection, x_xD)
    return (
        y_xW
        if projection.predictor is None
        else apply_mlp(model, params["predictor"], projection.predictor, y_xW)
    )


def init_clusters(model: schema.Model, rng: jax.Array, width: int) -> Params:
    """Returns parameters of online clustering (CAPI): `clusters`, the linear map of the target
    encoder's tokens, normal with deviation 1; and, where a decoder of this width predicts the
    assignments, its `prototypes` [K, width] and their trained lengths.

    >>> call = lambda key: init_clusters(schema.Model(), key, 512)
    >>> shapes = jax.eval_shape(call, jax.random.key(0))
    >>> shapes["clusters"]["kernel"].shape, shapes["prototypes"].shape
    ((768, 1024), (1024, 512))
    """
    of_clusters, of_prototypes = jax.random.split(rng)
    count = model.head.prototypes
    clusters = {
        "kernel": jax.random.normal(of_clusters, (model.encoder.width, count), jnp.float32),
        "bias": jnp.zeros(count),
    }
    if not width:
        return {"clusters": clusters}
    return {
        "clusters": clusters,
        "prototypes": _uniform_prototypes(of_prototypes, count, width),
        "prototype_norms": jnp.ones(count),
    }


def cluster_logits(model: schema.Model, params: Params, x_BxNxD: jax.Array) -> jax.Array:
    """Returns logits [B, N, K] float32 of tokens, scaled to length 1. The product is in
    `model.dtype`.

    >>> clusters = {"kernel": jnp.eye(2), "bias": jnp.array([0.0, 1.0])}
    >>> x = jnp.array([[[3.0, 0.0]]])
    >>> cluster_logits(schema.Model(), {"clusters": clusters}, x).tolist()
    [[[1.0, 1.0]]]
    """
    dtype, clusters = jnp.dtype(model.dtype), params["clusters"]
    product_BxNxK = jnp.einsum(
        "bnd,dk->bnk",
        l2_normalize(x_BxNxD.astype(jnp.float32)).astype(dtype),
        clusters["kernel"].astype(dtype),
        preferred_element_type=jnp.float32,
    )
    return product_BxNxK + clusters["bias"]


def _uniform_prototypes(rng: jax.Array, count: int, width: int) -> jax.Array:
    bound = width**-0.5
    return jax.random.uniform(rng, (count, width), jnp.float32, minval=-bound, maxval=bound)


def init_linear(model: schema.Model, rng: jax.Array, of: str, width: int = 0) -> Params:
    """Returns parameters of a linear map, `kernel` and `bias`: to D for tokens and pooled features,
    or to `width` if that is not 0; to 3 p p for pixels.

    >>> call = lambda key: init_linear(schema.Model(), key, "pixels")
    >>> jax.eval_shape(call, jax.random.key(0))["kernel"].shape
    (768, 768)
    """
    e = model.encoder
    if of not in ("tokens", "pooled", "pixels"):
        raise ValueError(f"a linear head of {of!r}: it predicts tokens, pooled features or pixels")
    width = 3 * e.patch_size**2 if of == "pixels" else width or e.width
    return init_params(
        rng, shapes_of(Dense(width, jnp.dtype(model.dtype)), jnp.zeros((1, e.width)))
    )


def apply_linear(model: schema.Model, params: Params, x_BxNxD: jax.Array) -> jax.Array:
    """Returns predictions at the cells of the encoder's own tokens, or of a pooled feature [B, D],
    in `model.dtype`.

    >>> model, x = schema.Model(), jnp.zeros((2, 4, 768))
    >>> shapes = jax.eval_shape(lambda key: init_linear(model, key, "tokens"), jax.random.key(0))
    >>> jax.eval_shape(lambda params: apply_linear(model, params, x), shapes).shape
    (2, 4, 768)
    """
    return Dense(params["bias"].shape[-1], jnp.dtype(model.dtype)).apply(
        {"params": params}, x_BxNxD
    )
