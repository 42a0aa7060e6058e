"""The report of a run: how it reads a log and what it draws; it opens without a network, and a
browser logs no errors."""

import base64
import json
import pathlib
import re
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image

from m3i_jax import privacy, run_files, schema
from m3i_jax.errors import UserError
from m3i_jax.modes import report
from m3i_jax.reporting import figures, html_page, run_log, run_page, svg_charts

CHROMIUM = next(
    (
        found
        for name in ("chromium", "chromium-browser", "google-chrome")
        if (found := shutil.which(name))
    ),
    "",
)
HOSTILE = '</pre><script>document.title="fired"</script><img src=x onerror="document.title=1">'


def log(place: pathlib.Path, lines: list[dict], tail: str = "") -> pathlib.Path:
    place.mkdir(parents=True)
    (place / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + tail)
    return place


@pytest.fixture
def two(tmp_path: pathlib.Path) -> tuple[pathlib.Path, pathlib.Path]:
    """Two runs: one with panels and hostile names in its settings, and a shorter one."""
    lines = [{"step": 0, "eval/knn/top1": 0.25}]
    lines += [
        {
            "step": s,
            "loss": 5.0 / s,
            "loss/text": 1.0,
            "perf/images_per_sec": 90.0,
            "made/up": s % 3,
        }
        for s in range(1, 31)
    ]
    first = log(tmp_path / "first", [*lines, {"step": 30, "eval/knn/top1": 0.5}])
    (first / "config.txt").write_text(f"seed = 0\ndata.path = {HOSTILE!r}\n")
    (first / "panels").mkdir()
    for step in range(9):
        Image.fromarray(np.full((4, 4, 3), step, np.uint8)).save(
            first / "panels" / f"{step:08d}.png"
        )
    second = log(tmp_path / "second", [{"step": s, "loss": 7.0 / s} for s in range(1, 11)])
    (second / "config.txt").write_text("seed = 1\n")
    return first, second


def test_a_log_is_read_as_the_run_meant_it(tmp_path: pathlib.Path) -> None:
    """A step that was written again replaces the first line; an incomplete last line is ignored;
    evaluation and metrics of a step are joined."""
    lines = [
        {"step": 2, "loss": 9.0},
        {"step": 1, "loss": 3.0},
        {"step": 2, "loss": 1.0},
        {"step": 2, "eval/knn/top1": 0.5},
        {"step": 3, "x": "y"},
    ]
    run = run_log.load_run_log(log(tmp_path / "a", lines, '{"step": 4, "lo'))
    assert (
        run.curve("loss") == ([1, 2], [3.0, 1.0])
        and run.last("eval/knn/top1") == 0.5
        and run.last("x") is None
    )
    assert [line["step"] for line in run.lines] == [1, 2, 3] and run.names == [
        "loss",
        "eval/knn/top1",
    ]


def test_refusals(tmp_path: pathlib.Path) -> None:
    with pytest.raises(
        UserError, match="has no metrics.jsonl; give the working directory of a run$"
    ):
        run_log.load_run_log(tmp_path)
    with pytest.raises(UserError, match="has no line of a run"):
        run_log.load_run_log(log(tmp_path / "a", [], "nothing\n"))
    this_run = log(tmp_path / "b", [{"step": 1, "loss": 1.0}])
    with pytest.raises(UserError, match="^config.report.beside nowhere: has no metrics.jsonl"):
        report.write_report(schema.Config(report=schema.Report(beside=("nowhere",))), this_run)


def test_runs_of_one_name_get_different_labels(
    two: tuple[pathlib.Path, pathlib.Path], tmp_path: pathlib.Path
) -> None:
    """As in two comparisons with DIR/compare/k-0 in each. The differences of every run are listed,
    not only of the last."""
    places = [tmp_path / "others" / name / "same" for name in ("a", "b")]
    for seed, place in enumerate(places, 5):
        log(place, [{"step": 1, "loss": 1.0}])
        (place / "config.txt").write_text(f"seed = {seed}\n")
    page = report.write_report(
        schema.Config(report=schema.Report(beside=tuple(map(str, places)))), two[0]
    ).read_text()
    assert (
        "a/same" in page
        and "b/same" in page
        and "seed: 0 -&gt; 5" in page
        and "seed: 0 -&gt; 6" in page
    )


def test_only_scores_are_among_what_should_rise(tmp_path: pathlib.Path) -> None:
    values = {"eval/linear/top1": 0.5, "eval/linear/log10_l2": -3.0, "loss": 1.0}
    run = log(tmp_path / "run", [{"step": step, **values} for step in (1, 2)])
    page = report.write_report(schema.Config(), run).read_text()
    rising, others = (page.index(f">{title}</h2>") for title in ("Evaluation", "Other metrics"))
    assert rising < page.index("<h3>linear/top1") < others < page.index("<h3>linear/log10_l2")


def test_curves_show_the_values() -> None:
    """Coordinates agree with the axes: a line from the lowest to the highest value spans the
    ticks."""
    series = svg_charts.svg_chart(
        "t", [svg_charts.SvgCurve("a", [0, 50, 100], [0.0, 5.0, 10.0])], last=100
    )
    points = np.array(
        [
            [float(v) for v in p.split(",")]
            for p in re.findall(r'd="M([^"]*)"', series)[0].split(" ")
        ]
    )
    grid = [float(y) for y in re.findall(r'class="grid"[^>]* y1="([\d.]+)"', series)]
    labels = [float(v) for v in re.findall(r'text-anchor="end">([^<]*)<', series)]
    scale = np.polyfit(labels, grid, 1)
    np.testing.assert_allclose(points[:, 1], np.polyval(scale, [0, 5, 10]), atol=0.1)
    np.testing.assert_allclose(np.diff(points[:, 0]), [(svg_charts.WIDTH - 82) / 2] * 2, atol=0.1)
    few = svg_charts.svg_chart("t", [svg_charts.SvgCurve("a", [0, 3], [0.0, 1.0])], last=3)
    steps = re.findall(r'text-anchor="middle">([^<]*)<', few)
    assert steps == ["0", "1", "2", "3"]  # no half steps
    small = [svg_charts.SvgCurve("a", [0, 1], [-2.5e-4, -2.6e-4])]
    chart = svg_charts.svg_chart("t", small, last=1)
    ends = re.findall(r'<text x="(\d+)"[^>]*text-anchor="end">([^<]*)<', chart)
    assert len(ends) > 2 and all(int(x) >= 8 * len(text) for x, text in ends)
    wide = [svg_charts.SvgCurve("a", [0, 1], [1e-6, 1.0])]
    assert "logarithmic" in svg_charts.svg_chart("t", wide, last=1)
    assert "logarithmic" not in svg_charts.svg_chart("t", wide, last=1, linear=True)
    assert (
        svg_charts.svg_chart("t", [svg_charts.SvgCurve("a", [0, 1], [float("nan")] * 2)], last=1)
        == ""
    )


@pytest.mark.parametrize(
    ("low", "high"), [(12_300, 12_345), (2e6, 2.001e6), (-1.2345e9, -1.2344e9), (0.9995, 0.9999)]
)
def test_the_labels_of_an_axis_differ(low: float, high: float) -> None:
    """Images a second of a pod vary by a thousandth."""
    levels = svg_charts.axis_ticks(low, high)
    labels = [svg_charts.tick_label(level, levels[1] - levels[0]) for level in levels]
    assert len(set(labels)) == len(labels) > 2
    scales = {"k": 1e3, "M": 1e6, "G": 1e9}
    shown = [float(text.rstrip("kMG")) * scales.get(text[-1], 1) for text in labels]
    np.testing.assert_allclose(shown, levels, rtol=1e-9)


def test_the_end_of_a_run_that_is_not_finite_is_shown(tmp_path: pathlib.Path) -> None:
    """Not the last finite loss, as if the run had reached it."""
    lines = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": "nan"}, {"step": 3, "loss": "inf"}]
    run = log(tmp_path / "a", lines)
    other = log(tmp_path / "b", [{"step": 1, "loss": 2.5}, {"step": 2, "loss": "nan"}])
    config = schema.Config(report=schema.Report(beside=(str(other),)))
    page = report.write_report(config, run).read_text()
    assert "<b>inf</b><span>loss</span>" in page
    assert re.search(r"<td>a</td>(<td class=number>[^<]*</td>){2}<td class=number>inf</td>", page)
    assert re.search(r"<td>b</td>(<td class=number>[^<]*</td>){2}<td class=number>nan</td>", page)


def test_a_slow_run_has_a_rate() -> None:
    for rate, shown in ((0.25, "0.25"), (12_345.6, "12,346")):
        run = run_log.RunLog("a", [{"step": 1, "perf/images_per_sec": rate}], "", "", [], {})
        page = run_page.run_page_html([run], differs={})
        assert f"<b>{shown}</b><span>images a second</span>" in page


def test_a_chart_is_in_the_section_that_explains_it() -> None:
    names = ("info/intra", "bits/caption/token", "entropy/x", "perf/images_per_sec", "perf/goodput",
             "perf/seconds/step", "data/cut", "report/dropped/tensorboard")  # fmt: skip
    lines = [{"step": step, **dict.fromkeys(names, 0.5)} for step in (1, 2)]
    page = run_page.run_page_html([run_log.RunLog("a", lines, "", "", [], {})], differs={})
    found = re.findall(r"<h2[^>]*>([^<]*)</h2>|<h3>([^<]*)</h3>", page)
    sections, title = {}, ""
    for heading, chart in found:
        title = heading or title
        if chart:
            sections.setdefault(title, []).append(chart)
    assert sections == {
        "Bits": list(names[:3]),
        "Throughput": list(names[3:5]),
        "Seconds by phase": [names[5]],
        "Skipped": list(names[6:]),
    }


def test_a_damaged_image_of_a_figure_costs_that_figure_alone(
    two: tuple[pathlib.Path, pathlib.Path], caplog: pytest.LogCaptureFixture
) -> None:
    figures.write_figure(two[0] / "pictures", "00000030-good", figure("a good one"))
    figures.write_figure(two[0] / "pictures", "00000030-bad", figure("a bad one"))
    (two[0] / "pictures" / "00000030-bad.png").write_bytes(b"")
    page = report.write_report(schema.Config(), two[0]).read_text()
    assert "a good one" in page and "a bad one" not in page
    assert "00000030-bad.json" in caplog.text and "left out" in caplog.text


def test_the_page_has_everything_once_and_escapes_it(
    two: tuple[pathlib.Path, pathlib.Path],
) -> None:
    first, second = two
    page = report.write_report(
        schema.Config(report=schema.Report(beside=(str(second),))), first
    ).read_text()
    for name in ("knn/top1", "loss", "loss/text", "perf/images_per_sec", "made/up"):
        assert page.count(f"<h3>{name}</h3>") == 1, name
    assert (
        page.count('class="panel"') == run_page.PANELS
        and "step 0</h3>" in page
        and "step 8</h3>" in page
    )
    assert "untrained" not in page  # a run may begin with trained weights
    assert "50.0 %" in page and "25.0 % at step 0" in page and "seed: 0 -&gt; 1" in page
    assert "<script" not in page and 'onerror="' not in page and "&lt;script&gt;" in page
    assert re.findall(r'(?:src|href)="(?!data:image/png;base64,|#s)[^"]*"', page) == []
    links = re.findall(r'<a href="#s(\d+)">(.*?)</a>', page)
    assert len(links) == page.count("<h2") > 3
    for number, title in links:
        assert page.count(f'<h2 id="s{number}">{title}</h2>') == 1


def test_no_terminal_obeys_the_page(two: tuple[pathlib.Path, pathlib.Path]) -> None:
    """Colours, titles, cursor moves and writing directions in names, data, settings, evaluations
    and figures are escaped; lines stay lines."""
    first, _ = two
    bad = "a\x1b[31mb\x1b]0;t\x07c\x9b2Jd\u202ee\x7f"
    with open(first / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": 31, f"odd/{bad}": 1.0}) + "\n")
    (first / "data.txt").write_text(f"folder {bad}\n9 images")
    (first / "config.txt").write_text(f"seed = 0\ndata.path = {bad}\n")
    (first / "eval.json").write_text(
        json.dumps({"checkpoint": bad, "results": {"knn": {f"eval/{bad}": 0.5}}})
    )
    figures.write_figure(first / "pictures", "00000030-kind", figure(bad))
    page = report.write_report(schema.Config(), first).read_text()
    assert (
        page == privacy.escape_control(page)
        and page.count("\\x1b[31m") >= 5
        and "\n9 images" in page
    )
    for file in (first / "pictures").glob("*.json"):
        assert (text := file.read_text()) == privacy.escape_control(text) and json.loads(text)[
            "title"
        ] == bad


def test_the_reference_run_is_the_one_of_the_readme() -> None:
    """The README's figures of the quickstart equal those of the stored log."""
    root = pathlib.Path(__file__).parents[2]
    run = run_log.load_run_log(root / "tests" / "data" / "reference" / "quickstart")
    losses = {
        int(step): loss
        for step, loss in re.findall(
            r"^\| (\d+) \| ([\d.]+) \|", (root / "README.md").read_text(), re.M
        )
    }
    steps, values = run.curve("loss")
    kept = dict(zip(steps, values, strict=True))
    assert len(losses) >= 5 and {step: f"{kept[step]:.3f}" for step in losses} == losses


def figure(title: str, rows: int = 3) -> figures.Figure:
    """A figure as an evaluator draws it: rows of four, nine and one large tile, with captions and
    lines."""
    tile = Image.fromarray(np.full((112, 112, 3), 90, np.uint8))
    lines = [figures.FigureLine("a word, " * 9, 0.4, right=False), figures.FigureLine("short", 1.0)]
    few, many = (
        [figures.FigureTile(tile, "words", "0.93")] * 4,
        [figures.FigureTile(tile, "words that do not fit", right=True)] * 9,
    )
    large = [figures.FigureTile(Image.fromarray(np.full((700, 700, 3), 50, np.uint8)))]
    made = [
        figures.FigureRow(few),
        figures.FigureRow(many),
        figures.FigureRow(few[:1], lines),
        figures.FigureRow(large, [figures.FigureLine("a", chip=(9, 9, 9))]),
    ]
    return figures.Figure(title, "a note", made * rows)


def test_what_evaluators_drew_and_measured_is_on_it(two: tuple[pathlib.Path, pathlib.Path]) -> None:
    figures.write_figure(two[0] / "pictures", "00000010-kind", figure("an older one"))
    figures.write_figure(two[0] / "pictures", "00000030-kind", figure("What was <drawn>"))
    (two[0] / "eval.json").write_text(
        json.dumps({"checkpoint": HOSTILE, "results": {"knn": {"eval/knn/top1": 0.123456}}})
    )
    page = report.write_report(schema.Config(), two[0]).read_text()
    assert (
        page.count(">What was &lt;drawn&gt;</h2>") == 1
        and "an older one" not in page
        and page.count("a note") == 1
    )
    assert "0.1235" in page and "<script" not in page


@pytest.mark.skipif(not CHROMIUM, reason="Chromium is not installed")
@pytest.mark.parametrize("width", [390, pytest.param(1280, marks=pytest.mark.slow)])
def test_a_browser_shows_it_and_complains_of_nothing(
    width: int, two: tuple[pathlib.Path, pathlib.Path], tmp_path: pathlib.Path
) -> None:
    """At the width of a phone and of a desktop: nothing overflows to the right, the console is
    empty, the charts have colours, and the images are where they were drawn, large enough to see. A
    window of Chromium cannot be as narrow as a phone, a frame in it can."""
    figures.write_figure(two[0] / "pictures", "00000030-kind", figure("drawn", rows=1))
    page = report.write_report(schema.Config(report=schema.Report(beside=(str(two[1]),))), two[0])
    frame, shot, height = tmp_path / "frame.html", tmp_path / "shot.png", 8000
    frame.write_text(
        f'<body style="margin:0"><iframe src="{page.as_uri()}"'
        f' style="width:{width}px;height:{height}px;border:0"></iframe>'
    )
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        f"--window-size={max(width, 500)},{height}",
    ]
    done = subprocess.run(
        [CHROMIUM, *flags, "--enable-logging=stderr", f"--screenshot={shot}", frame.as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert "CONSOLE" not in done.stderr, done.stderr
    pixels = np.asarray(Image.open(shot).convert("RGB")).astype(np.int16)[:, :width]
    assert (np.ptp(pixels[:, -6:].reshape(-1, 3), axis=0) == 0).all()  # the margin is bare
    for colour in ((0x46, 0x76, 0xB2), (0xE4, 0x87, 0x3E)):  # a curve of each run
        assert (np.abs(pixels - np.array(colour, np.int16)).sum(-1) < 12).sum() > 50
    tiles, large = ((pixels == gray).all(-1).sum() for gray in (90, 50))
    assert tiles > 14 * 60**2 and large > (0.8 * min(width, 700)) ** 2


@pytest.mark.parametrize(
    ("names", "dense"),
    [
        (("loss", "loss/rpn_cls", "loss/mask"), True),
        (("loss", "loss/ssp", "loss/sp"), False),
        (("loss", "loss/sp", "loss/category"), False),
        (("loss",), False),
    ],
)
def test_losses_of_dense_tasks_have_their_own_note(names: tuple[str, ...], dense: bool) -> None:
    lines = [{"step": step, **dict.fromkeys(names, 1.0)} for step in (1, 2)]
    page = run_page.run_page_html([run_log.RunLog("a", lines, "", "", [], {})], differs={})
    assert ("no object is ever matched" in page) == dense
    assert ("when the target moves" in page.replace("\n", " ")) == (not dense)


def test_images_that_have_the_form_of_a_key_stay_whole(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The text of an image is random: some have the prefix of a key, or end with `pwd=`."""
    monkeypatch.setenv("OTHER_TOKEN", "hunter22hunter22")
    begin = "iVBORw0KGgo" + "A" * 61
    images = [
        base64.b64decode(begin + end, validate=True)
        for end in ("AKIAABCDEFGHIJKLMNOP", "/hunter22hunter22AAA", "AAAAAAAAAAAAAAAApwA=")
    ]
    page = "".join(html_page.embed_image(image, "pwd") + "<b>word</b>" for image in images)
    page = page.replace("pwA=", "pwd=")  # the last bits of the byte are free
    secret = (
        "<p>https://me:word-1@host/x data:image/png;base64,AKIAABCDEFGHIJKLMNOP pwd=abcdefgh </p>"
    )
    run_files.write_text_atomic(tmp_path / "a.html", page + secret + page)
    hidden = "<p>https://***@host/x data:image/png;base64,*** pwd=*** </p>"
    assert (tmp_path / "a.html").read_text() == page + hidden + page
