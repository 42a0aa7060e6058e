"""A backbone from outside the package: a value, a line that registers it, and this test of it. No
file of the package knows it. With it, a head and an update rule from outside are trained."""

import dataclasses
import functools
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from m3i_jax import config as configuration
from m3i_jax import parallel, schema
from m3i_jax.errors import UserError
from m3i_jax.evaluation import load
from m3i_jax.models import backbones, networks, presets
from m3i_jax.models.backbone import Backbone
from m3i_jax.models.dense import task_heads
from m3i_jax.models.initializers import init_params
from m3i_jax.models.layers import gelu
from m3i_jax.models.transfer import Finetuning, Reference
from m3i_jax.modes import export
from m3i_jax.objective import mixing
from m3i_jax.parallel import sharding
from m3i_jax.training import plan, scaling, teachers, trainer, update_rules
from m3i_jax.training.dense_task import normalize_images
from m3i_jax.training.task import make_task
from tests import dense_toy, saved, toy


def _init(model: schema.Model, rng: jax.Array, *, mask_token: bool, grid: int) -> Any:
    e = model.encoder
    width = {"kernel": (e.width, e.width), "bias": (e.width,)}
    shapes = {
        "embed": {"kernel": (3 * e.patch_size**2, e.width), "bias": (e.width,)},
        **{f"layer{i}": width for i in range(e.depth)},
        **({"mask_token": (1, 1, e.width)} if mask_token else {}),
    }
    return init_params(rng, shapes, {"mask_token": 0.02})


def _apply(
    model: schema.Model,
    params: Any,
    patches_BxNxP: jax.Array,
    *,
    grid: int,
    index_BxK: jax.Array | None = None,
    keep_BxLx2: jax.Array | None = None,
    hidden_BxN: jax.Array | None = None,
    blocks: int = 1,
) -> jax.Array:
    """Every layer sees a cell and the mean of all cells."""
    if index_BxK is not None:
        patches_BxNxP = mixing.gather(patches_BxNxP, index_BxK)
    z = patches_BxNxP @ params["embed"]["kernel"] + params["embed"]["bias"]
    if hidden_BxN is not None:
        z = jnp.where(hidden_BxN[..., None], params["mask_token"], z)
    for i in range(model.encoder.depth):
        layer = params[f"layer{i}"]
        z = z + gelu((z + z.mean(1, keepdims=True)) @ layer["kernel"] + layer["bias"])
    return z.astype(model.dtype)


def _stages(
    model: schema.Model,
    params: Any,
    images_BxHxWx3: jax.Array,
    *,
    maps: schema.Maps,
    size: int,
    keep_BxLx2: jax.Array | None = None,
    before: Any = None,
) -> tuple[jax.Array, ...]:
    """Maps of the stride of a patch and of twice it."""
    p, (b, h, w, _) = model.encoder.patch_size, images_BxHxWx3.shape
    cells = images_BxHxWx3.reshape(b, h // p, p, w // p, p, 3).swapaxes(2, 3)
    z = _apply(model, params, cells.reshape(b, -1, 3 * p * p), grid=h // p)
    first = z.reshape(b, h // p, w // p, -1)
    return first, first[:, ::2, ::2]


def _validate(config: schema.Config) -> None:
    if config.model.encoder.final_norm:
        raise UserError("config.model.encoder.final_norm: must be false, my_mlp has none")


def _layers_above(model: schema.Model, path: str) -> int:
    depth = model.encoder.depth
    return depth - 1 - int(path[5]) if path.startswith("layer") else depth


MLP = Backbone(
    init=_init,
    apply=_apply,
    depth=lambda model: model.encoder.depth,
    layers_above=_layers_above,
    describe=lambda model: f"{model.encoder.depth} mixing layers of {model.encoder.width}",
    stages=_stages,
    map_strides=lambda model, maps: (model.encoder.patch_size, 2 * model.encoder.patch_size),
    can_drop_tokens=True,
    validate=_validate,
    presets={"my_mlp_s": {"encoder": {"width": 48, "depth": 3, "cls_token": False}}},
    clip=2.0,
    finetuning=Finetuning(
        reference=Reference(lr=7e-4, batch=8, samples=2e6, most=8e-4),
        epochs=7.0,
        layer_decay=lambda model: 0.5,
        settings={"optim.weight_decay": 0.03},
    ),
    sharding_rules=((r"my_mlp_only/kernel$", ("tensor", "fsdp")),),
)
SETTINGS = {
    "model__backbone": "my_mlp",
    "model__encoder__cls_token": "false",
    "optim__layer_decay": "0.5",
}


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(sharding, "_added", list(sharding._added))
    with backbones.BACKBONES.temporary():
        backbones.register_backbone("my_mlp", MLP)
        yield


@pytest.mark.parametrize("form", ["sim", "mim"])
def test_it_trains_a_step(form: str) -> None:
    """With mixed images and a momentum target; and with dropped cells."""
    config = toy.settings(**SETTINGS, objective__forms=form)
    one = parallel.make_mesh((1, 1, 1), jax.devices()[:1])
    trained = trainer.Trainer(config, one, toy.VOCABULARY)
    state = trained.init()
    before = jax.device_get(state.params["encoder"])
    for seed in range(2):  # the warm-up begins with a rate of 0
        state, metrics = trained.step(state, toy.batch(config, seed))
    assert np.isfinite(metrics["loss"])
    moved = jax.tree.map(
        lambda a, b: float(np.abs(a - b).max()), before, jax.device_get(state.params["encoder"])
    )
    assert sorted(moved) == ["embed", "layer0", "layer1"] and min(jax.tree.leaves(moved)) > 0


def test_its_checks_presets_and_rules_are_known() -> None:
    with pytest.raises(UserError, match="must be false, my_mlp has none"):
        plan.build_plan(toy.settings(**SETTINGS | {"model__encoder__final_norm": "true"}))
    with pytest.raises(UserError, match=r"encoder.cls_token: my_mlp has no cls token"):
        plan.build_plan(toy.settings(**SETTINGS | {"model__encoder__cls_token": "true"}))

    def init_without(model: Any, rng: Any, *, mask_token: bool, grid: int) -> Any:
        return _init(model, rng, mask_token=False, grid=grid)

    filled = dataclasses.replace(MLP, init=init_without, can_drop_tokens=False, presets={})
    backbones.register_backbone("my_filled", filled)
    masked = toy.settings(**SETTINGS | {"model__backbone": "my_filled"}, objective__forms="mim")
    with pytest.raises(UserError, match="my_filled has no parameter for hidden cells"):
        trainer.Trainer(masked, parallel.make_mesh((1, 1, 1), jax.devices()[:1]), 0).init()
    with pytest.raises(UserError, match=r"objective.isolate.*model.backbone=my_mlp"):
        plan.build_plan(toy.settings(**SETTINGS, objective__isolate="true"))
    config = configuration.default_config()
    presets.apply_preset(config, "my_mlp_s")
    assert (config.model.backbone, config.model.encoder.width) == ("my_mlp", 48)
    assert config.optim.clip == 2.0 and "my_mlp_s" in presets.preset_names()
    mesh = parallel.make_mesh((2, 2, 2))
    spec = sharding.partition_spec("encoder/my_mlp_only/kernel", (256, 256), mesh)
    assert spec == jax.sharding.PartitionSpec("tensor", "fsdp")


def test_names_are_unique() -> None:
    register = backbones.register_backbone
    assert register("my_mlp", MLP) is MLP  # a module may be imported twice
    with pytest.raises(ValueError, match="exists already"):
        register("vit", MLP)
    with pytest.raises(ValueError, match="'my_mlp_s' belongs to my_mlp"):
        register("other", dataclasses.replace(MLP))
    with pytest.raises(ValueError, match="letters, digits"):
        register("my-mlp", MLP)
    with pytest.raises(
        UserError, match=r"'vitt' is not one of vit, intern_image.*did you mean vit\?"
    ):
        backbones.get_backbone(schema.Model(backbone="vitt"))


def test_a_configuration_file_registers_it(tmp_path: pathlib.Path) -> None:
    """As a user writes one: the backbone is known as soon as the file is read."""
    (tmp_path / "mine.py").write_text(
        "import dataclasses\n"
        "from m3i_jax.config import default_config\n"
        "from m3i_jax.models import backbones, presets\n"
        "nano = {'encoder': {'width': 48}}\n"
        "VIT = dataclasses.replace(backbones.VIT, presets={'vit_nano': nano})\n"
        "def get_config():\n"
        "    backbones.register_backbone('vit_like', VIT)\n"
        "    config = default_config()\n"
        "    presets.apply_preset(config, 'vit_nano')\n"
        "    return config\n"
    )
    config = configuration.resolve(configuration.load_config(str(tmp_path / "mine.py")))
    assert (config.model.backbone, config.model.encoder.width) == ("vit_like", 48)
    table = functools.partial(configuration.config_to_text, config)
    assert "model.backbone = 'vit_like'" in table()


@pytest.mark.parametrize(
    ("recipe", "classes"),
    [
        ("finetune.py:path=/images,model=my_mlp_s", 5),
        ("probe.py:path=/images,model=my_mlp_s", 5),
        ("detect.py:model=my_mlp_s", 3),
        ("segment.py:model=my_mlp_s,head=linear", 3),
        ("ade20k.py:model=my_mlp_s,head=linear", 150),
        ("coco.py:model=my_mlp_s,image_size=64", 80),
        ("coco.py:model=my_mlp_s,head=dino,image_size=64", 80),
    ],
)
def test_recipes_have_no_settings_of_other_encoders_for_it(recipe: str, classes: int) -> None:
    """Those of `Backbone.finetuning`, and on dense tasks neither a ViT's maps and rates nor the
    sizes of InternImage-H, which are the defaults of its section."""
    config = configuration.load_config(f"configs/transfer/{recipe}")
    config.data.classes, config.data.captions, config.data.size = classes, "no", 10**6
    made = configuration.resolve(config)
    backbones.validate_backbone(made)
    assert made.model.backbone == "my_mlp" and made.model.encoder.freeze == ("probe" in recipe)
    if "finetune" in recipe:
        filled = scaling.fill_open_settings(dataclasses.replace(made, init_from="x"))
        assert scaling.reference(dataclasses.replace(made, init_from="x")).lr == 7e-4
        assert (made.train.epochs, made.optim.weight_decay) == (7.0, 0.03)
        assert filled.optim.layer_decay == 0.5  # of a run as long as the reference
    plain = schema.Maps()
    assert dataclasses.replace(made.dense.maps, image_size=0) == plain
    if "coco" in recipe:
        assert made.optim.layer_decay == (0.9 if "dino" in recipe else 1.0)
        assert made.dense.detect.dino.denoising == 100 and made.optim.head_offset_lr == 1.0


def test_a_saved_run_of_it_is_read(tmp_path: pathlib.Path) -> None:
    """By `load` and as a network, as a teacher, by a run that starts from it, and by the formats
    that export any encoder."""
    saved.run(tmp_path, toy.settings(**SETTINGS, objective__forms="mim"))
    model = load.load(str(tmp_path), pool="tokens")
    images = np.random.default_rng(1).integers(0, 256, (2, 32, 32, 3)).astype(np.uint8)
    augment = model.config.data.augment
    normal = ((images / 255 - np.array(augment.mean)) / np.array(augment.std)).astype(np.float32)
    network = model.network
    assert isinstance(network, networks.BackboneNetwork)
    tokens = jax.jit(network)(model.params["encoder"], normal)
    np.testing.assert_allclose(tokens, model.features(images, ready=True), rtol=1e-4, atol=1e-4)
    shapes = jax.tree.map(jnp.shape, jax.eval_shape(network.init, jax.random.key(0)))
    assert shapes.keys() == model.params["encoder"].keys() - {"mask_token"}

    teacher = teachers.open_teacher(str(tmp_path))
    assert teacher.model.backbone == "my_mlp" and not teacher.model.encoder.position_grid
    for recipe in ("finetune.py:path=/images", "segment.py:head=linear"):
        separator = "," if "=" in recipe else ":"
        config = configuration.load_config(f"configs/transfer/{recipe}{separator}from={tmp_path}")
        assert (config.model.backbone, config.model.encoder.width) == ("my_mlp", 32)
    with pytest.raises(UserError, match="no model for the backbone my_mlp; use stablehlo, orbax"):
        export.run(schema.Config(), workdir=str(tmp_path), format="timm")


def _init_head(settings: Any, channels: Any, classes: int, rng: jax.Array) -> Any:
    width = channels[max(channels)]
    return {"classifier": {"kernel": 0.1 * jax.random.normal(rng, (width, classes))}}, {}


def _head_logits(settings: Any, params: Any, statistics: Any, maps: Any, size: Any) -> Any:
    logits = maps[max(maps)] @ params["classifier"]["kernel"]
    return jax.image.resize(logits, (logits.shape[0], *size, logits.shape[-1]), "nearest")


def _head_loss(
    settings: Any, params: Any, statistics: Any, maps: Any, labels_BxHxW: Any, keys: Any
) -> Any:
    logits = _head_logits(settings, params, statistics, maps, labels_BxHxW.shape[1:])
    one_hot = jax.nn.one_hot(labels_BxHxW, logits.shape[-1])  # zeros where unlabelled
    return {"mine": -(jax.nn.log_softmax(logits) * one_hot).sum()}, {}, statistics


HEAD = task_heads.SegmentationHead(
    init=_init_head,
    loss=_head_loss,
    divisor=lambda settings, labels_BxHxW, classes: jnp.float32(labels_BxHxW.size),
    logits=_head_logits,
    coarsest=True,
)


def _sign_links(optim: schema.Optim, rate: Any, mask: Any) -> Any:
    return optax.scale_by_sign(), optax.scale_by_learning_rate(rate)


def test_with_a_head_and_a_rule_of_ones_own() -> None:
    """One step of all three: every weight moves by the learning rate, and the loss is the head's.
    Masks, categories and the state of the optimizer go by their values."""
    changes = {
        **{key: value for key, value in SETTINGS.items() if key != "optim__layer_decay"},
        "dense__maps__relative": "none",
        "dense__maps__blocks": "()",
        "dense__geometry__photometric": "false",
        "dense__segment__head": "my_head",
        "optim__rule": "my_sign",
        "optim__lr": "0.25",
        "optim__warmup_steps": "0",
        "optim__schedule": "constant",
    }
    with task_heads.SEGMENTATION_HEADS.temporary(), update_rules.UPDATE_RULES.temporary():
        task_heads.register_segmentation_head("my_head", HEAD)
        update_rules.register_update_rule("my_sign", update_rules.UpdateRule(links=_sign_links))
        config = dense_toy.dense_settings("segment", **changes)
        assert make_task(config).category_parameters == ("^head/classifier/",)
        assert scaling.scaling_warnings(config, steps=1, warmup=0) == []
        one = dense_toy.make_trainer(config)
        state = one.init()
        assert "my_sign" in state.opt
        before = jax.device_get(state.params)
        batch = dense_toy.dense_batch(config)
        maps = _stages(config.model, before["encoder"], _normal(config, batch), maps=None, size=32)
        loss = _head_loss(None, before["head"], {}, {16: maps[1]}, batch["map"], None)[0]["mine"]
        state, metrics = one.step(state, parallel.to_global(one.mesh, batch))
        np.testing.assert_allclose(metrics["loss/mine"], loss / batch["map"].size, rtol=1e-4)
        moved = jax.tree.map(lambda a, b: np.abs(a - b), before, jax.device_get(state.params))
        for leaf in jax.tree.leaves(moved):
            assert set(np.unique(leaf.round(5))) <= {0.0, 0.25} and leaf.max() > 0
    with pytest.raises(UserError, match=r"optim.rule: 'my_sign' is not one of adamw, muon"):
        toy.settings(optim__rule="my_sign")
    with pytest.raises(UserError, match="segment.head: 'my_head' is not one of upernet, linear"):
        toy.settings(dense__segment__head="my_head")


def _normal(config: schema.Config, batch: Any) -> jax.Array:
    return normalize_images(config, batch["image"], batch["size"])


def test_names_of_rules_and_heads_are_the_packages() -> None:
    rule = update_rules.UpdateRule(links=_sign_links)
    for name in ("adamw", "target", "my sign"):  # a rule, another link of the chain, no name
        with pytest.raises(ValueError, match=f"an update rule cannot be named '{name}'"):
            update_rules.register_update_rule(name, rule)
    with pytest.raises(ValueError, match="this name is built in"):
        task_heads.register_segmentation_head("linear", HEAD)
    boxes = dataclasses.replace(task_heads.DETECTION_HEADS["dino"], masks="yes")
    with pytest.raises(ValueError, match="this name is built in"):
        task_heads.register_detection_head("dino", boxes)
