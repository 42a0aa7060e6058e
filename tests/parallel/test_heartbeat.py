"""A host that cannot connect for heartbeats, as behind a firewall, is not taken for lost."""

import sys
import time

import pytest

from m3i_jax.parallel import barriers, heartbeat


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
