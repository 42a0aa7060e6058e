"""Traces: whole steps, the costliest operations with the time of their own, and nothing that stops
training."""

import contextlib
import dataclasses
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from m3i_jax.profiling import trace


@dataclasses.dataclass
class Event:
    name: str
    start_ns: float
    duration_ns: float
    stats: tuple[tuple[str, Any], ...] = ()


@dataclasses.dataclass
class Line:
    name: str
    events: list[Event]


@dataclasses.dataclass
class Plane:
    name: str
    lines: list[Line]


def op(name: str, start: float, length: float, **stats: Any) -> Event:
    return Event(name, start, length, (("hlo_op", name), *stats.items()))


def read(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path, *planes: Plane
) -> dict[str, tuple[float, int]]:
    (tmp_path / "host.xplane.pb").touch()
    made = type(
        "Profile",
        (),
        {"from_file": staticmethod(lambda path: type("Data", (), {"planes": planes})())},
    )
    monkeypatch.setattr(trace.jax.profiler, "ProfileData", made)
    return {o.name: (round(o.seconds * 1e9), o.calls) for o in trace.trace_operations(tmp_path)}


def test_time_of_operations_inside_others_counts_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    inner = [op("dot.1", 110, 20), op("add.2", 130, 5), op("dot.1", 140, 20)]
    line = Line(
        "threads",
        [
            op("while.3", 100, 100),
            *inner,
            op("tail", 200, 7),
            Event("ThreadpoolListener", 0, 900),
            op("end: dot.1", 0, 9),
        ],
    )
    assert read(monkeypatch, tmp_path, Plane("/host:CPU", [line])) == {
        "while.3": (55, 1),
        "dot.1": (40, 2),
        "tail": (7, 1),
        "add.2": (5, 1),
    }


def test_of_a_device_only_its_operations_count(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    """On a TPU the same time stands in lines of steps, modules and operations."""
    ops = Line(
        "XLA Ops",
        [
            Event("%fusion.7 = f32[]", 0, 30, (("hlo_category", "convolution fusion"),)),
            Event("copy.1", 30, 10),
        ],
    )
    device = Plane(
        "/device:TPU:0",
        [Line("Steps", [Event("0", 0, 40)]), Line("XLA Modules", [Event("jit_step", 0, 40)]), ops],
    )
    host = Plane("/host:CPU", [Line("python", [op("on_the_host", 0, 500)])])
    assert read(monkeypatch, tmp_path, host, device) == {
        "%fusion.7 = f32[]": (30, 1),
        "copy.1": (10, 1),
    }


def test_the_table_has_shares_of_all_and_the_rest_in_one_line() -> None:
    ops = [
        trace.TraceOp("dot.1", "dot", 0.030, 20),
        trace.TraceOp("add.2", "add", 0.006, 10),
        trace.TraceOp("c", "c", 0.003, 10),
        trace.TraceOp("d", "d", 0.001, 10),
    ]
    rows = [line.split() for line in trace.operation_table(ops, 10, most=2).splitlines()[2:]]
    assert rows == [
        ["dot.1", "3.000", "75.0%", "2.0", "dot"],
        ["add.2", "0.600", "15.0%", "1.0", "add"],
        ["2", "others", "0.400", "10.0%"],
    ]


def test_a_real_trace_of_whole_steps(tmp_path: pathlib.Path) -> None:
    step = jax.jit(lambda x: jnp.tanh(x @ x))
    x, logged, found, compiled = jnp.eye(64), [], [], []

    @contextlib.contextmanager
    def block(name: str) -> Any:
        compiled.append(name)
        yield

    tracer = trace.Tracer(
        tmp_path,
        logged.append,
        3,
        pause=block,
        done=lambda place, steps: found.append((place, steps)),
    )
    for number in range(1, 8):
        if number == 2:
            tracer.ask()
        x = step(x)
        tracer(number, x)
    assert (
        logged[0] == "tracing steps 3 to 5" and len(logged) == 2 and "ui.perfetto.dev" in logged[1]
    )
    ((place, steps),) = found
    assert steps == 3 and (place / "perfetto_trace.json.gz").is_file() and str(place) in logged[1]
    calls = {o.name: o.calls for o in trace.trace_operations(place)}
    # every operation of the step as often as there are steps, whatever it is called
    assert calls and set(calls.values()) == {3}
    assert compiled == ["trace", "trace"]


def test_a_profiler_that_does_not_start_stops_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    def busy(*_: Any, **__: Any) -> None:
        raise RuntimeError("Profile has\nalready been started.")

    monkeypatch.setattr(trace.jax.profiler, "start_trace", busy)
    logged: list[str] = []
    tracer = trace.Tracer(tmp_path, logged.append, 3)
    tracer.ask()
    for number in range(5):
        tracer(number, None)
    tracer.close()
    assert logged == ["warning: no trace: Profile has already been started."]


def test_a_run_that_ends_first_says_so(tmp_path: pathlib.Path) -> None:
    logged: list[str] = []
    tracer = trace.Tracer(tmp_path, logged.append, 30)
    tracer.ask()
    tracer(1, None)
    tracer.close()
    tracer.close()
    assert (
        logged == ["tracing steps 2 to 31", "the run ended before the trace had its 30 steps"]
        and not tracer.running
    )
