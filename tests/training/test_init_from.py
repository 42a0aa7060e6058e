"""Initial weights of a run on any mesh or of another project's file: any subset by path, a log of
every array, and no random start that was not asked for."""

import dataclasses
import json
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m3i_jax import config as configuration
from m3i_jax import parallel, schema
from m3i_jax.errors import UserError
from m3i_jax.interop import intern_image_weights, tensor_files
from m3i_jax.models import m3i, vit
from m3i_jax.objective import positions
from m3i_jax.parallel import barriers
from m3i_jax.training import init_from, saved_arrays, weight_source
from m3i_jax.training.trainer import Trainer
from tests import saved, toy
from tests.interop.published_vit import ENCODERS, OTHERS, SIAMESE_DECODER, weights
from tests.saved import flat

SIZES = {"width": 32, "depth": 2, "heads": 2, "patch": 8, "grid": 4}  # of the toy's encoder
LEARNED = {"model__encoder__positions": "learned", "model__encoder__final_norm": True}


def take(config: schema.Config, seed: int = 7, devices: int = 1):
    """(parameters before, after, log lines)"""
    before, lines = saved.random(config, seed), []
    mesh = parallel.make_mesh((1, devices, 1), jax.devices()[:devices])
    layout = parallel.tree_shardings(mesh, before)
    after = init_from.initialize_from(config, jax.device_put(before, layout), layout, lines.append)
    assert jax.tree.structure(after) == jax.tree.structure(before)
    for leaf, sharding in zip(jax.tree.leaves(after), jax.tree.leaves(layout), strict=True):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
    return flat(before), flat(after), lines


@pytest.fixture(scope="module")
def run(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[str, dict[str, np.ndarray], dict[str, np.ndarray]]:
    """A run that saved at step 4 from eight devices: (workdir, parameters, momentum average)."""
    workdir = tmp_path_factory.mktemp("run")
    # wide enough to be split
    params, average = saved.run(workdir, toy.settings(model__encoder__width=64), devices=8)
    return str(workdir), flat(params), flat(average)


@pytest.mark.parametrize("devices", [1, 4])
def test_a_run_gives_all_that_fits_to_any_mesh(run, devices: int) -> None:
    workdir, there, _ = run
    config = toy.settings(model__encoder__width=64, init_from=workdir, data__classes=3)
    before, after, lines = take(config, devices=devices)
    for path, array in after.items():
        np.testing.assert_array_equal(
            array, before[path] if path.startswith("category/") else there[path], err_msg=path
        )
    text = "\n".join(lines)
    assert re.match(
        rf"init_from .*\(step 4, online\): {len(after) - 2} of {len(after)} arrays, [\d,]+"
        r" numbers: ",
        lines[0],
    )
    assert (
        "of another shape, initialized randomly: category/bias (5,) in the source, (3,) in this"
        " run, category/kernel (24, 5) in the source, (24, 3) in this run" in text
    )


def test_the_momentum_average_and_a_subset(run) -> None:
    workdir, there, average = run
    config = toy.settings(
        model__encoder__width=64,
        init_from=workdir,
        init__weights="ema",
        init__only="^encoder/blocks/mlp,^decoder/embed",
    )
    before, after, lines = take(config)
    taken = {path for path in after if not np.array_equal(after[path], before[path])}
    assert taken == {
        path for path in after if path.startswith(("encoder/blocks/mlp", "decoder/embed"))
    }
    for path in taken:  # the average has no decoder: what it lacks comes from the parameters
        np.testing.assert_array_equal(
            after[path], average[path] if path.startswith("encoder/") else there[path]
        )
    assert "momentum average" in lines[0] and "missing" not in "\n".join(lines)


def test_a_learned_table_starts_as_the_fixed_one_of_a_run(run) -> None:
    workdir, there, _ = run
    config = toy.settings(
        model__encoder__width=64,
        init_from=workdir,
        model__encoder__positions="learned",
        data__image_size=48,
    )
    _, after, lines = take(config)
    # of the run's grid, resized
    fixed = positions.resize_position_table(positions.sincos_2d(4, 64)[None], 6, cls=False)
    np.testing.assert_allclose(after["encoder/positions"][:, 1:], fixed, atol=1e-6)
    np.testing.assert_array_equal(after["encoder/positions"][0, 0], 0)
    np.testing.assert_array_equal(after["encoder/cls_token"], there["encoder/cls_token"])
    assert any("starts as the source's fixed table of 4 x 4" in line for line in lines)


@pytest.fixture
def timm(tmp_path: pathlib.Path):
    """(path, table) of a file with timm's names and sizes of the toy."""
    table = weights(ENCODERS["timm"] + "|" + OTHERS["timm"], **SIZES)
    tensor_files.write_safetensors(tmp_path / "vit.safetensors", table)
    return str(tmp_path / "vit.safetensors"), table


def test_a_file_of_timm(timm) -> None:
    path, table = timm
    before, after, lines = take(toy.settings(init_from=path, **LEARNED))
    np.testing.assert_array_equal(after["encoder/positions"], table["pos_embed"])
    np.testing.assert_array_equal(
        after["encoder/blocks/attention/qkv/kernel"][1], table["blocks.1.attn.qkv.weight"].T
    )
    for name, array in after.items():
        assert name.startswith("encoder/") != np.array_equal(array, before[name]), name
    text = "\n".join(lines)
    assert "(timm): 18 of" in lines[0] and "encoder (18)" in lines[0]
    assert (
        "missing, initialized randomly: category (2), decoder (" in text
        and "in the source and not used: classifier (2)" in text
    )


def test_a_table_of_another_grid_is_resized_with_a_log_line(timm) -> None:
    path, table = timm
    _, after, lines = take(toy.settings(init_from=path, data__image_size=48, **LEARNED))
    np.testing.assert_array_equal(
        after["encoder/positions"],
        positions.resize_position_table(table["pos_embed"], 6, cls=True),
    )
    assert any("resized from 4 x 4 to 6 x 6 by bicubic interpolation" in line for line in lines)


def test_a_fixed_table_in_a_file_is_known_as_the_fixed_one_here(tmp_path: pathlib.Path) -> None:
    """MAE and SiameseIM save their sine-cosine tables; that of MAE has columns first."""
    table = weights(
        ENCODERS["siamese_im"] + "|" + OTHERS["siamese_im"] + "|" + SIAMESE_DECODER, **SIZES
    )
    fixed = np.concatenate([np.zeros((1, 32)), positions.sincos_2d(4, 32)]).astype(np.float32)[None]
    tensor_files.write_safetensors(tmp_path / "sim.safetensors", {**table, "pos_embed": fixed})
    settings = {
        "init_from": str(tmp_path / "sim.safetensors"),
        "model__decoder__projector_depth": 2,
        "model__decoder__depth": 2,
    }
    _, after, lines = take(toy.settings(**settings, model__decoder__norm="batch"))
    np.testing.assert_array_equal(after["decoder/head/kernel"], table["decoder_pred.weight"].T)
    np.testing.assert_array_equal(
        after["decoder/projector/norm1/scale"][1],
        table["projector_decoder_blocks.1.norm1.bn.weight"],
    )
    # and nothing of encoder and decoder
    assert "missing, initialized randomly: category (2), image_projection" in "\n".join(lines)
    columns = np.concatenate([fixed[:, :, 16:], fixed[:, :, :16]], -1)
    tensor_files.write_safetensors(
        tmp_path / "mae.safetensors", {**weights(ENCODERS["mae"], **SIZES), "pos_embed": columns}
    )
    mae = {"init_from": str(tmp_path / "mae.safetensors")}
    with pytest.raises(UserError, match=r"config\.model\.encoder to .*positions=sincos_columns"):
        take(toy.settings(**mae))
    mae["model__encoder__positions"] = "sincos_columns"
    grids = "of a grid of 4 in the source and are of 6 in this run; .*position_grid=4 resizes them"
    for changes, other in (
        ({"data__image_size": 48}, True),
        ({"data__image_size": 48, "model__encoder__position_grid": 4}, False),
        ({}, False),
    ):
        text = "\n".join(take(toy.settings(**mae, **changes))[2])
        assert "the fixed one of model.encoder.positions=sincos_columns" in text
        assert bool(re.search(grids, text)) == other, text


def test_other_settings_are_logged_and_with_strict_refused(tmp_path: pathlib.Path) -> None:
    tensor_files.write_safetensors(
        tmp_path / "model.safetensors", weights(ENCODERS["clip"], **SIZES)
    )
    (tmp_path / "config.json").write_text('{"num_attention_heads": 4}')
    only = {
        "init_from": str(tmp_path),
        "init__only": "^encoder/",
        **LEARNED,
        "model__encoder__embedding_norm": True,
    }
    _, _, lines = take(toy.settings(**only))
    (line,) = (line for line in lines if "other settings" in line)
    assert all(
        f"model.encoder.{x}" in line
        for x in (
            "heads=4 in the source, 2 in",
            "activation=quick_gelu in the",
            "norm_eps=1e-05 in the",
        )
    )
    assert "data.augment.mean=(0.48145466, 0.4578275, 0.40821073) in the source" in line
    with pytest.raises(UserError, match="other settings"):
        take(toy.settings(init__strict="true", **only))
    fits = {
        "model__encoder__heads": 4,
        "model__encoder__activation": "quick_gelu",
        "model__encoder__norm_eps": 1e-5,
    }
    pixels = {
        "data__augment__mean": "(0.48145466,0.4578275,0.40821073)",
        "data__augment__std": "(0.26862954,0.26130258,0.27577711)",
    }
    assert not [
        line
        for line in take(toy.settings(init__strict="true", **only, **fits, **pixels))[2]
        if "otherwise" in line
    ]


def test_the_momentum_target_starts_from_the_same_weights(timm) -> None:
    path, table = timm
    config = toy.settings(init_from=path, objective__forms="mim", data__captions="no", **LEARNED)
    lines: list[str] = []
    made = Trainer(config, parallel.make_mesh((1, 2, 1), jax.devices()[:2]), 0).init(lines.append)
    encoder = flat(made.params["encoder"])
    np.testing.assert_array_equal(
        encoder["blocks/mlp/fc1/kernel"][0], table["blocks.0.mlp.fc1.weight"].T
    )
    for path, array in flat(made.opt["target"].params["encoder"]).items():
        np.testing.assert_array_equal(array, encoder[path])
    assert (
        int(made.step) == 0
        and lines
        and not np.any(flat(made.opt["adamw"])["0/mu/encoder/cls_token"])
    )


@pytest.fixture(scope="module")
def intern(tmp_path_factory: pytest.TempPathFactory):
    """A file of the toy InternImage as the models T to XL are published, without the fusion: (path,
    tree)."""
    tree = {
        name: part
        for name, part in saved.random(toy.settings(**toy.INTERN))["encoder"].items()
        if name != "fusion"
    }
    path = tmp_path_factory.mktemp("intern") / "intern.safetensors"
    tensor_files.write_safetensors(path, intern_image_weights.store_intern_image({"encoder": tree}))
    return str(path), flat({"encoder": tree})


def test_pre_training_adds_a_fusion_to_an_intern_image_with_a_log_line(intern) -> None:
    path, tree = intern
    before, after, lines = take(toy.settings(**toy.INTERN, init_from=path))
    for name, array in after.items():
        np.testing.assert_array_equal(array, tree.get(name, before[name]), err_msg=name)
    assert any("not in published encoders: encoder/fusion" in line for line in lines)
    with pytest.raises(
        UserError,
        match=(
            r"a frozen encoder would keep at random values.*encoder\.patch_size=16 and width=64"
        ),
    ):
        take(toy.settings(**toy.INTERN, init_from=path, model__encoder__freeze="true"))
    last = toy.INTERN | {
        "model__encoder__patch_size": "16",
        "model__encoder__width": "64",
        "model__encoder__freeze": "true",
    }
    assert not any("fusion" in line for line in take(toy.settings(**last, init_from=path))[2])


def test_an_encoder_that_fits_in_part_is_refused(intern, tmp_path: pathlib.Path) -> None:
    path, tree = intern
    bare: dict = {}
    for name, array in tree.items():
        if "gamma" not in name:
            saved_arrays.set_leaf(bare, name, array)
    tensor_files.write_safetensors(
        tmp_path / "bare.safetensors", intern_image_weights.store_intern_image(bare)
    )
    with pytest.raises(
        UserError,
        match=r"fits in part \(8 arrays are missing, first encoder/stage0/layers/gamma1\)",
    ):
        take(toy.settings(**toy.INTERN, init_from=str(tmp_path / "bare.safetensors")))
    tensor_files.write_safetensors(
        tmp_path / "vit.safetensors",
        weights(ENCODERS["siamese_im"] + "|" + SIAMESE_DECODER, **SIZES),
    )
    settings = {**LEARNED, "init_from": str(tmp_path / "vit.safetensors")}
    with pytest.raises(
        UserError,
        match=(
            r"2 arrays are missing, first encoder/norm/bias\); set config.model.encoder to"
            r" .*final_norm=False"
        ),
    ):
        take(toy.settings(**settings))
    take(toy.settings(**settings, init__only="^encoder/(?!norm/)"))


@pytest.mark.slow
def test_an_intern_image_with_other_settings_is_logged(tmp_path: pathlib.Path) -> None:
    alone = {**toy.INTERN, "objective__forms": "sim", "data__captions": "no"}
    saved.run(tmp_path, toy.settings(**alone, model__intern_image__offset_scale=2.0))
    _, _, lines = take(toy.settings(**alone, init_from=str(tmp_path)))
    assert any(
        "other settings: model.intern_image.offset_scale=2.0 in the source, 1.0 in this run" in line
        for line in lines
    )


def test_a_strict_start_compares_what_the_encoder_computes(tmp_path: pathlib.Path) -> None:
    """The grid of its fixed positions, whichever setting says so, and no base of rotary ones."""
    alone = {"objective__forms": "sim", "data__captions": "no"}
    saved.run(tmp_path, toy.settings(**alone, model__encoder__rope_base=50.0))
    strict = {**alone, "init_from": str(tmp_path), "init__strict": True, "init__only": "^encoder/"}
    with pytest.raises(UserError, match="position_grid=4 in the source, 8 in this run"):
        take(toy.settings(**strict, data__image_size=64))
    take(toy.settings(**strict, data__image_size=64, model__encoder__position_grid=4))


def test_what_is_refused(timm, run, tmp_path: pathlib.Path) -> None:
    path, _ = timm
    (tmp_path / "empty").mkdir()
    tensor_files.write_safetensors(
        tmp_path / "other.safetensors", {"fc.weight": np.zeros((3, 3), np.float32)}
    )
    small = weights(ENCODERS["timm"], **{**SIZES, "width": 16})
    tensor_files.write_safetensors(tmp_path / "small.safetensors", small)
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.txt").write_text(configuration.config_to_text(toy.settings()))
    for changes, words in (
        ({"init_from": "nowhere"}, ("config.init_from: 'nowhere' does not exist", "workdir")),
        (
            {"init_from": str(tmp_path / "empty")},
            ("neither checkpoints/ of a run nor model.safetensors",),
        ),
        ({"init_from": str(tmp_path / "bare")}, ("has no checkpoints",)),
        (
            {"init_from": str(tmp_path / "other.safetensors")},
            ("of no known layout", "fc.weight"),
        ),
        (
            {"init_from": str(tmp_path / "small.safetensors"), **LEARNED},
            ("has other shapes", "(48, 16)" and "width=16", "patch_size=8"),
        ),
        ({"init_from": path}, ("positions=learned", "this run has sincos")),
        (
            {"init_from": path, "init__only": "^decoder/"},
            ("none of the", "init.only=^decoder/", "to start from random weights"),
        ),
        ({"init_from": path, "init__only": "^decoders/"}, ("no array of this run matches",)),
        (
            {"init_from": path, "init__strict": "true", **LEARNED},
            ("are missing or differ in shape, first", "init.strict=false"),
        ),
        ({"init_from": path, "init__weights": "ema", **LEARNED}, ("no momentum copy",)),
        ({"init_from": run[0]}, ("its encoder has other shapes", "width=64")),
    ):
        with pytest.raises(UserError) as error:
            take(toy.settings(**changes))
        text = str(error.value)
        assert (
            all(word in text for word in words)
            and "\n" not in text
            and text.startswith("config.init_from")
        ), text
    for changes, words in (
        ({"init__only": "("}, "config.init.only: '('"),
        ({"init__strict": "true"}, "config.init_from: '' is empty"),
    ):
        with pytest.raises(UserError, match=re.escape(words)):
            toy.settings(**changes)


def test_one_refusal_names_all_settings_of_another_encoder(tmp_path: pathlib.Path) -> None:
    """Whichever of them is missed first."""
    changes = {"positions": "rope", "activation": "swiglu", "norm": "rms", "layer_scale": 0.1}
    theirs = {f"model__encoder__{name}": value for name, value in changes.items()}
    alone = {"objective__forms": "sim", "data__captions": "no"}
    saved.run(tmp_path, toy.settings(**alone, **theirs))
    for given in ({}, {"model__encoder__positions": "rope"}):
        with pytest.raises(UserError) as error:
            take(toy.settings(**alone, **given, init_from=str(tmp_path)))
        for name, value in list(changes.items())[len(given) :]:
            assert f" {name}={value}" in str(error.value), error.value
    take(toy.settings(**alone, **theirs, init_from=str(tmp_path)))


def attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, heads: int) -> np.ndarray:
    split = lambda x: x.reshape(len(x), heads, -1).swapaxes(0, 1)
    q, k, v = split(q), split(k), split(v)
    logits = q @ k.swapaxes(1, 2) / np.sqrt(q.shape[-1])
    w = np.exp(logits - logits.max(-1, keepdims=True))
    return (w / w.sum(-1, keepdims=True) @ v).swapaxes(0, 1).reshape(q.shape[1], -1)


def clip_vision(table: dict[str, np.ndarray], image: np.ndarray, heads: int) -> np.ndarray:
    """CLIP's vision tower as in its paper and public code, in float64: an image [S, S, 3] -> tokens
    [T, D] before the last norm."""
    t = {name: array.astype(np.float64) for name, array in table.items()}

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        y = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        return y * t[f"{name}.weight"] + t[f"{name}.bias"]

    def linear(x: np.ndarray, name: str) -> np.ndarray:
        return x @ t[f"{name}.weight"].T + t[f"{name}.bias"]

    p, side = t["embeddings.patch_embedding.weight"].shape[-1], len(image)
    tokens = [t["embeddings.class_embedding"]]
    for row in range(0, side, p):
        for column in range(0, side, p):
            patch = image[row : row + p, column : column + p].transpose(2, 0, 1)
            tokens.append(np.tensordot(t["embeddings.patch_embedding.weight"], patch, 3))
    x = norm(np.stack(tokens) + t["embeddings.position_embedding.weight"], "pre_layrnorm")
    for layer in range(2):
        b = f"encoder.layers.{layer}"
        y = norm(x, f"{b}.layer_norm1")
        mixed = attention(*(linear(y, f"{b}.self_attn.{n}_proj") for n in "qkv"), heads)
        x = x + linear(mixed, f"{b}.self_attn.out_proj")
        hidden = linear(norm(x, f"{b}.layer_norm2"), f"{b}.mlp.fc1")
        x = x + linear(hidden / (1 + np.exp(-1.702 * hidden)), f"{b}.mlp.fc2")
    return x


def test_clip_weights_compute_what_clip_defines(tmp_path: pathlib.Path) -> None:
    table = weights(ENCODERS["clip"], **SIZES)
    tensor_files.write_safetensors(tmp_path / "clip.safetensors", table)
    changes = {
        "positions": "learned",
        "embedding_norm": True,
        "activation": "quick_gelu",
        "norm_eps": 1e-5,
    }
    config = toy.settings(
        init_from=str(tmp_path / "clip.safetensors"),
        **{f"model__encoder__{k}": v for k, v in changes.items()},
    )
    _, after, _ = take(config)
    tree: dict = {}
    for path, array in after.items():
        if path.startswith("encoder/"):
            saved_arrays.set_leaf(tree, path.removeprefix("encoder/"), jnp.asarray(array))
    image = np.random.default_rng(5).normal(size=(32, 32, 3))
    got = m3i.encode(config, tree, vit.patchify(jnp.asarray(image, jnp.float32)[None], 8))[0]
    np.testing.assert_allclose(got, clip_vision(table, image, heads=2), atol=2e-4, rtol=1e-4)
    other = dataclasses.replace(
        config.model, encoder=dataclasses.replace(config.model.encoder, activation="gelu")
    )
    assert (
        np.abs(
            m3i.encode(
                dataclasses.replace(config, model=other),
                tree,
                vit.patchify(jnp.asarray(image, jnp.float32)[None], 8),
            )[0]
            - got
        ).max()
        > 0.01
    )


def test_hosts_that_see_different_checkpoints_of_a_run_do_not_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A run that still trains has another newest checkpoint a moment later."""
    source = weight_source.WeightSource("run (step 4, online)", {}, dict, {}, {}, [])
    monkeypatch.setattr(weight_source, "open_weights", lambda path, **_: source)
    assert weight_source.open_on_all_hosts("run") is source
    earlier = json.dumps({"config.init_from": "run (step 3, online)"})
    first = {"config.init_from, digests": "another", "config.init_from, host 0": earlier}
    for name, value in {
        "host_names": lambda: 2,
        "host_name": lambda: 1,
        "host_label": lambda number: f"host {number}",
        "exchange_values": lambda name, text, **_: [first.get(name, ""), text],
    }.items():
        monkeypatch.setattr(barriers, name, value)
    with pytest.raises(UserError, match=r"host 1: config.init_from is run \(step 4.*step 3"):
        weight_source.open_on_all_hosts("run")
