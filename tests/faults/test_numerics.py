"""Rows D: numbers that are not finite, spikes, weights of zero."""

import functools
import json
import math
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m3i_jax import config as configuration
from m3i_jax import main as command
from m3i_jax import parallel
from m3i_jax.data.sources.registry import SOURCE_KINDS
from m3i_jax.modes import replay, train
from m3i_jax.objective import balance, ema
from m3i_jax.training import debug_dump, loop, optimizer, task, trainer
from m3i_jax.training.checkpoint import Checkpoints
from tests import toy


def made_mesh() -> jax.sharding.Mesh:
    return parallel.make_mesh((1, 1, 1), jax.devices()[:1])


@functools.cache
def made(form: str = "m3i", **changes: object) -> trainer.Trainer:
    config = toy.settings(objective__forms=form, **changes)
    return trainer.Trainer(config, made_mesh(), toy.VOCABULARY)


@functools.cache
def trained() -> Any:
    """A state after two steps, on the host: moments, target and statistics differ from their
    initial values."""
    one = made(model__encoder__depth=1)
    made_ = one.init()
    for seed in (0, 1):
        made_, _ = one.step(made_, toy.batch(one.config, seed))
    return jax.device_get(made_)


def device(tree: Any) -> Any:
    return jax.tree.map(lambda x: jnp.array(x, copy=True), tree)


def bits(tree: Any) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def at(tree: Any, *way: str) -> Any:
    for name in way:
        tree = tree[name]
    return tree


def poison(whole: Any, value: float, *way: str) -> Any:
    """The same state with one number of one parameter replaced."""
    out = jax.tree.map(np.array, whole)
    at(out.params, *way[:-1])[way[-1]].reshape(-1)[0] = value
    return out


DENSE, ENCODER, TEXT = ("decoder", "mask_token"), ("encoder", "cls_token"), ("logit_scale",)
CASES = [(place, value) for place in (DENSE, ENCODER, TEXT) for value in (math.nan, math.inf)] + [
    (DENSE, 1e38),
    (TEXT, 1e38),
]


@pytest.mark.fast
@pytest.mark.row("D1")
@pytest.mark.parametrize(("place", "value"), CASES)
def test_a_skipped_step_leaves_every_bit(place: tuple[str, ...], value: float) -> None:
    """Parameters, both moments, the target, the statistics of lambda and their counts stay; and the
    next batch is trained as if the skipped one had not been."""
    one, before = made(model__encoder__depth=1), poison(trained(), value, *place)
    after, metrics = one.step(device(before), toy.batch(one.config, 2))
    assert float(metrics["skipped/not_finite"]) == 1 and int(after.step) == int(before.step) + 1
    assert bits((after.params, after.opt)) == bits((before.params, before.opt))
    healed = task.State(
        step=jnp.asarray(trained().step), params=device(trained().params), opt=after.opt
    )
    assert bits(one.step(healed, toy.batch(one.config, 3))[0]) == bits(
        one.step(device(trained()), toy.batch(one.config, 3))[0]
    )


@pytest.mark.fast
@pytest.mark.row("D1")
def test_three_in_a_row_leave_a_dump_that_replays(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """The loop with a real step: from the fifth batch on a box is not finite. The run ends, and its
    dump reproduces that; with the batch repaired it does not, and the replay says so."""
    one, batches_drawn = made("sim", model__encoder__depth=1), [0]

    class Data:
        def counted(self) -> dict[str, float]:
            return {}

        def __next__(self) -> dict[str, np.ndarray]:
            batches_drawn[0] += 1
            out = toy.batch(one.config, batches_drawn[0])
            if batches_drawn[0] >= 5:
                out["box"][3, 1, 2] = np.nan
            return out

    logged: list[str] = []
    checkpoints = Checkpoints(tmp_path / "checkpoints", 2, log=logged.append)
    outside = loop.Callbacks(
        data=Data(),
        checkpoints=checkpoints,
        write=lambda step, values: None,
        log=logged.append,
        panel=lambda *_: None,
        evaluators=[],
        position=lambda samples: {},
        dump=lambda *what: train.dump_step(tmp_path, one, logged.append, *what),
    )
    code, ended = loop.run_loop(one, one.init(), samples_seen=0, callbacks=outside)
    checkpoints.close()
    assert (
        code == loop.FAILED
        and batches_drawn[0] == 7
        and "stopped at step 7" in logged[0]
        and "--mode=replay" in logged[1]
    )
    place = tmp_path / "dumps" / "7"
    names = {"step.json", "config.txt", "batch-0.npz", "state", "digests"}
    assert {p.name for p in place.iterdir()} == names
    about = json.loads((place / "step.json").read_text())
    assert about["metrics"]["loss"] == "nan" and about["step"] == 7

    # the step is compiled once for the two replays, on more devices than the run had
    monkeypatch.setattr(debug_dump, "Trainer", functools.cache(debug_dump.Trainer))
    kept = debug_dump.load_dump(debug_dump.newest_dump(tmp_path), print)[2]
    assert int(kept.step) == 6 and bits((kept.params, kept.opt)) == bits((ended.params, ended.opt))
    capsys.readouterr()
    assert replay.run(one.config, workdir=str(tmp_path)) == 0
    out = capsys.readouterr().out
    assert (
        "loss nan (in the run nan)" in out
        and "not finite: batch/box, 1 NaN of" in out
        and "not finite: gradient/" in out
    )
    assert "not finite: params/" not in out and out.endswith("reproduced\n")

    with np.load(place / "batch-0.npz") as file:
        arrays = {name: file[name] for name in file.files}
    np.savez(place / "batch-0.npz", **arrays | {"box": np.nan_to_num(arrays["box"], nan=30.0)})
    (place / "digests" / "batch-0.npz").unlink()  # as the refusal of a changed file advises
    assert replay.run(one.config, workdir=str(tmp_path)) == 1
    out = capsys.readouterr().out
    assert "all arrays are finite" in out and out.endswith(
        "not reproduced: this time the step is finite\n"
    )


@pytest.mark.fast
@pytest.mark.row("D1")
def test_without_a_dump_there_is_nothing_to_replay(tmp_path: pathlib.Path, capsys) -> None:
    """As on the command line: the configuration is that of the run, without --config."""
    assert command.main(["--mode=replay", "--workdir", str(tmp_path)]) == 2
    assert "has no config.txt" in capsys.readouterr().err
    (tmp_path / "config.txt").write_text(configuration.config_to_text(toy.settings()))
    assert command.main(["--mode=replay", "--workdir", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert "has no dumps/<step>" in err and err.count("\n") == 1


@pytest.mark.fast
@pytest.mark.row("D1")
def test_a_replay_takes_the_file_of_what_a_run_registered(tmp_path: pathlib.Path, capsys) -> None:
    """Its settings are those of the run: those of the file, which would be refused, are not
    read."""
    saved = configuration.config_to_text(toy.settings())
    (tmp_path / "config.txt").write_text(saved.replace("'shapes'", "'of_a_file'"))
    (tmp_path / "own.py").write_text(
        "from m3i_jax.config import default_config\n"
        "from m3i_jax.data.sources.registry import SourceKind, register_source\n"
        "register_source(SourceKind(name='of_a_file', open=lambda *_: None))\n"
        "def get_config():\n"
        "    config = default_config()\n"
        "    config.data.source = 'unknown'\n"
        "    return config\n"
    )
    place = ["--mode=replay", "--workdir", str(tmp_path)]
    with SOURCE_KINDS.temporary():
        assert command.main(place) == 2
        assert "'of_a_file' is not one of" in capsys.readouterr().err
        assert command.main([*place, "--config", str(tmp_path / "own.py")]) == 2
        assert "has no dumps/<step>" in capsys.readouterr().err


@pytest.mark.fast
@pytest.mark.row("D3")
def test_lambda_is_finite_whatever_the_gradients(trials) -> None:
    """10,000 sequences of norms with zeros, the smallest and the largest floats, and NaN and
    Inf."""
    r, limits = np.random.default_rng(0), (0.0, 1e4)
    edges = np.array([0.0, 1e-45, 1e-38, 1e-8, 1.0, 1e8, 3e38, np.inf, np.nan], np.float32)
    norms = np.where(
        r.random((10_000, 6, 2)) < 0.7,
        r.choice(edges, (10_000, 6, 2)),
        np.exp(r.normal(0, 20, (10_000, 6, 2))),
    )
    tx = balance.track_balance(0.99)

    def weights(norms_6x2: jax.Array) -> jax.Array:
        def one(seen: Any, pair: jax.Array) -> Any:
            _, seen = tx.update(jnp.zeros(()), seen, feature_grad_norms=(pair[0], pair[1]))
            return seen, balance.balance_weight(seen, gamma=1.0, limits=limits)

        return jax.lax.scan(one, tx.init(jnp.zeros(())), norms_6x2)[1]

    out = np.asarray(jax.jit(jax.vmap(weights))(norms.astype(np.float32)))
    for row in np.isfinite(out).all(1) & (out >= limits[0]).all(1) & (out <= limits[1]).all(1):
        trials.add(bool(row))
    trials.figure = f"{trials.passed:,} of {trials.trials:,} finite"
    assert trials.passed == 10_000
    usable = np.isfinite(norms.astype(np.float32)) & (norms.astype(np.float32) > 0)
    # one of the two was never seen: lambda is gamma
    unseen = ~(np.maximum.accumulate(usable, 1).all(-1))
    assert unseen.any() and (out[unseen] == 1.0).all()


def series(count: int, seed: int) -> np.ndarray:
    """A falling loss and a gradient norm, with normal noise, [count, 2]."""
    r, t = np.random.default_rng(seed), np.arange(count)
    return np.stack(
        [3 * np.exp(-t / 4000) + 1 + 0.1 * r.normal(size=count), 0.5 + 0.05 * r.normal(size=count)],
        1,
    ).astype(np.float32)


@jax.jit
@jax.vmap
def skipped(values: jax.Array) -> jax.Array:
    def one(window: optimizer.SpikeState, pair: jax.Array) -> Any:
        spike = optimizer.is_spike(window, pair[0], pair[1], 6.0)
        return optimizer.push_window(window, pair[0], pair[1], spike), spike

    return jax.lax.scan(one, optimizer.watch_spikes().init(None), values)[1]


@pytest.mark.fast
@pytest.mark.row("D2")
def test_spikes_are_skipped_and_noise_is_not(trials) -> None:
    """Losses of ten times and gradients of a hundred times their level, alone and three in a row;
    20,000 steps of noise without spikes."""
    at_, values = (
        np.array([0, 100, 127, 128, 500, 501, 502, 3000, 9999]),
        np.stack([series(10_000, seed) for seed in (0, 1, 0, 0)]),
    )
    values[2, at_, 0] *= 10.0
    values[3, at_, 1] *= 100.0
    found = np.asarray(skipped(values))
    clean = int(found[:2].sum())
    wanted = at_[at_ >= optimizer.SPIKE_WINDOW]  # before that there is nothing to compare with
    for row in found[2:]:
        trials.add(bool(row[wanted].all()) and row.sum() <= len(wanted) + 1)
    trials.figure = f"{clean} of 20,000 clean steps skipped"
    assert trials.passed == 2 and clean <= 2


@pytest.mark.fast
@pytest.mark.row("D2")
def test_a_lasting_change_is_not_skipped_forever() -> None:
    values = series(1000, 2)
    values[500:, 0] += 30.0
    found = np.flatnonzero(np.asarray(skipped(values[None]))[0])
    assert found[0] == 500 and found[-1] <= 500 + optimizer.SPIKE_WINDOW // 2 + 1


@pytest.mark.slow
@pytest.mark.row("D2")
def test_a_skipped_spike_leaves_every_bit_but_the_window() -> None:
    """In the real step: a batch with a loss above all earlier ones is skipped if that is
    configured, and the window is saved and restored."""
    one = made("sim", model__encoder__depth=1, optim__skip_spikes=6.0, train__steps=400)
    current = one.init()
    for k in range(optimizer.SPIKE_WINDOW):
        current, metrics = one.step(current, toy.batch(one.config, k))
    assert int(metrics["skipped/spikes"]) == 0
    before, window = (
        jax.device_get((current.params, current.opt)),
        jax.device_get(current.opt["spikes"]),
    )
    opt = before[1].copy()
    opt["spikes"] = window._replace(seen=window.seen * np.float32(0.1))
    lowered = task.State(step=current.step, params=before[0], opt=opt)
    after, metrics = one.step(device(lowered), toy.batch(one.config, 999))
    assert (
        int(metrics["skipped/spikes"]) == 1
        and float(metrics["skipped/not_finite"]) == 0
        and int(after.step) == optimizer.SPIKE_WINDOW + 1
    )
    rest = [{k: v for k, v in opt.items() if k != "spikes"} for opt in (before[1], after.opt)]
    assert bits((after.params, rest[1])) == bits((before[0], rest[0]))
    assert int(after.opt["spikes"].steps) == optimizer.SPIKE_WINDOW + 1
    again = task.State(step=current.step, params=before[0], opt=before[1])
    plain, metrics = one.step(device(again), toy.batch(one.config, 999))
    assert int(metrics["skipped/spikes"]) == 0 and bits(plain.params) != bits(before[0])


@pytest.mark.fast
@pytest.mark.row("D7")
def test_the_target_does_not_stall(trials) -> None:
    """10,000 updates with a momentum from 0.995 to 1, compared with float64 in numpy; in bfloat16
    the target would stop changing."""
    count, width = 10_000, 64
    walk = (1 + np.cumsum(np.random.default_rng(0).normal(0, 1e-3, (count + 1, width)), 0)).astype(
        np.float32
    )
    momentum = 1 - 0.005 * (np.cos(np.pi * np.arange(1, count + 1) / count) + 1) / 2
    exact = walk[0].astype(np.float64)
    for m, now in zip(momentum, walk[1:].astype(np.float64), strict=True):
        exact = m * exact + (1 - m) * now
    tx = ema.track_target(ema.cosine_momentum(0.995, count))

    def end(dtype: Any) -> np.ndarray:
        def one(seen: Any, now: jax.Array) -> Any:
            return tx.update(jnp.zeros_like(now), seen, now)[1], None

        start = tx.init(jnp.asarray(walk[0], dtype))
        return np.asarray(
            jax.jit(lambda w: jax.lax.scan(one, start, w)[0].params)(jnp.asarray(walk[1:], dtype)),
            np.float64,
        )

    moved = np.abs(exact - walk[0]).max()
    error, coarse = (
        np.abs(end(dtype) - exact).max() / moved for dtype in (jnp.float32, jnp.bfloat16)
    )
    trials.figure = f"error {error:.1e} of the way in float32, {coarse:.1e} in bfloat16"
    trials.add(bool(error < 1e-4 < coarse))
    assert trials.passed == 1, trials.figure


@pytest.mark.fast
@pytest.mark.row("D7")
def test_what_is_kept_is_float32_when_products_are_bfloat16() -> None:
    one = trainer.Trainer(
        toy.settings(objective__forms="m3i", model__dtype="bfloat16"), made_mesh(), toy.VOCABULARY
    )
    kinds = {
        leaf.dtype
        for leaf in jax.tree.leaves((one.template.params, one.template.opt))
        if jnp.issubdtype(leaf.dtype, jnp.inexact)
    }
    assert kinds == {jnp.dtype("float32")}
