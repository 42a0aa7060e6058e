"""Marks and results of the fault matrix.

`@pytest.mark.row("B3")` (or several names) says which rows of rows.py a test is a trial of; every test in this folder has it, those of
the matrix itself with no name. A test that makes many trials counts them with the fixture `trials`; any other counts as one. `fast` are
short versions for the normal suite, `slow` the long ones that launch/faults.sh runs. With M3I_FAULTS_RESULTS=FILE a run writes its table
there; rows that did not run keep the line they had."""

import dataclasses
import os
import pathlib
from collections.abc import Iterator

import pytest

from tests.faults.rows import NOT_HERE, ROWS

RESULTS = "M3I_FAULTS_RESULTS"


@dataclasses.dataclass
class Trials:
    """What a test counts: trials, how many of them passed, and the figure that is reported, such as "0 of 1,000 silent"."""

    trials: int = 0
    passed: int = 0
    figure: str = ""

    def add(self, passed: bool) -> bool:
        self.trials += 1
        self.passed += bool(passed)
        return passed


@pytest.fixture
def trials(request: pytest.FixtureRequest) -> Iterator[Trials]:
    """Counts the trials of a test; give it a figure before asserting, so that a failure is reported with it too."""
    counted = Trials()
    yield counted
    request.node.user_properties.append(("trials", dataclasses.asdict(counted)))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = pathlib.Path(__file__).parent
    for item in items:
        marks = list(item.iter_markers("row"))
        rows = [name for mark in marks for name in mark.args]
        if here in item.path.parents and item.path.suffix == ".py" and item.path.name.startswith("test_") and not marks:
            raise pytest.UsageError(f"{item.nodeid}: say which row of the fault matrix it is a trial of: @pytest.mark.row(...)")
        if unknown := [name for name in rows if name not in ROWS]:
            raise pytest.UsageError(f"{item.nodeid}: row {unknown[0]} is not in tests/faults/rows.py")
        item.user_properties += [("row", name) for name in rows]


@dataclasses.dataclass
class Line:
    """A row of the table while it is counted."""

    trials: int = 0
    passed: int = 0
    figures: list[str] = dataclasses.field(default_factory=list)
    skipped: list[str] = dataclasses.field(default_factory=list)

    def text(self, row: str) -> str:
        figure = "; ".join(dict.fromkeys(self.figures + [f"not tried: {why}" for why in self.skipped]))
        return f"| {row} | {ROWS[row][0]} | {self.trials} | {self.passed} | {figure.replace('|', '/')} |"


class Table:
    """Collects the reports of a run (also of several workers) into one line a row."""

    def __init__(self) -> None:
        self.lines: dict[str, Line] = {}
        self._outcome: dict[str, str] = {}

    def see(self, report: pytest.TestReport) -> None:
        if report.when != "teardown":
            worse = self._outcome.get(report.nodeid) in ("failed", "skipped")
            self._outcome[report.nodeid] = self._outcome[report.nodeid] if worse else report.outcome
            if report.outcome == "skipped" and isinstance(report.longrepr, tuple):
                for row in (value for name, value in report.user_properties if name == "row"):
                    self.lines.setdefault(str(row), Line()).skipped.append(report.longrepr[2].removeprefix("Skipped: "))
            return
        outcome = "failed" if report.outcome == "failed" else self._outcome.get(report.nodeid, "failed")
        counted = next((value for name, value in report.user_properties if name == "trials"), None)
        for row in (str(value) for name, value in report.user_properties if name == "row"):
            if outcome == "skipped":
                continue
            line = self.lines.setdefault(row, Line())
            if isinstance(counted, dict) and counted["trials"]:
                # A failure that no trial shows is one more that did not pass.
                line.trials += counted["trials"] + (outcome == "failed" and counted["passed"] == counted["trials"])
                line.passed += counted["passed"]
                line.figures += [counted["figure"]] if counted["figure"] else []
            else:
                line.trials += 1
                line.passed += outcome == "passed"

    def write(self, path: pathlib.Path) -> None:
        """The table of all rows; those that did not run keep the line that the file has."""
        before = {}
        if path.is_file():
            rows = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
            before = {line.split("|")[1].strip(): line for line in rows}
        out = [
            "# Results of the fault matrix",
            "",
            "Written by `launch/faults.sh`; do not edit. What each row promises is in `rows.py`.",
            "",
            "| row | fault | trials | passed | figure |",
            "| --- | --- | ---: | ---: | --- |",
        ]
        for row, (fault, _) in ROWS.items():
            nothing = f"| {row} | {fault} | 0 | 0 | {NOT_HERE.get(row, 'not run')} |"
            out.append(self.lines[row].text(row) if row in self.lines else before.get(row, nothing))
        path.write_text("\n".join(out) + "\n", encoding="utf-8")


_table = Table()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    _table.see(report)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if os.environ.get(RESULTS) and not hasattr(session.config, "workerinput"):
        _table.write(pathlib.Path(os.environ[RESULTS]))
