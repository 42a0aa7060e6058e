"""Rows A7, B10: data that come too slowly, and devices that cannot hold the state."""

import pathlib
import re
import resource
import statistics
import time

import jax
import pytest

from m3i_jax import main as command
from m3i_jax import parallel
from m3i_jax.errors import DoesNotFit
from m3i_jax.training import goodput
from m3i_jax.training.trainer import Trainer
from tests import toy
from tests.faults.hostile import ROOT
from tests.training.test_loop import World


@pytest.mark.fast
@pytest.mark.row("A7")
@pytest.mark.parametrize(("slow", "warnings"), [("draw", 1), ("dispatch", 0)])
def test_training_that_waits_for_data_is_logged(
    monkeypatch: pytest.MonkeyPatch, trials, slow: str, warnings: int
) -> None:
    """A warning within two readings of the clock, once, with the share; a step that is slow itself
    gives none."""
    monkeypatch.setattr(goodput.InputStallAlarm, "SECONDS", 0.05)
    world = World(9, log_every=1)
    world.at = {
        event: lambda: time.sleep(0.05) for event in (slow, *(f"{slow} {k}" for k in range(10)))
    }
    logged: list[tuple[int, str]] = []
    assert world.run(monkeypatch, log=lambda text: logged.append((len(world.lines), text))) == 0
    shares = [values["perf/input_wait"] for _, values in world.lines if "perf/input_wait" in values]
    assert trials.add(
        len(logged) == warnings and (statistics.median(shares) > 0.5) == bool(warnings)
    ), (
        logged,
        shares,
    )
    for lines, text in logged:
        assert (
            lines == 2
        )  # that of the evaluation and one reading: the warning comes with the second
        assert re.match(
            r"warning: training waits for data: \d+% of the last reading's time, [\d.]+ s since it"
            r" began; raise data.threads",
            text,
        )
        trials.figure = "logged with the second reading"


@pytest.mark.fast
@pytest.mark.row("B10")
def test_a_state_that_the_devices_cannot_hold_is_refused_before_it_is_made(
    monkeypatch, capsys, trials, tmp_path: pathlib.Path
) -> None:
    """Terabytes on this machine: exit 3 and one line, without allocating any of it, and without
    files of a run."""
    monkeypatch.chdir(ROOT)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    size = {"width": 16384, "depth": 64, "heads": 64}
    huge = [f"--config.model.encoder.{key}={value}" for key, value in size.items()]
    quick = [
        "--config",
        "configs/quickstart.py",
        "--config.data.size=64",
        "--config.evaluate.knn=False",
        "--config.train.panel_every=0",
    ]
    assert command.main([*quick, *huge, "--workdir", str(tmp_path)]) == 3
    (line,) = capsys.readouterr().err.splitlines()
    found = re.search(
        r"the state \(parameters, moments and target, ([\d,.]+) GiB in all\).* which have ([\d,.]+)"
        r" GiB; (.*), or use",
        line,
    )
    assert (
        found
        and float(found[1].replace(",", "")) > 1000 > 0 < float(found[2].replace(",", ""))
        and "or more of them" in found[3]
    ), line
    more = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**10
    assert trials.add(more < 1500), more
    assert (
        not list((tmp_path / "checkpoints").glob("*")) and not (tmp_path / "metrics.jsonl").exists()
    )
    trials.figure = (
        f"{found[1]} GiB of state refused on a machine with"
        f" {float(found[2].replace(',', '')) * jax.device_count():,.0f} free"
    )


@pytest.mark.fast
@pytest.mark.row("B10")
def test_too_few_devices_for_a_state_that_was_split(
    monkeypatch: pytest.MonkeyPatch, trials
) -> None:
    """A state of which each of eight devices holds an eighth is refused on one device with half of
    the memory, and the error says how to fit it."""
    config = toy.settings(model__encoder__width=256, model__encoder__depth=1)

    def trainer(count: int, shape: tuple[int, int, int]) -> Trainer:
        return Trainer(config, parallel.make_mesh(shape, jax.devices()[:count]), 0)

    split, whole = trainer(8, (1, 8, 1)), trainer(1, (1, 1, 1))
    part, all_ = (parallel.bytes_per_device(one.template, one.shardings) for one in (split, whole))
    assert (
        all_ == sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(whole.template))
        and all_ / 8 <= part < all_ / 2
    )
    monkeypatch.setattr(parallel, "device_memory", lambda mesh: all_ / 2)
    split.check_state_fits()
    with pytest.raises(
        DoesNotFit, match=r"of each of the 1 cpu device\(s\), .*; it needs 2 or more of them"
    ):
        whole.check_state_fits()
    with pytest.raises(
        DoesNotFit,
        match=r"8 cpu device\(s\), .*; config.parallel.mesh=\(1,-1,1\) splits it over all of them",
    ):
        trainer(8, (8, 1, 1)).check_state_fits()
    monkeypatch.setattr(parallel, "device_memory", lambda mesh: float(all_))
    whole.check_state_fits()
    trials.trials = trials.passed = 4
