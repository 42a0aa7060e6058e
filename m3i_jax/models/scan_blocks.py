"""Runs the stacked blocks of any tower, in a loop or a scan, with a remat policy.

The policy (`model.remat`) names what the backward pass keeps of each block. `none` keeps what
differentiation needs, `full` only the input of a block. Between them `dots` keeps every matrix
product; `names` the tensors of NAMES, from which the rest of a transformer block is recomputed by
elementwise work and one product, q k', and the rest of an InternImage layer by elementwise work;
`half` the tensors of HALF, in a transformer block half as many numbers.

Recomputed tensors exist only for the images that are computed at once. So a block that recomputes
takes its rows in chunks of about ROWS: enough to fill a chip's matrix units, and few beside the
batch. (256 views on a v5e chip, `half`: with 64 rows the peak is 7 % higher, HBM traffic 31 %.)

B batch, T tokens, D width, L blocks, P chunks.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from m3i_jax import parallel, schema
from m3i_jax.models.layers import Params
from m3i_jax.models.rope import Rotation

# q, k and v; the output of attention; the stream between the branches; the MLP before its GELU, and
# the gate of SwiGLU.
# Without `attended` a block recomputes two products of attention instead of one, without `middle`
# also the output projection, without `fc1` the widest product. `branch`, the output of a branch, is
# kept in InternImage, where a norm or scale behind it needs it.
NAMES = ("qkv", "attended", "middle", "fc1", "gate", "branch")
HALF = ("qkv", "middle")
ROWS = 32
_policies = jax.checkpoint_policies
POLICIES: dict[str, Callable[..., bool]] = {
    "dots": _policies.dots_saveable,
    "names": _policies.save_only_these_names(*NAMES),
    "half": _policies.save_only_these_names(*HALF),
    "full": _policies.nothing_saveable,
}


def block_kwargs(model: schema.Model) -> dict[str, Any]:
    """Returns the arguments of `run_blocks` that are settings.

    >>> block_kwargs(schema.Model())
    {'scan': False, 'remat': 'none', 'keep_gathered': False}
    """
    return {"scan": model.scan, "remat": model.remat, "keep_gathered": model.keep_gathered}


def with_remat(
    step: Callable[..., Any], remat: str, *, scan: bool, keep_gathered: bool = False
) -> Callable[..., Any]:
    """`step` whose backward pass recomputes what the policy `remat` does not keep; the same
    numbers.

    Args:
      step: one block.
      remat: none or one of POLICIES.
      scan: whether it is the body of a scan; elsewhere the compiler is kept from merging the two
        computations.
      keep_gathered: also keep weights that were gathered for the forward pass. Without remat they
        are always kept.

    >>> with_remat(len, "none", scan=True) is len
    True
    """
    if remat == "none":
        return step
    policy = POLICIES[remat]
    if keep_gathered:
        policy = _policies.save_from_both_policies(
            policy, _policies.save_only_these_names(parallel.FSDP_GATHERED)
        )
    return jax.checkpoint(step, policy=policy, prevent_cse=not scan)


def split_blocks(tree: Any, sizes: list[int]) -> list[Any]:
    """Returns consecutive parts of the leading axis. The gradient of `lax.split` is one
    concatenation; that of indexing adds up padded arrays.

    >>> import jax.numpy as jnp
    >>> [part["kernel"].shape for part in split_blocks({"kernel": jnp.zeros((3, 8))}, [1, 2])]
    [(1, 8), (2, 8)]
    """
    leaves, structure = jax.tree.flatten(tree)
    parts = zip(*(jax.lax.split(leaf, sizes) for leaf in leaves), strict=True)
    return [jax.tree.unflatten(structure, part) for part in parts]


def chunk_count(rows: int, at_once: float = 0.0) -> int:
    """Returns the number of equal chunks in which a device takes its rows: those nearest to
    `at_once` rows, or to ROWS.

    >>> [chunk_count(rows) for rows in (2, 64, 96, 128, 254, 512)]
    [1, 2, 3, 4, 2, 16]
    >>> chunk_count(8, at_once=1.5)
    4
    """
    return min(
        (n for n in range(1, rows + 1) if rows % n == 0),
        key=lambda n: abs(math.log(rows / n / (at_once or ROWS))),
    )


def deal_rows(tree: Any, count: int, axis: int = 0) -> Any:
    """Reshapes [B, ...] -> [P, B / P, ...] with stride P, so that every device keeps its rows; as
    it is for one chunk.

    Args:
      tree: of arrays with rows.
      count: number of chunks, P.
      axis: the axis of rows.

    >>> deal_rows(jnp.arange(6), 2).tolist()
    [[0, 2, 4], [1, 3, 5]]
    """
    return jax.tree.map(
        lambda x: (
            jnp.moveaxis(
                x.reshape(*x.shape[:axis], -1, count, *x.shape[axis + 1 :]), axis + 1, axis
            )
            if count > 1
            else x
        ),
        tree,
    )


def join_rows(x: jax.Array, count: int) -> jax.Array:
    """Inverts `deal_rows` for one array with rows on its first axis.

    >>> join_rows(deal_rows(jnp.arange(6), 2), 2).tolist()
    [0, 1, 2, 3, 4, 5]
    """
    return x if count == 1 else x.swapaxes(0, 1).reshape(-1, *x.shape[2:])


def run_blocks(
    block: Any,
    stacked: Params,
    x_BxTxD: jax.Array,
    *,
    keep_BxLx2: jax.Array | None = None,
    where_BxT: jax.Array | None = None,
    rows: slice | None = None,
    rotation: Rotation | None = None,
    context: Any = None,
    scan: bool = False,
    remat: str = "none",
    keep_gathered: bool = False,
) -> jax.Array:
    """Runs stacked blocks one after the other.

    Args:
      block: the module of each, `layers.Block` or one with its arguments.
      stacked: parameters with a leading axis [L, ...].
      x_BxTxD: the residual stream, in the precision that it keeps.
      keep_BxLx2: stochastic depth as factors, 0 or 1 / (1 - p), of the (attention, MLP) branch of
        every block; None: all kept.
      where_BxT: bool, tokens that serve as keys; None: all.
      rows: token rows to return. The last block computes queries, outputs and MLP of those only;
        the numbers are those of slicing its full output, to rounding. With batch norm it computes
        all rows and the output is sliced: SiameseIM's norm2 has statistics of all rows.
      rotation: rotary positions of all tokens, as of `rope.axial_rotation`; None: none.
      context: tree of arrays with the same rows, the argument of this name of a block that reads
        more than its stream (captions their image); None: the block has no such argument.
      scan: one `lax.scan` over the blocks instead of a Python loop. Same numbers; compile time does
        not grow with depth.
      remat: policy: none, dots, names, half or full.
      keep_gathered: on a mesh with an fsdp axis, whether the backward pass keeps the gathered
        weights of a block or gathers them again.

    Returns:
      [B, T, D], or [B, len(rows), D].

    Raises:
      ValueError: keep factors that are not [B, L, 2].

    >>> import jax.numpy as jnp
    >>> from m3i_jax.models.initializers import init_blocks
    >>> from m3i_jax.models.layers import block
    >>> one = block(8, 2, 4.0, "float32")
    >>> call = lambda key: init_blocks(one, key, width=8, depth=2)
    >>> shapes = jax.eval_shape(call, jax.random.key(0))
    >>> x, rows = jnp.ones((1, 5, 8)), slice(3, None)
    >>> jax.eval_shape(lambda params: run_blocks(one, params, x, rows=rows), shapes).shape
    (1, 2, 8)
    """
    depth = jax.tree.leaves(stacked)[0].shape[0]
    if keep_BxLx2 is not None and keep_BxLx2.shape != (x_BxTxD.shape[0], depth, 2):
        raise ValueError(
            f"keep factors have shape {keep_BxLx2.shape}; they must be"
            f" {(x_BxTxD.shape[0], depth, 2)}: [B, L, 2]"
        )
    settings: dict[str, Any] = {"remat": remat, "scan": scan, "keep_gathered": keep_gathered}
    if rows is not None and block.norm == "batch":
        return run_blocks(
            block,
            stacked,
            x_BxTxD,
            keep_BxLx2=keep_BxLx2,
            where_BxT=where_BxT,
            rotation=rotation,
            context=context,
            **settings,
        )[:, rows]
    full = depth if rows is None else depth - 1  # blocks that compute every row
    # a rotation of all images is a constant; one of each image goes where its row goes
    shared = rotation if rotation is not None and rotation[0].shape[0] == 1 else None
    own = None if rotation is shared else rotation

    def run(
        gather: Callable[[Any], Any], stacked: Params, x: jax.Array, keep_LxBx2: Any, beside: Any
    ) -> jax.Array:
        count = (
            1
            if remat == "none" or block.norm == "batch"
            else chunk_count(parallel.rows_of_device(x.shape[0]))
        )
        x, beside = deal_rows((x, beside), count)

        def stepper(rows: slice | None) -> Any:
            def call(
                params: Params, x: jax.Array, keep_Bx2: jax.Array | None, beside: Any
            ) -> jax.Array:
                where_BxT, own, context = beside
                options: dict[str, Any] = {"rotation": shared if own is None else own}
                if context is not None:
                    options["context"] = context
                return block.apply({"params": params}, x, keep_Bx2, where_BxT, rows, **options)

            def step(x: jax.Array, layer: Any) -> jax.Array:
                params, keep_Bx2 = layer
                params = gather(params)
                if count == 1:
                    return call(params, x, keep_Bx2, beside)
                # In float32, so that the gradients of the chunks are added in it; gathered weights
                # are in the compute precision.
                params = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
                one = with_remat(lambda *chunk: call(params, *chunk), remat, scan=True)
                return jax.lax.map(lambda chunk: one(*chunk), (x, keep_Bx2, beside))

            return with_remat(step, **settings)

        layers = (stacked, deal_rows(keep_LxBx2, count, 1))
        if scan and full:
            parts = split_blocks(layers, [full, depth - full]) if full < depth else [layers]
            step = stepper(None)
            x, _ = jax.lax.scan(lambda x, layer: (step(x, layer), None), x, parts[0])
            rest = parts[1:]
        else:
            rest = split_blocks(layers, [1] * depth)
        for left, layer in zip(range(len(rest) - 1, -1, -1), rest, strict=True):
            x = stepper(None if left else rows)(x, jax.tree.map(lambda leaf: leaf[0], layer))
        return join_rows(x, count)

    keep_LxBx2 = None if keep_BxLx2 is None else keep_BxLx2.swapaxes(0, 1)
    return parallel.with_fsdp_gather(
        run,
        stacked,
        x_BxTxD,
        keep_LxBx2,
        (where_BxT, own, context),
        dtype=block.dtype,
        stacked=True,
    )
