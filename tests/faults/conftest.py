"""Marks and results of the fault matrix.

`@pytest.mark.row("B3")` (one or several names) lists the rows of rows.py that a test covers; every
test in this folder has the mark, those of the matrix itself without a name. A test with many trials
counts them with the fixture `trials`; any other counts as one trial. `fast` marks short versions
for the normal suite, `slow` the long ones that launch/faults.sh runs. With
M3I_FAULTS_RESULTS=FILE.md a run writes its table to that file, and the last result of every test to
FILE.json, so that the matrix can be run in parts. Rows without a test result keep their line."""

import dataclasses
import json
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import pytest

from tests.faults.rows import NOT_HERE, ROWS

RESULTS = "M3I_FAULTS_RESULTS"


@dataclasses.dataclass
class Trials:
    """The counts of a test: trials, passed trials, and the reported figure, such as "0 of 1,000
    silent"."""

    trials: int = 0
    passed: int = 0
    figure: str = ""

    def add(self, passed: bool) -> bool:
        self.trials += 1
        self.passed += bool(passed)
        return passed


@pytest.fixture
def trials(request: pytest.FixtureRequest) -> Iterator[Trials]:
    """Counts the trials of a test; set its figure before an assertion, so that a failure is
    reported with it."""
    counted = Trials()
    yield counted
    request.node.user_properties.append(("trials", dataclasses.asdict(counted)))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = pathlib.Path(__file__).parent
    for item in items:
        marks = list(item.iter_markers("row"))
        rows = [name for mark in marks for name in mark.args]
        if (
            here in item.path.parents
            and item.path.suffix == ".py"
            and item.path.name.startswith("test_")
            and not marks
        ):
            raise pytest.UsageError(
                f"{item.nodeid}: say which row of the fault matrix it is a trial of:"
                " @pytest.mark.row(...)"
            )
        if unknown := [name for name in rows if name not in ROWS]:
            raise pytest.UsageError(
                f"{item.nodeid}: row {unknown[0]} is not in tests/faults/rows.py"
            )
        item.user_properties += [("row", name) for name in rows]


@dataclasses.dataclass
class TestResult:
    """The last result of a test: its rows, passed, failed or skipped, the reason if skipped, and
    its counts."""

    rows: list[str]
    outcome: str = "passed"
    why: str = ""
    counted: dict[str, Any] = dataclasses.field(default_factory=dict)

    def see(self, report: pytest.TestReport) -> None:
        if self.outcome == "passed":
            self.outcome = report.outcome
        if report.outcome == "failed":
            self.outcome = "failed"
        if report.outcome == "skipped" and isinstance(report.longrepr, tuple):
            self.why = report.longrepr[2].removeprefix("Skipped: ")
        self.counted = next(
            (
                dict(value)
                for name, value in report.user_properties
                if name == "trials" and isinstance(value, dict)
            ),
            {},
        )


def line(row: str, tests: list[TestResult]) -> str:
    """A row of the table. A test counts its trials or is one trial; a failure outside of the trials
    is one more failed trial."""
    trials = passed = 0
    notes: list[str] = []
    for test in tests:
        counted = (
            test.counted
            if test.counted.get("trials")
            else {"trials": 1, "passed": test.outcome == "passed", "figure": ""}
        )
        if test.outcome != "skipped":
            trials += counted["trials"] + (
                test.outcome == "failed" and counted["passed"] == counted["trials"]
            )
            passed += counted["passed"]
            notes += [counted["figure"]] if counted["figure"] else []
    notes += [f"not tried: {test.why}" for test in tests if test.outcome == "skipped"]
    return (
        f"| {row} | {ROWS[row][0]} | {trials} | {passed} |"
        f" {'; '.join(dict.fromkeys(notes)).replace('|', '/')} |"
    )


def table(tests: list[TestResult], before: str) -> str:
    """The table of all rows; rows without a test among these keep their line of `before`."""
    kept = {
        text.split("|")[1].strip(): text for text in before.splitlines() if text.startswith("| ")
    }
    out = [
        "# Results of the fault matrix",
        "",
        "Written by `launch/faults.sh`; do not edit. What each row promises is in `rows.py`.",
        "",
        "| row | fault | trials | passed | figure |",
        "| --- | --- | ---: | ---: | --- |",
    ]
    for row, (fault, _) in ROWS.items():
        tests_of_row = [test for test in tests if row in test.rows]
        out.append(
            line(row, tests_of_row)
            if tests_of_row
            else kept.get(row, f"| {row} | {fault} | 0 | 0 | {NOT_HERE.get(row, 'not run')} |")
        )
    return "\n".join(out) + "\n"


_results: dict[str, TestResult] = {}
_ended: set[str] = set()  # an interrupted test has no result


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    rows = [str(value) for name, value in report.user_properties if name == "row"]
    if rows:
        _results.setdefault(report.nodeid, TestResult(rows)).see(report)
        if report.when == "call" or report.outcome != "passed":
            _ended.add(report.nodeid)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if not os.environ.get(RESULTS) or hasattr(session.config, "workerinput"):
        return
    path = pathlib.Path(os.environ[RESULTS])
    record, all_ = path.with_suffix(".json"), {}
    if record.is_file():
        for name, result in json.loads(record.read_text(encoding="utf-8")).items():
            file, function = (
                session.config.rootpath / name.split("::")[0],
                name.split("::")[-1].split("[")[0],
            )
            # else the test was removed, and its result with it
            if file.is_file() and f"def {function}(" in file.read_text(encoding="utf-8"):
                all_[name] = TestResult(**result)
    all_ |= {name: result for name, result in _results.items() if name in _ended}
    record.write_text(
        json.dumps({name: dataclasses.asdict(all_[name]) for name in sorted(all_)}, indent=1)
        + "\n",
        encoding="utf-8",
    )
    before = path.read_text(encoding="utf-8") if path.is_file() else ""
    path.write_text(table([all_[name] for name in sorted(all_)], before), encoding="utf-8")
