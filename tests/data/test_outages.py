"""How long a read that fails is retried, by a clock that is set."""

import pytest

from m3i_jax.data.sources import outages


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    clock = [100_000.0]
    monkeypatch.setattr(outages.time, "monotonic", lambda: clock[0])
    return clock


def test_reads_are_brief_while_others_succeed(now: list[float]) -> None:
    known = outages.Outages()
    known.answered("gs://a/9.tar")
    assert not known.lasts("gs://a/0.tar")
    known.begin("gs://a/0.tar", now[0] - 110)
    assert known.lasts("gs://a/x/1.tar") and not known.lasts("gs://b/0.tar")
    assert not known.lasts("/data/0.tar")
    now[0] += outages.RECENT + 1  # nothing has succeeded since: the outage is of all
    assert not known.lasts("gs://a/0.tar")
    known.answered("gs://b/0.tar")
    assert known.lasts("gs://a/0.tar")
    now[0] += outages.MEMORY  # one read waits again
    known.answered("gs://b/0.tar")
    assert not known.lasts("gs://a/0.tar")


def test_a_lost_store_is_waited_for_five_times(now: list[float]) -> None:
    """A reader of records in their order meets the lost ones one after another; its threads wait at
    the same time."""
    known, waited = outages.Outages(), 0
    known.answered("/data/0.jpg")
    now[0] += 40
    for _ in range(2000):
        started = now[0]
        full = not known.lasts("/mnt/lost.jpg")
        now[0] += 110 if full else 1
        waited += full
        for _ in range(8 if full else 0):
            known.begin("/mnt/lost.jpg", started)
    assert waited == outages.PATIENT
    known.answered("/mnt/back.jpg")
    now[0] += outages.RECENT + 1
    assert not known.lasts("/mnt/lost.jpg")
