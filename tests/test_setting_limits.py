"""The limits of settings: every setting has limits, they hold at both ends, and a setting without
limits cannot be declared."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import pytest

from m3i_jax import config, schema
from m3i_jax.errors import DoesNotFit, UserError
from m3i_jax.schema import limits


def fields(node: Any = None, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(dotted key, default, metadata) of every setting."""
    node = node or schema.Config()
    for field in dataclasses.fields(node):
        value = getattr(node, field.name)
        if dataclasses.is_dataclass(value):
            yield from fields(value, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, value, field.metadata


SETTINGS = {key: (default, metadata) for key, default, metadata in fields()}
NUMBERS = [
    key
    for key, (_, metadata) in SETTINGS.items()
    if isinstance(metadata["limits"], limits.NumberLimit)
]
LINES = [
    key
    for key, (_, metadata) in SETTINGS.items()
    if isinstance(metadata["limits"], limits.TextLimit)
]


def test_every_setting_declares_choices_or_limits() -> None:
    for key, (default, metadata) in SETTINGS.items():
        takes = bool(metadata["choices"]) + (metadata["limits"] is not None)
        assert takes == (0 if isinstance(default, bool) else 1), key
        entries = default if isinstance(default, tuple) else (default,)
        if metadata["choices"]:
            assert default in metadata["choices"], key
        elif isinstance(default, str) or key in LINES:
            assert metadata["limits"].kind in limits.TEXTS, key
        elif not isinstance(default, bool):
            assert isinstance(metadata["limits"], limits.NumberLimit), key
            assert entries or not metadata["limits"].count.fewest or metadata["limits"].count.open


@pytest.mark.parametrize("default", [1, 0.5, "text", (), (1, 2)])
def test_a_setting_without_limits_is_refused(default: Any) -> None:
    with pytest.raises(TypeError, match="'a number' has neither choices nor limits"):
        limits.option(default, "a number")
    limits.option(True, "a number")


def refused(key: str, value: Any) -> UserError:
    settings = config.default_config()
    *sections, name = key.split(".")
    section = settings
    for part in sections:
        section = section[part]
    with section.ignore_type():
        section[name] = value
    with pytest.raises(UserError) as error:
        config.resolve(settings)
    return error.value


@pytest.mark.parametrize("key", NUMBERS)
def test_a_number_beyond_either_end_is_refused_with_its_key(key: str) -> None:
    """Both ends: the next float or integer beyond the limit, which is refused. The value that
    leaves a setting open is none of these."""
    default, metadata = SETTINGS[key]
    limit, entries = metadata["limits"], default if isinstance(default, tuple) else (default,)
    entries = entries or (1,)  # of a list that is empty by default
    integer = all(isinstance(entry, int) for entry in entries)
    low = (
        limit.least
        if limit.above
        else (limit.least - 1 if integer else math.nextafter(limit.least, -math.inf))
    )
    high = (
        limit.most
        if limit.below
        else (limit.most + 1 if integer else math.nextafter(limit.most, math.inf))
    )
    if low == limit.open:
        low = math.nextafter(low, -math.inf)
    for value in (low, high):
        error = refused(key, (value,) * len(entries) if isinstance(default, tuple) else value)
        assert str(error).startswith(f"config.{key}: "), error
        assert isinstance(error, DoesNotFit) == (limit.fits and value > limit.most)


@pytest.mark.parametrize("key", LINES)
def test_a_text_that_is_no_line_is_refused_with_its_key(key: str) -> None:
    default, metadata = SETTINGS[key]
    more = ("a\nb", "a\x1b[2J", "\udcff") if key == LINES[0] else ()
    for value in ("a\0b", *more, "a" * (metadata["limits"].most + 1)):
        assert str(refused(key, (value,) if isinstance(default, tuple) else value)).startswith(
            f"config.{key}: "
        )


def test_what_stands_in_a_list_is_counted() -> None:
    assert "three numbers: the devices along" in str(refused("parallel.mesh", (1, 1)))
    assert "the smaller first" in str(refused("data.crop_ratio", (2.0, 1.0)))
    assert "at least 1 entries" in str(refused("evaluate.templates", ()))
    assert "names m3i twice" in str(refused("objective.forms", ("m3i", "m3i")))
    assert "at most 100 entries" in str(refused("objective.forms", tuple(map(str, range(101)))))
