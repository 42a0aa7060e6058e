"""Checkpoints: every bit is restored, on any mesh; only complete ones count; the newest are kept; a
mismatch names the arrays."""

import json
import pathlib
import shutil
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from m3i_jax import parallel
from m3i_jax.errors import UserError
from m3i_jax.objective import terms
from m3i_jax.training import checkpoint, checksums, optimizer, task
from m3i_jax.training.checkpoint import FORMAT, Checkpoints
from tests import toy

POSITION = {"samples_seen": 112, "fingerprint": "0123456789abcdef"}


def make(width: int = 128) -> task.State:
    """A state after one update, so that moments, target and statistics differ from their initial
    values; its kernels are large enough to be sharded."""
    r = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(r.normal(size=shape), jnp.float32)
    params = {
        "encoder": {"blocks": {"fc1": {"kernel": draw(2, width, width), "bias": draw(2, width)}}},
        # a NaN has bits too
        "decoder": {
            "head": {"kernel": draw(width, 8)},
            "mask_token": draw(1, 1, 8).at[0, 0, 0].set(jnp.nan),
        },
        "logit_scale": jnp.float32(1.3),
    }
    tx = optimizer.build_optimizer(
        toy.settings(optim__clip=0.0, optim__ema=0.5), terms.FORMS["m3i"], steps=20, warmup=0
    )
    updates, opt = tx.update(
        jax.tree.map(jnp.sin, params), tx.init(params), params, feature_grad_norms=(2.0, 3.0)
    )
    return task.State(step=jnp.int32(7), params=optax.apply_updates(params, updates), opt=opt)


@pytest.fixture(scope="module")
def whole() -> task.State:
    return jax.jit(make)()


def laid_out(tree, mesh: jax.sharding.Mesh):
    return jax.device_put(tree, parallel.tree_shardings(mesh, tree))


def template(width: int = 128) -> task.State:
    return jax.eval_shape(lambda: make(width))


def bits(tree) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


@pytest.fixture
def open_at() -> Iterator:
    opened = []

    def call(directory: pathlib.Path, keep: int = 2) -> Checkpoints:
        opened.append(Checkpoints(directory, keep))
        return opened[-1]

    yield call
    for one in opened:
        one.close()


def saved(directory: pathlib.Path, tree, *steps: int, keep: int = 2) -> None:
    """A process that saved these steps and ended."""
    one = Checkpoints(directory, keep)
    for step in steps:
        one.save(step, tree, POSITION | {"samples_seen": 16 * step})
    one.wait()
    one.close()


@pytest.fixture(scope="module")
def eight(whole: task.State, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A checkpoint at step 7 of a run with parameters sharded over eight devices."""
    directory = tmp_path_factory.mktemp("eight") / "checkpoints"
    saved(directory, laid_out(whole, parallel.make_mesh((1, 8, 1))), 7)
    return directory


@pytest.mark.parametrize(
    ("shape", "devices", "parts"), [((1, 8, 1), 8, 8), ((1, 1, 1), 1, 1), ((2, 2, 2), 8, 4)]
)
@pytest.mark.row("A9")
def test_every_bit_comes_back_on_any_mesh(
    eight: pathlib.Path, whole: task.State, open_at, shape, devices: int, parts: int
) -> None:
    mesh = parallel.make_mesh(shape, jax.devices()[:devices])
    shardings = parallel.tree_shardings(mesh, template())
    got = open_at(eight).restore(7, template(), shardings)
    # named tuples of the optimizer included
    assert jax.tree.structure(got) == jax.tree.structure(whole)
    assert bits(got) == bits(whole)
    for leaf, sharding in zip(jax.tree.leaves(got), jax.tree.leaves(shardings), strict=True):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
    moment = got.opt["adamw"][0].nu["encoder"]["blocks"]["fc1"]["kernel"]
    assert moment.addressable_shards[0].data.size * parts == moment.size
    assert float(got.opt["balance"].sp) == 3.0 and int(got.opt["target"].count) == 1
    target = got.opt["target"].params["encoder"]["blocks"]["fc1"]["kernel"]
    assert not np.array_equal(target, got.params["encoder"]["blocks"]["fc1"]["kernel"])


def test_a_state_in_many_files_comes_back(
    eight: pathlib.Path,
    whole: task.State,
    tmp_path: pathlib.Path,
    open_at,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With files so small that arrays are split over several."""
    monkeypatch.setattr(Checkpoints, "FILE_SIZE", 2**12)
    mesh = parallel.make_mesh((1, 1, 1), jax.devices()[:1])
    saved(tmp_path / "checkpoints", laid_out(whole, mesh), 7)
    few, many = (
        sum(path.is_file() for path in place.rglob("*"))
        for place in (eight, tmp_path / "checkpoints")
    )
    assert many > few + 10
    got = open_at(tmp_path / "checkpoints").restore(
        7, template(), parallel.tree_shardings(mesh, template())
    )
    assert bits(got) == bits(whole)


def test_the_position_is_json_beside_the_state(eight: pathlib.Path, open_at) -> None:
    assert open_at(eight).position(7) == POSITION
    (file,) = (path for path in (eight / "7" / "position").iterdir() if path.name == "metadata")
    assert json.loads(file.read_text()) == POSITION | {"format": FORMAT}


def test_a_new_directory_has_no_checkpoint(tmp_path: pathlib.Path, open_at) -> None:
    assert open_at(tmp_path / "deep" / "checkpoints").latest() is None


def test_the_newest_are_kept(tmp_path: pathlib.Path, open_at) -> None:
    saved(tmp_path, {"x": jnp.arange(3)}, 2, 4, 6, 7, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["6", "7"]
    one = open_at(tmp_path)
    assert one.latest() == 7 and one.position(6)["samples_seen"] == 96


def test_the_compilation_of_the_checksums_is_announced(tmp_path: pathlib.Path, open_at) -> None:
    """Before the first save, which it delays by half a minute for a large state on a CPU."""
    checksums._compiled.cache_clear()  # as in a new process
    one, lines = open_at(tmp_path), list[str]()
    with parallel.announced_compilations(lines.append):
        for step in (2, 4):
            one.save(step, {"x": jnp.arange(3)}, POSITION)
            assert lines == ["compiling the checksums of a checkpoint ..."]
        one.wait()


def test_a_step_that_is_there_is_not_written_again(tmp_path: pathlib.Path, open_at) -> None:
    saved(tmp_path, {"x": jnp.arange(3)}, 2, 4)
    one = open_at(tmp_path)
    one.save(4, {"x": jnp.arange(3) + 1}, {"samples_seen": 0})
    one.wait()
    assert one.position(4)["samples_seen"] == 64
    wanted = jax.eval_shape(lambda: {"x": jnp.arange(3)})
    got = one.restore(
        4, wanted, parallel.tree_shardings(parallel.make_mesh((1, 1, 1), jax.devices()[:1]), wanted)
    )
    assert got["x"].tolist() == [0, 1, 2]


def test_the_state_may_be_donated_while_it_is_written(tmp_path: pathlib.Path, open_at) -> None:
    one, tree = open_at(tmp_path), {"x": jnp.arange(2.0**20)}
    before = bits(tree)
    one.save(1, tree, POSITION)
    jax.block_until_ready(jax.jit(lambda t: {"x": t["x"] * 0 - 1}, donate_argnums=0)(tree))
    one.wait()
    wanted = {"x": jax.ShapeDtypeStruct((2**20,), jnp.float32)}
    got = one.restore(
        1, wanted, parallel.tree_shardings(parallel.make_mesh((1, 1, 1), jax.devices()[:1]), wanted)
    )
    assert bits(got) == before


def test_a_host_that_does_not_see_the_step_yet_does_not_write_it_again_alone(
    tmp_path: pathlib.Path, open_at, monkeypatch
) -> None:
    """A shared disk may show the rename of another host half a minute later; a save by one host
    alone would wait for all."""
    one = open_at(tmp_path / "there")
    one.save(
        2,
        laid_out({"a": jnp.arange(3.0)}, parallel.make_mesh((1, 1, 1), jax.devices()[:1])),
        POSITION,
    )
    one.wait()
    monkeypatch.setattr(checkpoint.checkpoint_dir, "complete_steps", lambda directory: [])
    monkeypatch.setattr(one, "_start", lambda *_: pytest.fail("saved once more"))
    one.save(2, {}, POSITION)


def test_a_host_that_still_sees_a_step_writes_with_the_others(
    tmp_path: pathlib.Path, open_at, monkeypatch
) -> None:
    """The first host set it aside; alone, it would wait for the others."""
    one, started = open_at(tmp_path / "here"), []
    monkeypatch.setattr(checkpoint.checkpoint_dir, "complete_steps", lambda directory: [2])
    monkeypatch.setattr(checkpoint.parallel, "exchange_values", lambda name, text, **_: ["", text])
    monkeypatch.setattr(one, "_start", lambda step, *_: started.append(step))
    one.save(2, {}, POSITION)
    assert started == [2]


@pytest.mark.row("B5")
def test_what_a_killed_save_leaves_is_not_a_checkpoint(
    eight: pathlib.Path, tmp_path: pathlib.Path, open_at
) -> None:
    shutil.copytree(eight, tmp_path / "checkpoints")
    torn = tmp_path / "checkpoints" / "9.orbax-checkpoint-tmp-1700000000"
    shutil.copytree(eight / "7", torn)
    (torn / "state" / "_METADATA").write_text("{")
    one = open_at(tmp_path / "checkpoints")
    assert one.latest() == 7 and one.position(7) == POSITION
    one.save(9, {"x": jnp.arange(3)}, POSITION)
    one.wait()
    assert one.latest() == 9 and (tmp_path / "checkpoints" / "9").is_dir()


def changed(kind: str) -> task.State:
    """A template that the saved state does not fit."""
    usual = template()
    if kind == "width":
        return template(64)
    if kind == "precision":
        return usual.replace(
            params={**usual.params, "logit_scale": jax.ShapeDtypeStruct((), jnp.bfloat16)}
        )
    if kind == "a head more":
        return usual.replace(
            params={
                **usual.params,
                "category": {"kernel": jax.ShapeDtypeStruct((24, 5), jnp.float32)},
            }
        )
    less = lambda tree: {k: v for k, v in tree.items() if k != "logit_scale"}
    adam, *others = usual.opt["adamw"]
    opt = {**usual.opt, "adamw": (adam._replace(mu=less(adam.mu), nu=less(adam.nu)), *others)}
    return usual.replace(params=less(usual.params), opt=opt)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (
            "width",
            (
                "params/encoder/blocks/fc1/kernel is float32[2, 128, 128] in the checkpoint,"
                " float32[2, 64, 64] in this run"
            ),
        ),
        ("precision", "params/logit_scale is float32[] in the checkpoint, bfloat16[] in this run"),
        (
            "a head more",
            "params/category/kernel is absent in the checkpoint, float32[24, 5] in this run",
        ),
        # what the moments repeat comes last
        (
            "a head less",
            "(params/logit_scale is float32[] in the checkpoint, absent in this run, opt/adamw",
        ),
    ],
)
def test_another_layout_is_refused_with_the_place(
    eight: pathlib.Path, open_at, kind: str, words: str
) -> None:
    wanted = changed(kind)
    with pytest.raises(UserError) as error:
        open_at(eight).restore(
            7,
            wanted,
            parallel.tree_shardings(parallel.make_mesh((1, 1, 1), jax.devices()[:1]), wanted),
        )
    text = str(error.value)
    assert error.value.__cause__ is None  # seen before anything was read
    assert text.startswith("checkpoint 7: ") and words in text and "--workdir" in text, text
    assert "\n" not in text and len(text) < 500
    # the line names three, the file all: kernel, bias and decoder head, in parameters, both moments
    # and the target
    if kind == "width":
        every = (eight.parent / "layout.txt").read_text().splitlines()
        assert (
            len(every) == 11
            and f"and 8 more: {eight.parent / 'layout.txt'}" in text
            and all(line in every for line in [words])
        )


@pytest.mark.parametrize("damage", ["arrays", "metadata"])
def test_a_damaged_checkpoint_is_one_line_with_the_way_out(
    eight: pathlib.Path,
    tmp_path: pathlib.Path,
    open_at,
    monkeypatch: pytest.MonkeyPatch,
    damage: str,
) -> None:
    shutil.copytree(eight, tmp_path / "checkpoints")
    one, here = open_at(tmp_path / "checkpoints"), tmp_path / "checkpoints" / "7"
    if damage == "metadata":
        (here / "state" / "_METADATA").write_text("{")
    else:
        # what Orbax raises for a flipped bit or a missing file, without its other reads, which
        # would log errors later
        def fail(*_: object, **__: object) -> None:
            raise Exception(
                "Encountered error while reading array.\nSee full TensorStore details: "
                + 9000 * "x"
            )

        monkeypatch.setattr(one._orbax, "restore", fail)
    with pytest.raises(UserError) as error:
        one.restore(
            7,
            template(),
            parallel.tree_shardings(parallel.make_mesh((1, 1, 1), jax.devices()[:1]), template()),
        )
    text = str(error.value)
    assert (
        text.startswith("checkpoint 7: cannot be read (")
        and f"delete {here}" in text
        and "\n" not in text
        and len(text) < 600
    )
