"""The comparison of several runs on a report page: what makes their values incomparable is said."""

import re

import pytest

from m3i_jax import run_files, schema
from m3i_jax.modes import report
from m3i_jax.reporting import run_log, run_page
from m3i_jax.reporting.run_log import RunLog
from tests.reporting.test_run_page import log


def run(name: str, lines: list[dict], config: str = "", data: str = "") -> RunLog:
    return RunLog(name, lines, config, data, [], {})


def trained(name: str, steps: int, batch: int, **last: object) -> RunLog:
    lines = [{"step": s, "loss": 1.0 / s, "samples_seen": s * batch} for s in range(1, steps + 1)]
    return run(name, [{"step": 0, "eval/knn/top1": 0.1}, *lines, {"step": steps, **last}])


def cells(page: str, name: str) -> list[str]:
    (row,) = re.findall(rf"<tr><td>{name}</td>(.*?)</tr>", page)
    return re.findall(r"<td class=number>([^<]*)</td>", row)


def test_rows_have_their_lengths_and_values_their_steps() -> None:
    long, short = trained("long", 200, 16), trained("short", 50, 16)
    long.lines[150]["eval/knn/top1"] = 0.375
    short.lines[50]["eval/knn/top1"] = 0.5
    page = run_page.run_page_html([long, short], differs={})
    assert "<th class=number>steps</th><th class=number>images seen</th>" in page
    assert cells(page, "long") == ["200", "3,200", "0.375 (step 150)", "0.005"]
    assert cells(page, "short") == ["50", "800", "0.5", "0.02"]
    assert "37.5 %</b><span>knn/top1 at step 150, 10.0 % at step 0<" in page
    assert "Curves are over images" not in page


def test_runs_of_different_batch_sizes_are_drawn_over_images() -> None:
    """Half as many steps of twice as many images end at the same place."""
    one, two = trained("one", 40, 16), trained("two", 20, 32)
    page = run_page.run_page_html([one, two], differs={})
    chart = page[page.index("<h3>loss<") :]
    ends = [
        float(path.rpartition(" ")[2].partition(",")[0])
        for path in re.findall(r'<path class="c[01]" d="M([^"]*)"', chart)
    ]
    assert ends[0] == ends[1] > 300 and "at image 640<" in chart
    assert "Curves are over images seen." in page


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (["train.batch_size: 64 -> 32"], "Batch sizes of b and a differ"),
        (["objective.forms: ('m3i',) -> ('mae',)"], "Objectives of b and a differ: losses are not"),
        (["evaluate.k: 20 -> 7"], "Settings of evaluations of b and a differ"),
        (["data, source 1: x -> y"], "Data of b and a differ"),
    ],
)
def test_what_makes_rows_incomparable_is_said(lines: list[str], said: str) -> None:
    runs = [trained("a", 4, 2), trained("b", 4, 2)]
    assert said in run_page.run_page_html(runs, differs={"b": lines})
    assert " differ: " not in run_page.run_page_html(runs, differs={"b": ["seed: 0 -> 1"]})


def test_evaluations_and_data_of_runs_are_compared(tmp_path) -> None:
    for name, k, images in (("a", 20, 9), ("b", 7, 5), ("c", 20, 9)):
        place = log(tmp_path / name, [{"step": 1, "loss": 1.0}])
        run_files.write_text_atomic(place / "config.txt", f"seed = 0\nevaluate.k = {k}\n")
        run_files.write_text_atomic(
            place / "data.txt", f"source 1 = x, {images} images, fingerprint 0\n"
        )
    beside = tuple(str(tmp_path / name) for name in "bc")
    config = schema.Config(report=schema.Report(beside=beside))
    page = report.write_report(config, tmp_path / "a").read_text()
    assert "<li>evaluate.k: 20 -&gt; 7</li>" in page
    assert "<li>data, source 1: x, 9 images, fingerprint 0 -&gt; x, 5 images" in page
    assert "<h3>c differs in</h3><p>no setting" in page


def test_the_score_of_a_dense_run_is_in_its_headline() -> None:
    names = ("eval/box/AP", "eval/mask/AP", "eval/segmentation/mIoU", "eval/box/AP50")
    first, last = dict.fromkeys(names, 0.125), dict.fromkeys(names, 0.5)
    page = run_page.run_page_html(
        [run("a", [{"step": 0, **first}, {"step": 9, **last}])], differs={}
    )
    for name in ("box/AP", "mask/AP", "segmentation/mIoU"):
        assert f"<b>50.0 %</b><span>{name}, 12.5 % at step 0<" in page
    assert "<span>box/AP50" not in page


def test_every_run_has_a_line_that_differs() -> None:
    runs = [run(f"r{k}", [{"step": s, "loss": 1.0 + k} for s in (1, 2)]) for k in range(20)]
    page = run_page.run_page_html(runs, differs={})
    drawn = re.findall(r'<path class="([^"]*)"', page[page.index("<h3>loss<") :])
    legend = re.findall(r'<span><i class="([^"]*)"></i>r\d+</span>', page)
    assert len(set(drawn)) == len(drawn) == 20 and drawn == legend
    assert drawn[8] == "c0 dashed" and drawn[16] == "c0 dotted"


def test_a_curve_has_its_values_that_are_not_finite() -> None:
    lines = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": "nan"}, {"step": 3, "loss": 1.0}]
    page = run_page.run_page_html([run("a", lines)], differs={})
    assert page.count(run_page.CURVES) == 1 and "a: not finite at step 2<" in page
    assert run_page.CURVES not in run_page.run_page_html([run("a", lines[:1])], differs={})


def test_a_log_is_walked_once_whatever_is_asked_of_it() -> None:
    class Lines(list):
        walks = 0

        def __iter__(self):
            self.walks += 1
            return super().__iter__()

    lines = Lines({"step": s, **{f"loss/{k}": 1.0 for k in range(9)}} for s in range(1, 9))
    page = run_page.run_page_html([run("a", lines)], differs={})
    assert lines.walks == 1 and page.count("<h3>loss/") == 9


def test_a_run_log_is_loaded_with_its_metrics(tmp_path) -> None:
    made = run_log.load_run_log(log(tmp_path / "a", [{"step": 1, "loss": "nan"}, {"step": 5}]))
    assert made.names == ["loss"] and made.end == 5 and made.last_point("loss")[0] == 1
