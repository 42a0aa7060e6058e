"""How long a read that fails is retried, by a clock that stands."""

import pytest

from m3i_jax.data.sources import outages


def test_reads_are_brief_while_others_succeed(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(outages.time, "monotonic", lambda: now[0])
    known = outages.Outages()
    known.answered()
    assert not known.lasts("gs://a/0.tar")
    known.begin("gs://a/0.tar")
    assert known.lasts("gs://a/x/1.tar") and not known.lasts("gs://b/0.tar")
    assert not known.lasts("/data/0.tar")
    now[0] += outages.RECENT + 1  # nothing has succeeded since: the outage is of all
    assert not known.lasts("gs://a/0.tar")
    known.answered()
    assert known.lasts("gs://a/0.tar")
    now[0] = 1000.0 + outages.MEMORY + 1  # one read waits again
    known.answered()
    assert not known.lasts("gs://a/0.tar")
