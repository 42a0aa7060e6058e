"""A host that cannot connect for heartbeats, as behind a firewall, is not taken for lost."""

import socket
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
