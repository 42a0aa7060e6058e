"""The recipes of Tables 8 and 9: values, settings adopted from a run, and refusals."""

import pathlib
import re

import jax
import numpy as np
import pytest

from m3i_jax import config as configuration
from m3i_jax.errors import UserError
from m3i_jax.interop import tensor_files
from m3i_jax.models import vit
from m3i_jax.modes import setup as jobs
from m3i_jax.parallel.sharding import path_text
from m3i_jax.training import optimizer, plan, scaling
from m3i_jax.training.task import make_task
from m3i_jax.training.unused_model_settings import reject_unused_model_settings
from tests import toy
from tests.interop.published_vit import ENCODERS, weights


def load(spec: str):
    config = configuration.load_config(f"configs/transfer/{spec}")
    return configuration.resolve(config)


def on(size: int, spec: str):
    """The configuration completed for a source of `size` images."""
    return jobs.complete_config(load(spec), classes=10, captions=False, size=size)


def test_table_8() -> None:
    cfg = on(scaling.IMAGENET, "finetune.py:path=/images")
    o, a, t = cfg.optim, cfg.data.augment, cfg.train
    assert (o.lr, o.weight_decay, o.b1, o.b2, o.warmup_epochs, o.layer_decay, o.clip) == (
        2e-3,
        0.1,
        0.9,
        0.999,
        5.0,
        0.65,
        0.0,
    )
    assert (
        t.batch_size,
        t.epochs,
        cfg.objective.label_smoothing,
        cfg.model.encoder.drop_path,
    ) == (1024, 100.0, 0.1, 0.1)
    assert (a.mixup, a.cutmix, a.cutmix_switch, a.blend_p, a.erase_p) == (0.8, 1.0, 0.5, 1.0, 0.25)
    assert cfg.data.crop_scale == (0.08, 1.0)
    r = cfg.data.rand_augment
    assert (r.ops, r.magnitude, r.deviation, r.p) == (
        2,
        9.0,
        0.5,
        0.5,
    ) and cfg.objective.forms == ("finetune",)
    rates = [
        optimizer.lr_factor(cfg, f"encoder/{path}") for path in ("patch_embed/kernel", "cls_token")
    ]
    np.testing.assert_allclose(rates, 0.65**13)
    np.testing.assert_allclose(
        optimizer.lr_factor(cfg, "encoder/blocks/mlp/fc1/kernel"), 0.65 ** np.arange(12, 0, -1)
    )
    assert (
        optimizer.lr_factor(cfg, "category/kernel")
        == optimizer.lr_factor(cfg, "pool/norm/scale")
        == 1
    )


def test_deep_vits_are_fine_tuned_as_mae_s() -> None:
    """0.65 would leave the stem of a ViT-L a rate of 2e-5 of the head's."""
    for model, rates in (("vit_l16", (0.75, 0.2)), ("vit_h14", (0.75, 0.3))):
        cfg = on(scaling.IMAGENET, f"finetune.py:path=/images,model={model}")
        assert (cfg.optim.layer_decay, cfg.model.encoder.drop_path) == rates


def test_short_run_has_weak_augmentation() -> None:
    """6,000 images, 100 epochs: no mixup, CutMix, erasing and RandAugment, crops of at least half
    the image, and one learning rate for all layers."""
    cfg = on(5416, "finetune.py:path=/images,batch_size=64")
    a = cfg.data.augment
    assert (a.blend_p, a.erase_p, cfg.data.rand_augment.p, cfg.data.crop_scale) == (
        0.0,
        0.0,
        0.0,
        (0.5, 1.0),
    )
    assert cfg.optim.layer_decay == 1.0 and cfg.optim.lr > 2e-3 * 64 / 1024


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ("transfer/detect.py:images=/data", "images=/data needs annotations="),
        ("quickstart.py:model=vit_b16", "model=vit_b16 is not one of vit_tiny, internimage_pico"),
    ],
)
def test_arguments_that_a_recipe_would_not_follow_are_refused(recipe: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        configuration.load_config(f"configs/{recipe}")


def test_table_9() -> None:
    cfg = load("probe.py:path=/images")
    o = cfg.optim
    assert (o.rule, o.lr, o.weight_decay, o.b1, o.warmup_epochs) == ("lars", 3.2, 0.0, 0.9, 10.0)
    assert (
        cfg.train.batch_size,
        cfg.train.epochs,
        cfg.model.pool.norm,
        cfg.model.encoder.freeze,
    ) == (16_384, 90.0, "batch", True)
    assert load("probe.py:path=/images,kind=attentive").model.pool.query == "learned"
    with pytest.raises(UserError, match="kind=round is not one of"):
        load("probe.py:kind=round")


@pytest.mark.parametrize("name", ["finetune.py", "probe.py"])
def test_model_is_taken_from_the_run(name: str, tmp_path: pathlib.Path) -> None:
    (tmp_path / "config.txt").write_text(configuration.config_to_text(toy.settings()))
    cfg = load(f"{name}:path=/images,from={tmp_path}")
    assert (cfg.model.encoder.width, cfg.model.encoder.depth, cfg.data.image_size) == (32, 2, 32)
    assert cfg.init_from == str(tmp_path) and cfg.optim.ema == 1.0
    assert cfg.evaluate.query_limit == 50_000  # published accuracies are those of all
    with pytest.raises(UserError, match="give the workdir of a run"):
        load(f"{name}:from={tmp_path / 'nothing'}")
    with pytest.raises(UserError, match="did you mean from=|it takes"):
        load(f"{name}:form={tmp_path}")


@pytest.mark.parametrize("name", ["finetune.py", "probe.py"])
def test_model_is_taken_from_a_weights_file(name: str, tmp_path: pathlib.Path) -> None:
    table = weights(ENCODERS["timm"], width=128, depth=2, heads=2, patch=8, grid=4)
    tensor_files.write_safetensors(tmp_path / "vit.safetensors", table)
    cfg = load(f"{name}:path=/images,from={tmp_path / 'vit.safetensors'}")
    e = cfg.model.encoder
    assert (e.width, e.depth, e.heads, e.positions, cfg.data.image_size) == (
        128,
        2,
        2,
        "learned",
        32,
    )
    assert cfg.init.only == ("^encoder/",)
    # matrix products as in any other run, and as many heads of a probe as the encoder has
    assert (cfg.model.dtype, cfg.model.pool.heads) == ("bfloat16", 2)


@pytest.mark.parametrize("origin", ["probe.py:path=/images", "finetune.py:path=/images"])
def test_a_new_run_has_no_settings_of_the_head_before(origin: str, tmp_path: pathlib.Path) -> None:
    """A probe freezes its encoder, and both have another pooling and initial head."""
    source = configuration.load_config(f"configs/transfer/{origin}")
    source.model.pool.update({"width": 384, "heads": 4})
    (tmp_path / "config.txt").write_text(
        configuration.config_to_text(configuration.resolve(source))
    )
    tuned = load(f"finetune.py:path=/images,from={tmp_path}").model
    assert (tuned.encoder.freeze, tuned.pool.norm, tuned.pool.kind) == (False, "layer", "mean")
    assert (tuned.pool.width, tuned.pool.heads) == (384, 4)
    probe = load(f"probe.py:path=/images,kind=attentive,from={tmp_path}").model
    assert (probe.encoder.freeze, probe.pool.projection, probe.category_std) == (True, True, 0.0)
    assert (probe.pool.norm, probe.pool.query) == ("layer", "learned")
    linear = load(f"probe.py:path=/images,from={tmp_path}").model
    assert (linear.pool.norm, linear.pool.projection, linear.category_std) == ("batch", False, 0.01)
    for recipe in ("detect.py:annotations=a.json", "ade20k.py:path=/images"):
        assert not load(f"{recipe},from={tmp_path}").model.encoder.freeze


def test_another_image_size_keeps_the_position_grid(tmp_path: pathlib.Path) -> None:
    (tmp_path / "config.txt").write_text(configuration.config_to_text(toy.settings()))
    cfg = load(f"finetune.py:from={tmp_path},image_size=48,ema=0.99,batch_size=512")
    assert (cfg.model.encoder.position_grid, cfg.grid, cfg.optim.ema_of) == (4, 6, "all")


@pytest.mark.parametrize(
    "changes",
    [
        {"model__encoder__positions": "rope", "model__encoder__position_grid": 7},
        {"model__encoder__rope_base": 50.0, "model__intern_image__kernel": 3},
    ],
)
def test_what_an_earlier_version_accepted_is_not_taken_over(
    tmp_path: pathlib.Path, changes: dict[str, object]
) -> None:
    """A network reads none of these, and training refuses them: also where fine-tuning on larger
    images would set the grid."""
    (tmp_path / "config.txt").write_text(configuration.config_to_text(toy.settings(**changes)))
    with pytest.raises(UserError, match=r"has no effect with model\.(encoder\.pos|backbone)"):
        reject_unused_model_settings(toy.settings(**changes))
    for recipe in ("finetune.py:image_size=48", "probe.py:batch_size=64"):
        reject_unused_model_settings(load(f"{recipe},from={tmp_path}"))


def saved_as(config, path: pathlib.Path) -> str:
    path.mkdir()
    (path / "config.txt").write_text(configuration.config_to_text(config))
    return str(path)


def test_positions_stay_those_of_the_first_training(tmp_path: pathlib.Path) -> None:
    """Through fine-tuning on larger images, dense tasks, and back: 32 pixels, 4 patches a side."""
    first = saved_as(toy.settings(), tmp_path / "first")
    large = saved_as(load(f"finetune.py:from={first},image_size=48"), tmp_path / "large")
    dense = saved_as(
        load(f"detect.py:annotations=a.json,from={large},image_size=96"), tmp_path / "dense"
    )
    again = saved_as(
        load(f"detect.py:annotations=a.json,from={dense},image_size=64"), tmp_path / "again"
    )
    for source, sizes in ((large, (32, 64)), (dense, (0,)), (again, (32, 128))):
        for size in sizes:
            cfg = load(f"finetune.py:from={source},image_size={size}")
            assert (cfg.model.encoder.position_grid or cfg.grid) == 4
        cfg = load(f"probe.py:from={source}")
        assert cfg.grid > 4 and cfg.model.encoder.position_grid == 4
    assert vit.position_size(load(f"detect.py:from={again}")) == 32


def test_learned_positions_are_those_of_the_table(tmp_path: pathlib.Path) -> None:
    """Which is resized when a run starts: its grid is that of the images before."""
    learned = {"model__encoder__positions": "learned", "model__encoder__position_grid": 2}
    first = saved_as(toy.settings(**learned), tmp_path / "first")
    large = saved_as(load(f"finetune.py:from={first},image_size=48"), tmp_path / "large")
    assert load(f"detect.py:from={large}").dense.maps.image_size == 48
    assert load(f"detect.py:from={first}").dense.maps.image_size == 32


def test_intern_image_has_the_paper_s_30_epochs(tmp_path: pathlib.Path) -> None:
    cfg = on(10 * scaling.IMAGENET, "finetune.py:path=/images,model=internimage_t")
    assert (cfg.train.epochs, cfg.optim.layer_decay, cfg.data.augment.mixup, cfg.optim.lr) == (
        30.0,
        0.9,
        0.0,
        2e-3,
    )
    # Pre-trained weights are fine-tuned as by their authors.
    (tmp_path / "config.txt").write_text(
        configuration.config_to_text(load("finetune.py:path=/images,model=internimage_h"))
    )
    cfg = on(scaling.IMAGENET, f"finetune.py:path=/images,from={tmp_path},batch_size=512")
    o, e = cfg.optim, cfg.model.encoder
    assert (o.lr, o.warmup_epochs, o.offset_lr, o.center_lr, o.clip) == (2e-5, 2.0, 0.1, 0.1, 5.0)
    assert (cfg.model.scan, e.drop_path, e.drop_path_rule) == (True, 0.2, "linear")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model__pool__norm": "batch"}, "model.pool.norm"),
        (
            {"model__pool__norm": "batch", "model__pool__kind": "mean"},
            "model.pool.projection=false",
        ),
        ({"data__rand_augment__magnitude": 11.0}, "data.rand_augment.magnitude"),
        ({"data__augment__mixup": -1.0}, "data.augment.mixup"),
        ({"evaluate__crop": 0.0}, "evaluate.crop"),
        ({"evaluate__shots": "(0,1)"}, "evaluate.shots"),
    ],
)
def test_impossible_values(change: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        toy.settings(**change)


def test_a_batch_norm_of_the_pooling_has_no_captions() -> None:
    """Zero-shot and retrieval have no statistics for it, and would compare other features."""
    mean = {"model__pool__kind": "mean", "model__pool__projection": "false"}
    captions = toy.settings(model__pool__norm="batch", objective__forms="clip", **mean)
    with pytest.raises(UserError, match=r"model.pool.norm: 'batch' has no statistics .* layer"):
        plan.build_plan(captions)
    labels = toy.settings(model__pool__norm="batch", objective__forms="supervised", **mean)
    assert plan.build_plan(labels).where("category")


@pytest.mark.parametrize(
    ("recipe", "strides", "head"),
    [
        ("coco.py:head=dino", {8: 256, 16: 256, 32: 256, 64: 256}, 18_055_592),
        ("lvis.py:head=dino", {8: 256, 16: 256, 32: 256, 64: 256}, 18_920_302),
        (
            "objects365.py:head=dino,model=internimage_t",
            {8: 128, 16: 256, 32: 512},
            20_552_983,
        ),
    ],
)
def test_dino_on_published_data(recipe: str, strides: dict, head: int) -> None:
    """On a ViT the maps come from a pyramid, the last one too (as in detrex), on an InternImage
    from its stages; boxes only; layers of categories are named."""
    cfg = load(recipe)
    task = make_task(cfg)
    params = jax.eval_shape(task.init, jax.random.key(0))
    assert task.pyramid().channels == strides and "masks" not in task.annotation_shapes()
    assert sum(leaf.size for leaf in jax.tree.leaves(params["head"])) == head
    assert (cfg.dense.detect.detections, cfg.dense.detect.score_threshold) == (300, 0.0)
    assert (cfg.dense.detect.loss == "federated") == recipe.startswith("lvis")
    of_categories = {
        path
        for key, _ in jax.tree_util.tree_leaves_with_path(params)
        if any(re.search(p, path := path_text(key)) for p in task.category_parameters)
    }
    parts = {"decoder/heads", "encoder/proposals/heads", "labels"}
    found = {
        p.removeprefix("head/").split("/classes")[0].removesuffix("/layers") for p in of_categories
    }
    assert found == parts


@pytest.mark.parametrize(
    ("options", "scales", "average"),
    [
        ("head=upernet", (0.5, 0.75, 1.0, 1.25, 1.5, 1.75), "auto"),
        ("head=mask2former", (0.5, 0.75, 1.0, 1.25, 1.5, 1.75), "auto"),
        (
            "head=mask2former,model=internimage_h,image_size=896",
            (768 / 896, 832 / 896, 1.0, 960 / 896, 1024 / 896),
            "softmax",
        ),
    ],
)
def test_views_of_published_segmentation(options: str, scales: tuple, average: str) -> None:
    """InternImage-H has its authors' scales, and averages the softmax of Mask2Former's sums."""
    segment = load(f"ade20k.py:{options},multi_scale=true").dense.segment
    assert tuple(segment.test_scales) == pytest.approx(scales)
    assert (segment.test_flip, segment.test_average) == (True, average)


@pytest.mark.parametrize("head", ["dino", "mask2former"])
@pytest.mark.parametrize("size", [96, 512])
def test_every_object_of_own_images_has_a_query(head: str, size: int) -> None:
    config = load(f"detect.py:annotations=objects.json,head={head},image_size={size}")
    queries = getattr(config.dense.detect, head).queries
    assert config.dense.geometry.max_objects == min(100, queries)


def test_images_of_own_annotations_are_beside_them_unless_named() -> None:
    for file, directory in (("objects.json", "."), ("/data/pets/objects.json", "/data/pets")):
        assert load(f"detect.py:annotations={file}").data.path == directory
        assert load(f"detect.py:annotations={file},images=photos").data.path == "photos"
    assert load("detect.py").data.path == ""
