"""The matrix itself: the table of results for tests that pass, fail, are skipped and count; and
that every row has a test."""

import ast
import pathlib
import subprocess
import sys
import textwrap

import pytest

from tests.faults.rows import NOT_HERE, ROWS

ROOT = pathlib.Path(__file__).parent.parent.parent

EXAMPLE = """
    import pytest

    @pytest.mark.row("B3")
    def test_counts(trials):
        trials.figure = "1 of 3 silent"
        for k in range(3):
            trials.add(k > 0)
        assert trials.passed == trials.trials

    @pytest.mark.row("B4", "B5")
    @pytest.mark.parametrize("kind", ["cut", "empty"])
    def test_plain(kind):
        pass

    @pytest.mark.row("B5")
    def test_fails():
        raise ValueError

    @pytest.mark.row("B1")
    def test_skipped():
        pytest.skip("needs a mount")
"""


@pytest.mark.fast
@pytest.mark.row()
def test_the_table_is_what_the_run_did(tmp_path: pathlib.Path) -> None:
    """In its own process, with a copy of the plugin beside an example; lines of rows without a
    result are kept."""
    here, results = pathlib.Path(__file__).parent, tmp_path / "RESULTS.md"
    (tmp_path / "conftest.py").write_text((here / "conftest.py").read_text())
    (tmp_path / "test_example.py").write_text(textwrap.dedent(EXAMPLE))
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n    row: rows\n    fast: short\n")
    results.write_text(
        "| B2 | from before | 7 | 7 | kept |\n| B3 | from before | 9 | 9 | replaced |\n"
    )
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-n",
        "0",
        "-p",
        "no:cacheprovider",
        "-c",
        str(tmp_path / "pytest.ini"),
        str(tmp_path),
    ]
    environment = {"PATH": "", "PYTHONPATH": str(ROOT), "M3I_FAULTS_RESULTS": str(results)}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert "2 failed, 2 passed, 1 skipped" in done.stdout, done.stdout + done.stderr
    rows = {
        line.split("|")[1].strip(): line
        for line in results.read_text().splitlines()
        if line.startswith("| ")
    }
    assert rows["B3"].endswith("| 3 | 2 | 1 of 3 silent |")
    assert rows["B4"].endswith("| 2 | 2 |  |") and rows["B5"].endswith("| 3 | 2 |  |")
    assert rows["B1"].endswith("| 0 | 0 | not tried: needs a mount |")
    assert rows["B2"] == "| B2 | from before | 7 | 7 | kept |" and rows["F7"].endswith(
        "| 0 | 0 | not run |"
    )
    assert set(ROWS) < set(rows)
    # In parts: the last results of the other tests still count.
    (tmp_path / "test_example.py").write_text(
        textwrap.dedent(EXAMPLE)
        .replace("raise ValueError", "pass")
        .replace("def test_skipped", "def test_x")
    )
    subprocess.run(
        [*command, "-k", "fails or x"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    rows = {
        line.split("|")[1].strip(): line
        for line in results.read_text().splitlines()
        if line.startswith("| ")
    }
    assert rows["B5"].endswith("| 3 | 3 |  |") and rows["B3"].endswith("| 3 | 2 | 1 of 3 silent |")
    assert rows["B1"].count("needs a mount") == 1
    (tmp_path / "test_example.py").write_text("def test_of_no_row():\n    pass\n")
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 4 and "say which row" in done.stderr


def marked(source: str) -> set[str]:
    """Rows of the tests of a file."""
    if "mark.row" not in source:
        return set()
    calls = [
        node
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.mark.row"
    ]
    return {
        argument.value
        for call in calls
        for argument in call.args
        if isinstance(argument, ast.Constant)
    }


@pytest.mark.fast
@pytest.mark.row()
def test_every_row_has_a_test_or_a_reason() -> None:
    assert marked('@pytest.mark.row("B3", "B4")\ndef f(): pass') == {"B3", "B4"}
    tried = set().union(*(marked(path.read_text()) for path in (ROOT / "tests").rglob("test_*.py")))
    assert tried <= set(ROWS) and len(ROWS) >= 55
    assert set(NOT_HERE) == set(ROWS) - tried
