"""The table from paths to shardings: the parameters, and the moments and the target that follow
them."""

import math

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from m3i_jax import parallel, schema
from m3i_jax.parallel import sharding
from m3i_jax.training import trainer
from tests import toy

FIRST, SECOND, TABLE = P(None, "fsdp", "tensor"), P(None, "tensor", "fsdp"), P("tensor", "fsdp")


@pytest.fixture(scope="module")
def mesh() -> Mesh:
    return parallel.make_mesh((2, 2, 2))


@pytest.mark.parametrize(
    ("path", "shape", "wanted"),
    [
        ("encoder/blocks/attention/qkv/kernel", (12, 768, 2304), FIRST),
        ("encoder/blocks/mlp/fc1/kernel", (12, 768, 3072), FIRST),
        ("encoder/blocks/attention/out/kernel", (12, 768, 768), SECOND),
        ("decoder/blocks/mlp/fc2/kernel", (4, 3072, 768), SECOND),
        ("pool/query/kernel", (768, 768), P("fsdp", "tensor")),
        ("pool/key/kernel", (768, 768), P("fsdp", "tensor")),
        ("pool/value/kernel", (768, 768), P("fsdp", "tensor")),
        ("pool/out/kernel", (768, 768), P("tensor", "fsdp")),
        ("text/token_table", (49408, 768), TABLE),
        ("text/positions", (77, 768), P()),
        ("encoder/patch_embed/kernel", (768, 768), P("fsdp", None)),
        ("decoder/head/kernel", (768, 768), P("fsdp", None)),
        ("category/kernel", (768, 1000), P("fsdp", None)),
        ("heads/global/prototypes", (65536, 256), P("fsdp", None)),
        ("heads/global/prototype_norms", (65536,), P()),
        ("image_projection/kernel", (768, 768), P("fsdp", None)),
        ("encoder/blocks/norm1/scale", (12, 1536), P()),
        ("encoder/blocks/mlp/fc1/bias", (12, 3072), P()),
        ("encoder/stage2/layers/dcn/input/kernel", (32, 1280, 1280), FIRST),
        ("encoder/stage2/layers/dcn/output/kernel", (32, 1280, 1280), SECOND),
        ("encoder/stage2/layers/dcn/offsets/kernel", (32, 1280, 720), FIRST),
        ("encoder/stage2/layers/dcn/center/kernel", (32, 1280, 40), FIRST),
        ("encoder/stage2/layers/dcn/depthwise/kernel", (32, 5, 5, 1280), P()),
        ("encoder/stage2/layers/mlp/fc2/kernel", (32, 5120, 1280), SECOND),
        ("encoder/stage2/down/conv/kernel", (3, 3, 1280, 2560), P(None, None, "fsdp", None)),
        ("encoder/stage2/layers/norm1/scale", (32, 1280), P()),
        ("encoder/stem/conv1/kernel", (3, 3, 3, 160), P()),
        ("encoder/fusion/deep/kernel", (2560, 4096), P("fsdp", "tensor")),
        ("logit_scale", (), P()),
        ("step", (), P()),
        ("opt/balance/ssp", (), P()),
        ("opt/adamw/0/mu/encoder/blocks/mlp/fc1/kernel", (12, 768, 3072), FIRST),
        ("opt/target/params/encoder/blocks/attention/out/kernel", (12, 768, 768), SECOND),
    ],
)
def test_table(mesh: Mesh, path: str, shape: tuple[int, ...], wanted: P) -> None:
    assert sharding.partition_spec(path, shape, mesh) == wanted


@pytest.mark.parametrize(
    ("shape", "wanted"),
    [
        # an axis that does not divide its dimension is dropped, the others stay
        ((2, 771, 2304), P(None, None, "tensor")),
        ((2, 768, 2305), P(None, "fsdp", None)),
        ((2, 771, 2305), P()),
        ((768, 2304), P("fsdp", "tensor")),  # without a layer axis
        ((3, 2, 768, 2304), P(None, None, "fsdp", "tensor")),
        ((768 * 2304,), P()),  # too few dimensions for the rule
    ],
)
def test_divisibility_and_leading_axes(mesh: Mesh, shape: tuple[int, ...], wanted: P) -> None:
    assert sharding.partition_spec("blocks/attention/qkv/kernel", shape, mesh) == wanted


def test_small_arrays_are_copied(mesh: Mesh) -> None:
    assert sharding.SMALL == 2**14
    assert sharding.partition_spec("fc1/kernel", (128, 128), mesh) == P("fsdp", "tensor")
    assert sharding.partition_spec("fc1/kernel", (128, 126), mesh) == P()


@pytest.mark.parametrize(
    ("shape", "wanted"),
    [
        ((8, 1, 1), P()),
        ((1, 8, 1), P("fsdp", None)),
        ((1, 1, 8), P(None, "tensor")),
        ((2, 4, 1), P("fsdp", None)),
        ((1, 2, 4), P("fsdp", "tensor")),
    ],
)
def test_axes_of_one_device_are_not_named(shape: tuple[int, int, int], wanted: P) -> None:
    assert sharding.partition_spec("fc1/kernel", (768, 768), parallel.make_mesh(shape)) == wanted


def test_the_first_rule_that_matches_decides_and_one_always_does() -> None:
    assert sharding.RULES[-1][0] == ""
    kernels = [i for i, (pattern, _) in enumerate(sharding.RULES) if pattern == "kernel$"]
    assert kernels == [len(sharding.RULES) - 2]  # after the rules for particular kernels


def test_paths_of_all_kinds_of_keys() -> None:
    state = trainer.Trainer(
        toy.settings(), parallel.make_mesh((1, 1, 1), jax.devices()[:1]), toy.VOCABULARY
    ).template
    paths = {sharding.path_text(path) for path, _ in jax.tree_util.tree_leaves_with_path(state)}
    wanted = {
        "step",
        "params/logit_scale",
        "params/encoder/blocks/mlp/fc1/kernel",
        "opt/balance/ssp",
        "opt/target/count",
    }
    assert (
        wanted
        | {
            "opt/adamw/0/mu/encoder/blocks/mlp/fc1/kernel",
            "opt/target/params/encoder/blocks/mlp/fc1/kernel",
        }
        <= paths
    )


@pytest.fixture(scope="module")
def state():
    """Shapes of the whole state of the paper's ViT-B/16 with ImageNet's categories and CLIP's
    words."""
    config = schema.Config(data=schema.Data(classes=1000, captions="yes", size=1_281_167))
    return trainer.Trainer(
        config, parallel.make_mesh((1, 1, 1), jax.devices()[:1]), 49_408
    ).template


def test_moments_and_target_are_split_as_their_parameters(mesh: Mesh, state) -> None:
    split = parallel.tree_shardings(mesh, state)
    adam = split.opt["adamw"][0]
    assert jax.tree.leaves(adam.mu) == jax.tree.leaves(adam.nu) == jax.tree.leaves(split.params)
    assert jax.tree.leaves(split.opt["target"].params) == jax.tree.leaves(split.params["encoder"])
    assert split.params["encoder"]["blocks"]["mlp"]["fc1"]["kernel"].spec == FIRST
    assert jax.tree.structure(split) == jax.tree.structure(state)


def test_fsdp_over_eight_devices_holds_an_eighth(state) -> None:
    mesh = parallel.make_mesh((1, 8, 1))
    count = lambda shape: math.prod(shape)
    pairs = list(
        zip(
            jax.tree.leaves(state),
            jax.tree.leaves(parallel.tree_shardings(mesh, state)),
            strict=True,
        )
    )
    held, whole = (
        sum(sizes)
        for sizes in zip(
            *((count(s.shard_shape(leaf.shape)), count(leaf.shape)) for leaf, s in pairs),
            strict=True,
        )
    )
    # norms, biases, positions and the statistics are whole on each
    assert 1 / 8 < held / whole < 1.02 / 8


def test_splitting_an_array_keeps_its_content(mesh: Mesh) -> None:
    tree = {
        "fc1": {"kernel": jnp.arange(2.0**15).reshape(128, 256)},
        "norm": {"scale": jnp.ones(2**15)},
    }
    put = jax.device_put(tree, parallel.tree_shardings(mesh, tree))
    assert put["fc1"]["kernel"].addressable_shards[0].data.shape == (64, 128)
    assert put["norm"]["scale"].addressable_shards[0].data.shape == (2**15,)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), put, tree))
