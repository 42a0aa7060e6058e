"""What a host does with what the others answered, without other processes."""

import errno

import pytest

from m3i_jax import errors
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


def test_the_exit_code_is_that_of_the_host_whose_reason_is_given(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """This host has a disk that may come back, the other a mistake, and both end with 2."""
    monkeypatch.setattr(barriers, "host_names", lambda: 2)
    monkeypatch.setattr(barriers, "host_name", lambda: 1)
    monkeypatch.setattr(barriers, "exchange_values", lambda *_, **__: ["2 /a: is missing", "1 x"])
    with (
        pytest.raises(UserError) as caught,
        errors.refuse_system_errors(),
        barriers.fail_together("read"),
    ):
        raise OSError(errno.ESTALE, "Stale file handle")
    assert caught.value.status == 2 and "/a: is missing" in str(caught.value)
