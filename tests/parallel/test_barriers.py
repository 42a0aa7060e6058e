"""What a host does with what the others answered, without other processes."""

import pytest

from m3i_jax.errors import DoesNotFit, RunStopped, UserError
from m3i_jax.parallel import barriers


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        ("1 a bug in m3i_jax (KeyError: 'a')", RunStopped),
        ("2 /a: is damaged", UserError),
        ("3 /a: does not fit", DoesNotFit),
    ],
)
def test_all_hosts_end_as_the_one_that_failed(
    monkeypatch: pytest.MonkeyPatch, answer: str, kind: type[Exception]
) -> None:
    """With its exit code: a scheduler repeats a failure, and no mistake."""
    monkeypatch.setattr(barriers, "host_names", lambda: 2)
    monkeypatch.setattr(barriers, "exchange_values", lambda *_, **__: ["", answer])
    with pytest.raises(kind) as caught, barriers.fail_together("read"):
        pass
    assert type(caught.value) is kind and str(caught.value) == f"host 1: {answer[2:]}"
