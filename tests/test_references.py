"""The references of settings and metrics are those of the code, and no metric is missing."""

import ast
import fnmatch
import json
import pathlib
import re

import pytest

from m3i_jax.reporting import metric_text
from tests import references

ROOT = references.ROOT
KINDS = (
    "eval|loss|detect|segment|info|bits|entropy|balance|collapse|perf|kernels|skipped|data|report"
)
# What is logged without a folder in its name, and the folders themselves.
NAME = re.compile(rf"(?:{KINDS})(?:/[\w*.]+)+|grad_norm")


def written(source: str) -> set[str]:
    """Metrics that a source names, `*` for what it fills in."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.JoinedStr):
            parts = (v.value if isinstance(v, ast.Constant) else "*" for v in node.values)
            text = "".join(map(str, parts))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            text = node.value
        else:
            continue
        if NAME.fullmatch(text):
            found.add(text)
    return found


def sources() -> dict[pathlib.Path, str]:
    """The package without the descriptions and without the page, which names prefixes."""
    files = sorted((ROOT / "m3i_jax").rglob("*.py"))
    others = ("metric_text.py", "run_page.py")
    return {path: path.read_text() for path in files if path.name not in others}


def described(name: str) -> bool:
    """Whether a metric, or one of those that `name` with its `*` stands for, is described."""
    texts = [text.name for _, part in metric_text.METRICS for text in part]
    return any(
        fnmatch.fnmatchcase(name, text) or ("*" in name and fnmatch.fnmatchcase(text, name))
        for text in texts
    )


@pytest.mark.parametrize("name", references.PAGES)
def test_no_page_is_stale(name: str) -> None:
    """If this fails: python -m tests.references --write."""
    assert name not in references.stale()


def test_a_stale_page_is_found(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(references, "ROOT", tmp_path)
    assert references.stale() == list(references.PAGES)


def test_every_metric_of_the_code_is_described() -> None:
    names = set().union(*map(written, sources().values()))
    assert len(names) > 20
    assert not {name for name in names if not described(name)}
    assert written('f"eval/new/{name}"') == {"eval/new/*"} and not described("eval/new/*")


def test_counts_and_flags_have_their_own_texts() -> None:
    """A step is skipped or not; workers that begin again are no annotations."""
    of = metric_text.metric_text
    flag, restarts = of("skipped/not_finite"), of("data/restarts")
    assert flag and not flag.unit and flag.text.startswith("1:")
    assert restarts and "workers" in restarts.text


def test_every_metric_of_a_run_is_described() -> None:
    log = ROOT / "tests" / "data" / "reference" / "quickstart" / "metrics.jsonl"
    names = {name for line in log.read_text().splitlines() for name in json.loads(line)}
    assert {n for n in names if metric_text.metric_text(n) is None} == {"step"}


def test_every_description_is_of_a_metric_of_the_code() -> None:
    text = "\n".join(sources().values())
    for _, metrics in metric_text.METRICS:
        for metric in metrics:
            fixed, parts = metric.name.partition("*")[0], metric.name.split("/")
            # the last part alone where the code joins a prefix and a name
            last = parts[-1].partition("*")[0] or parts[-2]
            assert any(f'"{name}' in text for name in (fixed, last)), metric
