"""A backbone from outside the package: a value, a line that registers it, and this test of it. No
file of the package knows it."""

import dataclasses
import functools
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m3i_jax import config as configuration
from m3i_jax import parallel, schema
from m3i_jax.errors import UserError
from m3i_jax.models import backbones, presets
from m3i_jax.models.backbone import Backbone
from m3i_jax.models.initializers import init_params
from m3i_jax.models.layers import gelu
from m3i_jax.objective import mixing
from m3i_jax.parallel import sharding
from m3i_jax.training import plan, trainer
from tests import toy


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


def _validate(config: schema.Config) -> None:
    if config.model.encoder.cls_token:
        raise UserError("config.model.encoder.cls_token: must be false, my_mlp has no cls token")


def _layers_above(model: schema.Model, path: str) -> int:
    depth = model.encoder.depth
    return depth - 1 - int(path[5]) if path.startswith("layer") else depth


MLP = Backbone(
    init=_init,
    apply=_apply,
    depth=lambda model: model.encoder.depth,
    layers_above=_layers_above,
    describe=lambda model: f"{model.encoder.depth} mixing layers of {model.encoder.width}",
    can_drop_tokens=True,
    validate=_validate,
    presets={"my_mlp_s": {"encoder": {"width": 48, "depth": 3, "cls_token": False}}},
    clip=2.0,
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
    with pytest.raises(UserError, match="my_mlp has no cls token"):
        plan.build_plan(toy.settings(model__backbone="my_mlp"))
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
