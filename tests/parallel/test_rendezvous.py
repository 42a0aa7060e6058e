"""Waiting for all processes before jax.distributed, with threads in place of processes."""

import concurrent.futures
import socket
import time

import pytest

from m3i_jax.errors import UserError
from m3i_jax.parallel import rendezvous
from m3i_jax.parallel.barriers import HostMissing
from tests.free_port import free_address


def meet(*who: tuple[int, int, float], limit: float = 10.0, at: str = "") -> list[str]:
    """Run one thread for each (process, processes, seconds before it starts); returns the outcome
    of each."""
    at = at or free_address()

    def one(process: int, processes: int, after: float) -> str:
        time.sleep(after)
        try:
            rendezvous.wait_for_processes(at, processes, process, limit=limit)
        except (HostMissing, UserError) as error:
            return f"{type(error).__name__} {error}"
        return "go"

    with concurrent.futures.ThreadPoolExecutor(len(who)) as pool:
        return list(pool.map(lambda w: one(*w), who))


def test_all_come_in_any_order_and_the_port_is_free_again() -> None:
    at = free_address()
    for _ in range(2):
        assert meet((0, 3, 0.3), (2, 3, 0.0), (1, 3, 0.5), at=at) == ["go"] * 3


def test_who_is_missing_is_named_to_all_that_came() -> None:
    lines = meet((0, 4, 0.0), (2, 4, 0.0), limit=1.0)
    assert (
        lines[0] == lines[1]
        and lines[0].startswith("HostMissing")
        and "for process 1, 3 of 4" in lines[0]
    )
    (alone,) = meet((1, 2, 0.0), limit=0.5)
    assert "HostMissing" in alone and "for process 0 at 127.0.0.1" in alone


def test_numbers_and_counts_must_fit() -> None:
    lines = meet((0, 3, 0.0), (1, 3, 0.2), (1, 3, 0.6))
    assert all("UserError --process-id: 1 was given twice" in s for s in lines)
    lines = meet((0, 2, 0.0), (1, 4, 0.1))
    assert all("process 1 on " in s and "is one of 4, process 0 is one of 2" in s for s in lines)


def test_a_process_that_was_started_again_replaces_the_first() -> None:
    at = free_address()
    host, port = at.split(":")

    def dies() -> None:
        for _ in range(50):
            try:
                with socket.create_connection((host, int(port)), timeout=1.0) as line:
                    line.sendall(b"m3i_jax 1 3 gone\n")
                    return
            except OSError:
                time.sleep(0.05)

    def stranger() -> None:
        time.sleep(0.3)
        with socket.create_connection((host, int(port)), timeout=1.0) as line:
            line.sendall(b"GET / HTTP/1.1\r\n\r\n")

    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        run = pool.submit(meet, (0, 3, 0.0), (1, 3, 0.6), (2, 3, 0.9), at=at)
        pool.submit(dies), pool.submit(stranger)
        assert run.result() == ["go"] * 3


@pytest.mark.row("A15")
def test_a_name_without_an_address_is_refused_at_once_and_a_wait_is_logged(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for process in (0, 1):
        with pytest.raises(
            UserError,
            match=(
                r"--coordinator no-such-host\.invalid:8476: the name has no address here \(.+\);"
                r" give"
            ),
        ):
            rendezvous.wait_for_processes("no-such-host.invalid:8476", 2, process, limit=600.0)
    monkeypatch.setattr(rendezvous, "FIRST_LOG", 0.2)
    monkeypatch.setattr(rendezvous, "LOG_EVERY", 0.4)
    for process, wanted in (
        (0, "waiting for process 1 of 2 at 127.0.0.1:"),
        (1, "waiting for process 0 at 127.0.0.1:"),
    ):
        lines: list[str] = []
        with pytest.raises(HostMissing):
            rendezvous.wait_for_processes(free_address(), 2, process, limit=1.5, log=lines.append)
        assert len(lines) >= 2 and all(line.startswith(wanted) for line in lines)
    lines = []
    with pytest.raises(UserError, match="has no address here"):  # of a scheduler the name may come
        rendezvous.wait_for_processes(
            "no-such-host.invalid:8476", 2, 1, limit=1.5, patient=True, log=lines.append
        )
    assert lines and lines[0].startswith("waiting for an address of no-such-host.invalid:8476 (")


@pytest.mark.row("A15")
def test_who_came_and_waits_for_others_logs_that(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "FIRST_LOG", 0.1)
    at, lines = free_address(), list[str]()
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        first = pool.submit(meet, (0, 3, 0.0), limit=2.0, at=at)
        with pytest.raises(HostMissing, match="for process 2 of 3"):
            rendezvous.wait_for_processes(at, 3, 1, limit=2.0, log=lines.append)
        assert "for process 2 of 3" in first.result()[0]
    assert any(
        line.startswith("waiting for the other processes, with process 0 at") for line in lines
    )


def test_a_port_that_is_taken_is_a_mistake() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        pytest.raises(UserError, match="cannot be used here"),
    ):
        rendezvous.wait_for_processes(f"127.0.0.1:{taken.getsockname()[1]}", 2, 0, limit=0.5)
