"""The references of all settings and all metrics, written from the code.

python -m tests.references            # fails if a page is not what the code says
python -m tests.references --write    # writes configs/SETTINGS.md and m3i_jax/METRICS.md
"""

import argparse
import dataclasses
import pathlib
import sys
from typing import Any

from m3i_jax import schema
from m3i_jax.reporting.metric_text import metrics_markdown
from m3i_jax.schema.limits import ListLimit, NumberLimit, TextLimit

ROOT = pathlib.Path(__file__).parent.parent
HEAD = """# Settings

Every setting of a run with its default, the values that it accepts, and its meaning. Recipes change
many defaults: `--mode=show` prints the values of a run. On the command line a key is
`--config.KEY=VALUE`; in a recipe it is `config.KEY`. `[P]` marks what the paper states. The command
`python -m tests.references --write` writes this page from `m3i_jax/schema`, and `--help` prints the
same. [README.md](README.md) has them by topic."""
TEXTS = {"path": "path", "name": "name", "pattern": "regular expression", "line": "text"}


def number(value: float) -> str:
    """A number in few characters: 2**31 - 1 as 2147483647, 1e6 as 1e+06."""
    return str(value) if isinstance(value, int) and abs(value) < 10**6 else f"{value:.3g}"


def accepted(field: dataclasses.Field[Any], value: Any) -> str:
    """What a setting accepts, in words."""
    limits, choices = field.metadata["limits"], field.metadata["choices"]
    if isinstance(value, bool):
        return "true, false"
    if choices:
        return ", ".join(f"`{choice}`" for choice in choices)
    count: ListLimit = limits.count
    if isinstance(limits, TextLimit):
        return TEXTS[limits.kind] + ("s" if isinstance(value, tuple) else "")
    assert isinstance(limits, NumberLimit)
    words = f"{'above ' if limits.above else ''}{number(limits.least)}"
    words += f" to {'below ' if limits.below else ''}{number(limits.most)}"
    if limits.open is not None:
        words += f"; {limits.open:g}: chosen by the run"
    if isinstance(value, tuple):
        names = f" ({count.names})" if count.names else ""
        number_of = f"{count.most} numbers" if count.fewest == count.most else "numbers"
        words = f"{number_of}{names}, {words}" + ("; (): chosen by the run" if count.open else "")
    return words


def cell(text: str) -> str:
    """A text inside a cell of a Markdown table."""
    return text.replace("|", "\\|").replace("*", "\\*").replace("<", "&lt;")


def section(node: Any, prefix: str) -> str:
    """A section of settings, then its sub-sections."""
    rows, below = [], []
    for field in dataclasses.fields(node):
        value, key = getattr(node, field.name), prefix + field.name
        if dataclasses.is_dataclass(value):
            below.append(section(value, key + "."))
        else:
            text = cell(field.metadata["help"])
            rows.append(f"| `{key}` | `{value!r}` | {accepted(field, value)} | {text} |")
    title = prefix.rstrip(".") or "of the run"
    # the docstring is the introduction; dataclasses write one of their own where there is none
    text = type(node).__doc__ or ""
    text = "" if text.startswith(f"{type(node).__name__}(") else " ".join(text.split())
    head = ["| setting | default | accepts | meaning |", "|---|---|---|---|"]
    parts = [f"## {title}", *([cell(text)] if text else [])]
    if rows:
        parts.append("\n".join([*head, *rows]))
    return "\n\n".join([*(parts if rows else []), *below])


def settings_markdown() -> str:
    """All settings as a page of Markdown, one table for each section of the schema."""
    return f"{HEAD}\n\n{section(schema.Config(), '')}\n"


PAGES = {"configs/SETTINGS.md": settings_markdown, "m3i_jax/METRICS.md": metrics_markdown}


def stale() -> list[str]:
    """Names of the pages that are not what the code says."""
    return [
        name
        for name, render in PAGES.items()
        if not (ROOT / name).exists() or (ROOT / name).read_text() != render()
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--write", action="store_true", help="write the pages")
    if parser.parse_args().write:
        for name, render in PAGES.items():
            (ROOT / name).write_text(render())
    for name in (found := stale()):
        print(f"{name}: is stale; run python -m tests.references --write", file=sys.stderr)
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
