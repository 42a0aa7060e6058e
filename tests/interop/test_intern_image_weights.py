"""Weights under the published names: what they compute in our net is what they compute in
theirs."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from m3i_jax.errors import UserError
from m3i_jax.interop import intern_image_weights as interop
from m3i_jax.models import intern_image, intern_image_backbone
from m3i_jax.models.intern_image import InternImageConfig
from tests.interop import published
from tests.interop.published import Net
from tests.saved import flat

jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

# One of each kind: T, L (post-norm, layer scale, offsets doubled), H (res-post-norm, centre scale,
# extra norms, fused).
NETS = {
    "t": Net(8, (1, 1, 1, 1), (1, 2, 4, 8), "pre"),
    "l": Net(8, (1, 1, 2, 1), (1, 2, 4, 8), "post", scale=True, offset_scale=2.0),
    "h": Net(
        8,
        (1, 1, 3, 1),
        (1, 2, 4, 8),
        "res_post",
        kernel=5,
        center=True,
        posts=(1,),
        fused=6,
        pooled=5,
    ),
}
OURS = {
    "t": InternImageConfig(norm="pre", kernel=3, center_scale=False, extra_norm=0, fused=0, width=8, depths=(1, 1, 1, 1), groups=(1, 2, 4, 8)),
    "l": InternImageConfig(
        norm="post", layer_scale=1e-5, offset_scale=2.0, kernel=3, center_scale=False, extra_norm=0, fused=0, width=8, depths=(1, 1, 2, 1),
        groups=(1, 2, 4, 8),
    ),
    "h": InternImageConfig(extra_norm=2, fused=6, width=8, depths=(1, 1, 3, 1), groups=(1, 2, 4, 8)),
}  # fmt: skip
SIZES = {"t": (32, 64), "l": (32, 32), "h": (64, 32)}


def shapes_of(tree):
    return jax.tree.map(np.shape, tree)


@pytest.mark.parametrize("kind", [pytest.param("t", marks=pytest.mark.slow), "l", "h"])
def test_loaded_weights_compute_what_they_did(kind):
    images = np.random.default_rng(1).normal(size=(2, *SIZES[kind], 3)).astype(np.float32)
    state = published.weights(NETS[kind])
    theirs = published.Run(NETS[kind], state, images)
    tree = interop.load_intern_image({"model": state})["encoder"]
    assert shapes_of(tree) == intern_image.shapes(OURS[kind])

    def run(params):
        maps = intern_image.feature_maps(OURS[kind], params, images)
        return maps, intern_image.fuse(OURS[kind], params, maps) if OURS[kind].fused else None

    ours, tokens = jit(run)(tree)
    for mine, other in zip(ours, theirs.maps, strict=True):
        assert mine.shape == other.shape
        np.testing.assert_allclose(mine, other, rtol=0, atol=2e-5 * np.abs(other).max())
    if tokens is not None:
        np.testing.assert_allclose(
            tokens, theirs.fused(), rtol=0, atol=2e-5 * np.abs(theirs.fused()).max()
        )


@pytest.mark.parametrize("hugging_face", (False, True))
@pytest.mark.parametrize("kind", NETS)
def test_there_and_back_is_the_same_file(kind, hugging_face):
    state = {
        name: array
        for name, array in published.weights(NETS[kind]).items()
        if not name.endswith("tracked")
    }
    if hugging_face:
        state = {interop.hugging_face_name(name): array for name, array in state.items()}
    back = interop.store_intern_image(interop.load_intern_image(state), hugging_face=hugging_face)
    assert set(back) == set(state)
    for name, array in state.items():
        np.testing.assert_array_equal(back[name], array, err_msg=name)


# Names and shapes of files as they are published, a few of each kind.
GOLDEN = {
    "t": {
        "patch_embed.conv1.weight": (32, 3, 3, 3),
        "levels.2.blocks.17.dcn.dw_conv.0.weight": (256, 1, 3, 3),
        "levels.2.blocks.17.dcn.offset.weight": (16 * 18, 256),
        "levels.3.norm.0.weight": (512,),
        "conv_head.0.weight": (768, 512, 1, 1),
        "conv_head.1.0.running_var": (768,),
        "head.weight": (1000, 768),
    },
    "h": {
        "levels.2.post_norms.4.0.bias": (1280,),
        "levels.2.blocks.31.res_post_norm2.0.weight": (1280,),
        "levels.3.blocks.5.dcn.center_feature_scale_proj_weight": (80, 2560),
        "levels.3.blocks.5.dcn.dw_conv.0.weight": (2560, 1, 5, 5),
        "dcnv3_head_x4.0.weight": (4096, 2560, 1, 1),
        "dcnv3_head_x3.weight": (1024, 1280, 1, 1),
        "clip_projector.cross_dcn.q_bias": (1024,),
        "clip_projector.cross_dcn.proj.weight": (768, 1024),
        "fc_norm.0.weight": (768,),
    },
}
_H = {"kernel": 5, "center": True, "posts": (5, 11, 17, 23, 29), "fused": 1024, "pooled": 768}
FULL = {
    "t": Net(64, (4, 4, 18, 4), (4, 8, 16, 32), "pre", classes=1000),
    "h": Net(320, (6, 6, 32, 6), (10, 20, 40, 80), "res_post", classes=1000, **_H),
}


@pytest.mark.parametrize("kind", FULL)
def test_full_size_names_shapes_and_counts(kind):
    file = published.shapes(FULL[kind])
    assert GOLDEN[kind].items() <= file.items()
    # Golden: parameters with the head of 1,000 classes; running statistics are none.
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    total = sum(
        int(np.prod(shape)) for name, shape in file.items() if not name.endswith(statistics)
    )
    assert total == {"t": 29_918_424, "h": 1_089_636_760}[kind]
    empty = {name: np.broadcast_to(np.float32(0), shape) for name, shape in file.items()}
    if kind == "h":
        empty = {
            name: array
            for name, array in empty.items()
            if not name.startswith("levels.") or name.startswith("levels.2.post")
        }
    tree = interop.load_intern_image(empty)
    ours = intern_image.shapes(intern_image.PRESETS[f"internimage_{kind}"])
    assert shapes_of(tree["encoder"]["stem"]) == ours["stem"]
    if kind == "t":
        assert shapes_of(tree["encoder"]) == {
            name: part for name, part in ours.items() if name != "fusion"
        }
        name, sizes = intern_image_backbone.match_preset(
            {path: array.shape for path, array in flat(tree["encoder"]).items()}
        )
        assert (name, sizes["encoder"]["patch_size"], sizes["encoder"]["width"]) == (
            "internimage_t",
            32,
            512,
        )
    else:
        assert shapes_of(tree["encoder"]["fusion"]) == ours["fusion"]
        assert shapes_of(tree["encoder"]["stage2"]["extra_norms"]) == ours["stage2"]["extra_norms"]
        # of models.pooling
        assert set(tree["pool"]) == {
            "key",
            "norm_key",
            "norm_query",
            "norm_value",
            "out",
            "query",
            "value",
        }


@pytest.mark.parametrize("fused", (0, 64))
@pytest.mark.parametrize("name", intern_image.PRESETS)
def test_a_preset_is_known_by_its_shapes_alone(name, fused):
    net = dataclasses.replace(intern_image.PRESETS[name], fused=fused)
    leaves = jax.tree_util.tree_leaves_with_path(
        intern_image.shapes(net), is_leaf=lambda node: isinstance(node, tuple)
    )
    shapes = {"/".join(key.key for key in path): shape for path, shape in leaves}
    found, sizes = intern_image_backbone.match_preset(shapes)
    assert found == name and sizes["intern_image"]["offset_scale"] == net.offset_scale
    assert (sizes["encoder"]["patch_size"], sizes["encoder"]["width"]) == (
        net.stride,
        fused or 8 * net.width,
    )
    assert (
        intern_image_backbone.match_preset(
            {path: shape for path, shape in shapes.items() if path != "stage3/norm/scale"}
            | {"x": (1,)}
        )
        is None
    )


def test_the_learned_fill_has_no_place_in_a_published_file():
    state = {
        name: array
        for name, array in published.weights(NETS["t"]).items()
        if not name.endswith("tracked")
    }
    tree = interop.load_intern_image(state)
    tree["encoder"]["mask_token"] = np.zeros((1, 1, 1, 8))
    assert set(interop.store_intern_image(tree)) == set(state)


def test_other_files_are_refused():
    with pytest.raises(UserError, match="blocks.0.attn.qkv.weight"):
        interop.load_intern_image({"blocks.0.attn.qkv.weight": np.zeros((3, 1))})
    state = published.weights(NETS["l"])
    with pytest.raises(UserError, match="stage2/layers/gamma1.*layer 0 of 2"):
        interop.load_intern_image(
            {name: array for name, array in state.items() if name != "levels.2.blocks.0.gamma1"}
        )
    with pytest.raises(UserError, match="decoder/embed/kernel"):
        interop.store_intern_image({"decoder": {"embed": {"kernel": np.zeros(1)}}})
