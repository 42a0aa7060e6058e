"""A host that cannot connect for heartbeats, as behind a firewall, is not taken for lost."""

import os
import pathlib
import socket
import sys
import time

import pytest

from m3i_jax import main
from m3i_jax.errors import UserError
from m3i_jax.modes import monitoring, train
from m3i_jax.parallel import barriers, distributed, heartbeat


@pytest.mark.parametrize("blocked", [True, False])
def test_the_silence_of_a_host_that_cannot_connect_means_nothing(
    monkeypatch: pytest.MonkeyPatch, blocked: bool
) -> None:
    lost: list[str] = []
    logged: list[str] = []
    store: dict[str, str] = {}
    answers = ["", "Connection refused" if blocked else ""]
    for name, value in {
        "host_names": lambda: 2,
        "host_name": lambda: 0,
        "host_label": lambda number: f"host {number}",
        "publish": store.__setitem__,
        "exchange_values": lambda name, text, **_: answers,
    }.items():
        monkeypatch.setattr(barriers, name, value)
    monkeypatch.setattr(heartbeat, "_running", [])
    monkeypatch.setattr(heartbeat, "end_heartbeat", lost.append)
    monkeypatch.setattr(heartbeat.atexit, "register", lambda *_: None)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    heartbeat.start_heartbeat(0.2, logged.append)
    (one,) = heartbeat._running
    try:
        deadline = time.monotonic() + (0.8 if blocked else 20.0)
        while not lost and time.monotonic() < deadline:
            time.sleep(0.05)
    finally:
        one.close()
    assert store
    if blocked:
        assert not lost and "no heartbeats from host 1 (Connection refused)" in logged[0]
    else:  # one that did not say so
        assert "lost host 1: silent" in lost[0] and not logged


def test_where_no_port_is_free_the_others_do_not_wait_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError("no port")

    logged: list[str] = []
    store: dict[str, str] = {}
    for name, value in {
        "host_names": lambda: 2,
        "host_name": lambda: 0,
        "host_label": lambda number: f"host {number}",
        "publish": store.__setitem__,
        "exchange_values": lambda name, text, **_: [text, "invalid literal"],
    }.items():
        monkeypatch.setattr(barriers, name, value)
    monkeypatch.setattr(heartbeat, "_running", [])
    monkeypatch.setattr(heartbeat.socket, "create_server", refuse)
    heartbeat.start_heartbeat(5.0, logged.append)
    assert list(store.values()) == [""] and not heartbeat._running
    assert "no heartbeats from host 0 (no port)" in logged[0]


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_a_host_connects_by_either_protocol(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    """As for the first meeting and for jax: hosts may have addresses of IPv6 alone."""
    if address == "::1":
        try:
            socket.create_server((address, 0), family=socket.AF_INET6).close()
        except OSError as error:
            pytest.skip(f"this machine has no IPv6: {error}")
    store: dict[str, str] = {}
    monkeypatch.setattr(barriers, "host_names", lambda: 2)
    monkeypatch.setattr(barriers, "publish", store.__setitem__)
    one = heartbeat.Heartbeat(5.0, lambda *_: None).open()
    try:
        with socket.create_connection((address, int(next(iter(store.values())))), 5.0) as line:
            line.sendall(b"1 host 1\n")
            assert line.recv(2) == b".\n"
    finally:
        one.close()


class Reported:
    """Stands for the heartbeats of this process."""

    status = 0

    def refuse(self, status: int, why: str) -> None:
        self.status, self.why = status, why


def test_a_mistake_before_a_mode_begins_ends_all_hosts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Heartbeats run from the start on: the others would wait in their first barrier."""
    monkeypatch.setattr(distributed, "start_distributed", lambda *_, **__: None)
    command = ["--config", "configs/quickstart.py", "--workdir", str(tmp_path / "a" / "run")]
    for error, status in ((UserError("no cache"), 2), (OSError(5, "Input/output", "/x"), 1)):

        def fails(workdir: pathlib.Path, error: Exception = error) -> str:
            raise error

        monkeypatch.setattr(heartbeat, "_running", [reported := Reported()])
        monkeypatch.setattr(monitoring, "enable_compilation_cache", fails)
        assert main.main(command) == status == reported.status
        assert reported.why in capsys.readouterr().err


def test_hosts_end_together(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    """The first host writes reports for minutes; the others would end with an error meanwhile."""
    events: list[object] = []

    def meet(name: str, *, limit: float) -> None:
        events.append((name, limit > 600))

    def begin(workdir: pathlib.Path) -> str:
        workdir.parent.mkdir(parents=True)
        events.append("cache")
        return ""

    monkeypatch.setattr(distributed, "start_distributed", lambda *_, **__: events.append("start"))
    monkeypatch.setattr(barriers, "barrier", meet)
    monkeypatch.setattr(monitoring, "enable_compilation_cache", begin)
    monkeypatch.setattr(train, "run", lambda *_, **__: events.append("train") or 42)
    before = os.umask(0o022)
    try:
        command = ["--config", "configs/quickstart.py", "--workdir", str(tmp_path / "a" / "run")]
        assert main.main(command) == 42
    finally:
        os.umask(before)
    assert events == ["start", "cache", "train", ("end", True)]
    # what the cache creates is as private as the rest of the run (report.private)
    assert (tmp_path / "a").stat().st_mode & 0o077 == 0
