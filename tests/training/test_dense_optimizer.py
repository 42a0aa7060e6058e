"""Parameters, groups and schedules of the published recipes of detection and segmentation, on the
abstract trees of ViT-B."""

import functools
import pathlib
from typing import Any

import jax
import numpy as np
import pytest

from m3i_jax import config as configuration
from m3i_jax import schema
from m3i_jax.parallel.sharding import path_text
from m3i_jax.training import optimizer, trainer
from m3i_jax.training.task import make_task

RULES = pathlib.Path(__file__).parents[1] / "data" / "dense" / "rules.npz"
CLASSES = {"coco": 80, "lvis": 1203, "ade20k": 150}
LAYERS = 12


@functools.cache
def recipe(name: str, spec: str = "") -> schema.Config:
    config = configuration.load_config(f"configs/transfer/{name}.py{spec}")
    config.data.update({"size": 118_000, "classes": CLASSES[name], "captions": "no"})
    return configuration.resolve(config)


@functools.cache
def leaves(name: str, spec: str = "") -> dict[str, jax.ShapeDtypeStruct]:
    params = jax.eval_shape(make_task(recipe(name, spec)).init, jax.random.key(0))
    found = jax.tree_util.tree_leaves_with_path(params)
    return {path_text(path): leaf for path, leaf in found}


def groups(name: str, spec: str = "") -> dict[str, tuple[Any, bool]]:
    """{path: (factor of the learning rate, decayed)}"""
    config, tree = recipe(name, spec), leaves(name, spec)
    assert not config.model.encoder.freeze_patch_embed and not config.model.encoder.freeze
    mask = optimizer.decay_mask(tree, rule=config.optim.decayed)  # flat, with the same paths
    return {
        path: (optimizer.lr_factor(config, path, leaf.shape), mask[path])
        for path, leaf in tree.items()
    }


def check_factors(found: dict[str, tuple[Any, bool]], decay: float) -> None:
    """A block's parameters, those of its relative positions too, count with the block, what is
    before the blocks with the patch embedding, and all the rest is above."""
    for path, (factor, _) in found.items():
        above = 0
        if path.startswith("encoder/blocks/"):
            above = np.arange(LAYERS, 0, -1)
        elif path.startswith("encoder/relative/block"):
            above = LAYERS - int(path.split("/")[2].removeprefix("block"))
        elif path.startswith("encoder/"):
            assert path.split("/")[1] in ("patch_embed", "positions", "cls_token"), path
            above = LAYERS + 1
        np.testing.assert_allclose(factor, decay**above, err_msg=path)


@pytest.mark.parametrize("name", ["coco", "lvis"])
def test_groups_of_vitdet(name: str) -> None:
    """Not decayed are the norms of the blocks (and a learned position table); the channel norms of
    pyramid and heads are, and biases, and relative positions."""
    found = groups(name)
    check_factors(found, 0.7)
    norms = {f"encoder/blocks/norm{i}/{part}" for i in (1, 2) for part in ("scale", "bias")}
    assert {path for path, (_, decayed) in found.items() if not decayed} == norms
    assert {
        "encoder/blocks/attention/qkv/bias",
        "encoder/patch_embed/bias",
        "encoder/relative/block2/rows",
        "pyramid/stride_4/scale_norm_0/scale",
        "pyramid/stride_32/norm_1/bias",
        "head/box/norm_0/scale",
        "head/mask/deconv/bias",
    } <= {path for path, (_, decayed) in found.items() if decayed}
    table = {"encoder": {"positions": leaves(name)["head/rpn/logits/kernel"]}}
    assert not optimizer.decay_mask(table, rule="but_norms")["encoder"]["positions"]


def test_groups_of_upernet() -> None:
    """Decayed is what has two axes or more, token and tables too; not what has one, and no
    bias."""
    found = groups("ade20k")
    check_factors(found, 0.65)
    one_axis = {
        path
        for path, leaf in leaves("ade20k").items()
        if leaf.ndim - path.startswith("encoder/blocks/") < 2
    }
    assert {path for path, (_, decayed) in found.items() if not decayed} == one_axis
    assert {path.split("/")[-1] for path in one_axis} == {"bias", "scale", "gamma1", "gamma2"}
    assert found["encoder/cls_token"][1] and found["encoder/relative/block0/table"][1]
    assert optimizer.decay_mask({"encoder": {"positions": np.ones((1, 5, 4))}}, rule="ranks") == {
        "encoder": {"positions": True}
    }


def test_norms_and_queries_of_transformer_heads_are_not_decayed() -> None:
    """PyTorch's own norms, and embeddings, which detectron2's optimizers leave out; InternImage's
    leaves out all norms, of which some are stacked here, and the offsets of heads."""
    found = groups("coco", ":head=mask2former,model=internimage_t")
    for path, (_, decayed) in found.items():
        query = path in {f"head/decoder/{n}" for n in ("queries", "positions", "levels")}
        assert decayed != (query or "norm" in path), path
    norms = [path for path in leaves("coco", ":head=dino") if "norm" in path]
    assert {p.split("/")[0] for p in norms if groups("coco", ":head=dino")[p][1]} == {"pyramid"}

    found = groups("ade20k", ":head=mask2former,model=internimage_h")
    assert "encoder/stage2/extra_norms/scale" in found
    for path, (_, decayed) in found.items():
        one_axis = path.endswith(("/bias", "/mask_token")) or "gamma" in path
        offsets = path.startswith("head/") and "offsets" in path
        assert decayed != ("norm" in path or one_axis or offsets), path


@pytest.mark.parametrize(
    ("name", "spec", "rates"),
    [
        # lr, weight decay, layer decay, drop path, clip, offsets of heads
        ("coco", "internimage_t", (1e-4, 0.05, 1.0, 0.2, 0.0, 1.0)),
        ("coco", "internimage_xl", (1e-4, 0.05, 0.94, 0.4, 0.0, 1.0)),
        ("coco", "internimage_t,head=dino", (1e-4, 1e-4, 0.9, 0.2, 0.1, 1.0)),
        ("coco", "internimage_h,head=dino", (1e-4, 1e-4, 0.94, 0.5, 0.1, 1e-3)),
        ("ade20k", "internimage_s", (6e-5, 0.05, 1.0, 0.3, 0.0, 1.0)),
        ("ade20k", "internimage_l", (2e-5, 0.05, 0.94, 0.4, 0.1, 1.0)),
        ("ade20k", "internimage_h", (2e-5, 0.05, 0.95, 0.5, 0.1, 1.0)),
        ("ade20k", "internimage_h,head=mask2former", (1e-5, 0.05, 0.95, 0.5, 0.1, 1.0)),
    ],
)
def test_intern_images_are_trained_as_by_their_authors(
    name: str, spec: str, rates: tuple[float, ...]
) -> None:
    """The numbers of InternImage's repository; a ViT's layer decay of 0.7 would leave the first of
    30 layers a rate of 2e-5 of the last one's."""
    config = recipe(name, f":model={spec}")
    o, e = config.optim, config.model.encoder
    found = (o.lr, o.weight_decay, o.layer_decay, e.drop_path, o.clip, o.head_offset_lr)
    assert found == pytest.approx(rates)
    assert (o.decayed, o.offset_lr, e.drop_path_rule) == ("ranks", 1.0, "linear")
    if name == "ade20k":
        assert config.dense.segment.test_whole == 32
        assert config.dense.segment.width == (1024 if "mask" in spec else 512)


def test_mask2former_on_a_small_internimage_has_its_authors_encoder_rate() -> None:
    o = recipe("ade20k", ":head=mask2former,model=internimage_t").optim
    assert (o.lr, o.layer_decay, o.encoder_lr, o.weight_decay) == (1e-4, 1.0, 0.1, 0.05)


def test_larger_vits_have_weaker_layer_decay_and_more_drop_path() -> None:
    for model, rates in (("vit_b16", (0.7, 0.1)), ("vit_l16", (0.8, 0.4))):
        config = recipe("coco", f":model={model}")
        assert (config.optim.layer_decay, config.model.encoder.drop_path) == rates
    config = recipe("coco", ":head=dino,model=vit_l16")
    assert (config.optim.layer_decay, config.model.encoder.drop_path) == (1.0, 0.4)


@pytest.mark.parametrize("name", CLASSES)
def test_schedules_are_those_of_the_references(name: str) -> None:
    """The multipliers that detectron2 and mmengine give, at the ends of every phase."""
    config, stored = recipe(name), np.load(RULES)
    length = trainer.run_length(config)
    rate = optimizer.lr_schedule(config.optim, steps=length.steps, warmup=length.warmup)
    steps = stored[f"schedules/{name}/steps"]
    assert steps[-1] == length.steps - 1  # the last that is taken
    got = np.array([float(rate(step)) for step in steps]) / config.optim.lr
    np.testing.assert_allclose(got, stored[f"schedules/{name}/multipliers"], rtol=2e-5, atol=1e-9)
    assert config.optim.lr == {"coco": 1e-4, "lvis": 2e-4, "ade20k": 1e-4}[name]


def test_the_parameters_of_mask_r_cnn_on_vit_b() -> None:
    """detectron2 has 110,895,792, of which 151,296 are a learned position table with a row for cls.
    Ours is fixed; learned, it is the same number."""
    counts = {}
    for positions in ("sincos", "learned"):
        config = configuration.load_config("configs/transfer/coco.py")
        config.data.update({"size": 118_000, "captions": "no"})
        config.model.encoder.positions = positions
        config.dense.maps.image_size = 224  # of pre-training
        tree = jax.eval_shape(make_task(configuration.resolve(config)).init, jax.random.key(0))
        sizes = {
            part: sum(leaf.size for leaf in jax.tree.leaves(tree[part]))
            for part in ("encoder", "pyramid", "head")
        }
        counts[positions] = sum(sizes.values())
    assert counts["learned"] == 110_895_792
    assert counts["learned"] - counts["sincos"] == 197 * 768
    rpn = sum(leaf.size for leaf in jax.tree.leaves(tree["head"]["rpn"]))
    assert (sizes["encoder"] + sizes["pyramid"], rpn, sizes["head"] - rpn) == (
        91_449_024,
        1_184_015,
        18_262_753,
    )


def test_heads_of_internimage_h_are_not_those_of_smaller_ones() -> None:
    """By the channels of the first stage, 64 and 320, not by the width of the fused features."""
    small, large = (
        recipe("ade20k", f":head=mask2former,model=internimage_{size}").dense.segment
        for size in "th"
    )
    assert (small.width, small.mask2former.heads, small.mask2former.queries) == (256, 8, 100)
    assert (large.width, large.mask2former.heads, large.mask2former.queries) == (1024, 32, 200)


def test_canvases_and_limits_of_multi_scale_detection() -> None:
    cases = {"t": ((480, 1344), (1344, 800)), "h": ((608, 2016), (2016, 1000))}
    for size, ((first, last), limits) in cases.items():
        config = recipe("coco", f":head=dino,model=internimage_{size},multi_scale=true")
        g = config.dense.geometry
        assert g.rule == "buckets" and (g.buckets[0], g.buckets[-1]) == (first, last)
        assert (config.data.image_size, g.test_short) == limits
        d, decay = config.dense.detect.dino, config.optim.layer_decay
        of_size = (0.5, 100, 0.9) if size == "t" else (0.0, 1000, 0.94)
        assert (g.crop_p, d.denoising, decay) == of_size and d.box_noise == 1.0
        assert all(side % 32 == 0 for side in g.buckets)
        image = make_task(config).batch_shapes()["image"].shape
        assert image[1] * image[2] == max(
            h * w for h, w in zip(g.buckets[::2], g.buckets[1::2], strict=True)
        )

    lvis = recipe("lvis", ":head=dino,model=internimage_h,multi_scale=true").dense.geometry
    assert (lvis.buckets[-2:], lvis.test_short) == ((1216, 2016), 1000)


def test_instances_of_mask2former_are_learnt_as_published() -> None:
    config = recipe("coco", ":head=mask2former,model=internimage_t")
    o, t = config.optim, config.train
    assert (o.lr, o.weight_decay, o.clip, o.encoder_lr) == (1e-4, 0.05, 0.01, 0.1)
    assert o.warmup_steps == 0 and recipe("coco", ":head=dino").optim.warmup_steps == 0
    assert (t.steps, t.batch_size, config.dense.geometry.scale) == (368_750, 16, (0.1, 2.0))
    task = make_task(config)
    params = jax.eval_shape(task.init, jax.random.key(0))
    assert params["head"]["decoder"]["classes"]["kernel"].shape == (256, 81)
    assert params["pyramid"] == {}
