"""The runner of the toy-scale tables: its arithmetic, its splits of the data, and one run of two
steps on built-in images in tars."""

import dataclasses
import gzip
import io
import json
import pathlib
import re
import subprocess
import tarfile

import jax
import pytest
from PIL import Image

from m3i_jax import config as configuration
from m3i_jax import schema
from m3i_jax.data.sources import base, registry
from m3i_jax.data.sources.shapes import ShapesSource
from m3i_jax.errors import UserError
from tests import xla_flags
from tests.bench.tables import __main__ as tables
from tests.bench.tables import data as table_data
from tests.bench.tables import page as table_page
from tests.bench.tables import paired
from tests.bench.tables import results as table_results
from tests.bench.tables import rows as table_rows
from tests.bench.tables import runs as table_runs
from tests.bench.tables import sets as table_sets

KINDS = ("eval__knn__top1", "eval__linear__top1")
SMALL = {
    "model.encoder.width": "32",
    "model.encoder.depth": "1",
    "model.encoder.heads": "1",
    "model.pool.width": "32",
    "model.pool.heads": "1",
    "model.decoder.width": "32",
    "model.decoder.heads": "1",
    "model.text.width": "32",
    "model.text.heads": "1",
    "evaluate.linear": "false",
    "data.captions": "no",
}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Two styles of the same forty keys."""
    folder, shapes = tmp_path_factory.mktemp("tars"), ShapesSource(80, side=32)
    for number, style in enumerate(("one", "two")):
        with tarfile.open(folder / f"{style}-00000.tar", "w") as tar:
            for key in range(40):
                record, png = shapes[2 * key + number], io.BytesIO()
                Image.fromarray(record.image).save(png, "png")
                about = json.dumps({"label": record.label, "caption": str(record.caption)}).encode()
                for ending, content in (("png", png.getvalue()), ("json", about)):
                    member = tarfile.TarInfo(f"{key:09d}.{ending}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    (folder / "subcategories.json").write_text(
        json.dumps([name.replace(" ", "-") for name in shapes.classes])
    )
    return folder


@pytest.fixture(scope="module")
def sets(
    images: pathlib.Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, table_sets.Set]:
    """Every set, without Fashion-MNIST."""
    return table_sets.image_sets(images, tmp_path_factory.mktemp("sets"), images, images)


def keys(path: pathlib.Path) -> set[str]:
    source = registry.open_kind("tars", str(path), "", schema.Data())
    return {base.source_key(source, i) for i in range(len(source))}


def test_no_table_trains_on_held_out_images(
    sets: dict[str, table_sets.Set], tmp_path: pathlib.Path
) -> None:
    assert {"emoji", "one", "two", "tuning"} <= set(sets)
    source = registry.open_kind("tars", sets["emoji"].path, "", schema.Data())
    kept = {
        base.source_key(part, i)
        for part in [base.split_by_hash(source, table_data.HOLDOUT, "held_out")]
        for i in range(len(part))
    }
    for style in ("one", "two"):
        styles = pathlib.Path(sets["one"].path)
        assert (
            keys(styles / f"{style}-held_out.tar") == kept
            and not keys(styles / f"{style}-train.tar") & kept
        )
    tuned = {key.removeprefix("tune-") for key in keys(pathlib.Path(sets["tuning"].path))}
    assert len(kept) > 3 and len(tuned) == 40 - len(kept) and not tuned & kept
    assert sets["one"].overrides["data.holdout_split"] == "two-held_out.tar" and sets[
        "one"
    ].other == ("--config.data.holdout_split=one-held_out.tar",)


def test_table_has_mean_deviation_and_missing_methods(
    sets: dict[str, table_sets.Set], tmp_path: pathlib.Path
) -> None:
    key, image_set = "eval/knn/top1", sets["emoji"]
    rows = [("M3I", 0, 0.5), ("M3I", 1, 0.4), ("CLIP", 0, 0.3)]
    results = [
        {
            "protocol": "flops",
            "set": "emoji",
            "form": f,
            "seed": s,
            "values": {key: v, "steps": 3.0, "flops": 2e12},
        }
        for f, s, v in rows
    ]
    lines = table_results.markdown_table(image_set, results).splitlines()
    assert lines[0].startswith("| method | seeds | kNN % | steps")
    assert lines[2].startswith("| M3I | 2 | **45.0 ± 7.1** | 3 | 2.00 |") and lines[3].startswith(
        "| CLIP | 1 | 30.0 | 3 |"
    )
    assert lines[-1] == "Not run: M3I without mix, supervised, SiameseIM, MAE, untrained."


def result(protocol: str, image_set: str, form: str, seed: int = 0, **values: float) -> dict:
    named = {key.replace("__", "/"): value for key, value in values.items()}
    return {"protocol": protocol, "set": image_set, "form": form, "seed": seed, "values": named}


def test_the_page_has_every_figure_and_escapes_names(sets: dict[str, table_sets.Set]) -> None:
    results = [
        result("epochs", "emoji", "M3I", seed, eval__knn__top1=value, steps=3.0)
        for seed, value in enumerate((0.2, 0.4, 0.3))
    ]
    results.append(result("flops", "emoji", "<b>", eval__knn__top1=0.5, steps=3.0))
    page = table_page.tables_page(sets, results, table_results.TITLES)
    assert page.count("class=seed") == 3 and "30.0 ± 10.0" in page and "50.0" in page
    assert "emoji, equal images" in page and "emoji, equal FLOPs" in page
    assert "&lt;b&gt;" in page and "<td><b>" not in page
    # the mean of .3 on a scale that ends at the mean plus one deviation, .4
    assert '<div class=bar style="width:75.00%">' in page


def test_a_seed_of_every_row_comes_before_the_next_seed(
    sets: dict[str, table_sets.Set], tmp_path: pathlib.Path
) -> None:
    queue = table_runs.run_queue(sets, ["emoji", "tuning"], "flops", 3, [])
    trained = [row for row in table_rows.SINGLE_STAGE if row != table_rows.UNTRAINED]
    assert [(r.row.title, r.seed) for r in queue] == [
        *((row, 0) for row in table_rows.SINGLE_STAGE),
        *((row, seed) for seed in (1, 2) for row in trained),
        *((row, 0) for row in table_rows.TRIED),
    ]


def test_the_best_trial_of_a_method_gives_its_settings(
    sets: dict[str, table_sets.Set], tmp_path: pathlib.Path
) -> None:
    """The mean of kNN and linear accuracy decides; a method without all of its trials waits."""
    searched = table_runs.run_queue(sets, ["search", "emoji-8x8"], "epochs", 3, [])
    assert {run.image_set.name for run in searched} == {"search"}
    assert len(searched) == len(table_rows.RATES) * (len(table_rows.METHODS) - 1)
    scores = dict.fromkeys(table_rows.RATES, (0.2, 0.2))
    scores |= {"rate 1e-3": (0.9, 0.1), "rate 2e-3": (0.5, 0.6)}
    del scores["rate 2e-3, decay 0.2"]
    results = [
        result("epochs", "search", f"sim, {name}", eval__knn__top1=knn, eval__linear__top1=linear)
        for name, (knn, linear) in scores.items()
    ]
    assert not [run for run in table_runs.run_queue(sets, ["emoji-8x8"], "epochs", 3, results)]
    last = result("epochs", "search", "sim, rate 2e-3, decay 0.2", **{k: 0.0 for k in KINDS})
    queue = table_runs.run_queue(sets, ["emoji-8x8"], "epochs", 3, [*results, last])
    assert [(run.row.title, run.seed) for run in queue] == [("sim", 0), ("sim", 1), ("sim", 2)]
    assert queue[0].chosen == {"optim.lr": "2e-3"}
    (command, *_) = table_runs.commands(queue[0], tmp_path, [5], 1)
    assert "--config.optim.lr=2e-3" in command


def test_a_chain_continues_and_is_taught_by_its_stages(
    sets: dict[str, table_sets.Set], tmp_path: pathlib.Path
) -> None:
    run = table_runs.Run(sets["emoji-8x8"], table_rows.CHAIN, 0)
    steps = table_runs.steps_of(run, tmp_path)
    assert steps == [table_sets.STEPS // 3] * 3
    clip, mim, supervised, *_ = table_runs.commands(run, tmp_path, steps, 1)
    first, second = (run.path(tmp_path) / f"stage-{number}" for number in (1, 2))
    assert str(first) in clip and not [text for text in clip if "init_from" in text]
    assert f"--config.objective.target_checkpoint={first}" in mim and str(second) in mim
    assert not [text for text in mim if "init_from" in text]
    assert f"--config.init_from={second}" in supervised and str(run.path(tmp_path)) in supervised


def test_a_run_of_two_sets_is_trained_once(
    sets: dict[str, table_sets.Set],
    images: pathlib.Path,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """M3I is a row of `encoders` and of `recent`, and its run at equal FLOPs is that at equal
    images; with another seed, or on another encoder, it is another run."""
    monkeypatch.setattr(table_runs, "flops_a_step", lambda *_: 1.0)
    private = {str(tmp_path): "OUT"}
    first = table_runs.Run(sets["recent"], table_rows.RECENT["M3I"], 0)
    made = table_runs.commands(first, tmp_path, [table_sets.STEPS_OF_A_ROW], 1)
    public = [table_runs.public_command(c, private) for c in made]
    known = result("epochs", "recent", "M3I", 0, eval__knn__top1=0.4) | {"commands": public}

    started: list[int] = []
    failed = subprocess.CompletedProcess([], returncode=2)
    monkeypatch.setattr(table_runs.subprocess, "run", lambda *_, **__: started.append(1) or failed)
    encoders, m3i = sets["encoders"], table_rows.ENCODERS["M3I"]
    for run in (table_runs.Run(encoders, m3i, 0), dataclasses.replace(first, protocol="flops")):
        same = table_runs.run_once(run, tmp_path, 1, private, [known])
        assert same == known | {"protocol": run.protocol, "set": run.image_set.name}
    assert not started
    other = table_rows.ENCODERS["M3I, registers"]
    for run in (table_runs.Run(encoders, m3i, 1), table_runs.Run(encoders, other, 0)):
        assert table_runs.run_once(run, tmp_path, 1, private, [known]) is None
    assert len(started) == 2


def test_equal_time_is_what_equal_images_took(
    sets: dict[str, table_sets.Set], tmp_path: pathlib.Path
) -> None:
    run = table_runs.Run(sets["emoji"], table_rows.METHODS["CLIP"], 0, "time")
    with pytest.raises(UserError, match="run that first"):
        table_runs.steps_of(run, tmp_path, [])
    results = [
        result("epochs", "emoji", form, seed, seconds=seconds, steps=100.0)
        for form, seed, seconds in (("M3I", 0, 50.0), ("M3I", 1, 70.0), ("CLIP", 0, 20.0))
    ]
    assert table_runs.steps_of(run, tmp_path, results) == [3 * sets["emoji"].steps]


def test_a_share_of_the_training_images_has_annotations(tmp_path: pathlib.Path) -> None:
    """The drawn shares are within four standard errors, labels and captions are drawn apart, and
    held-out images keep both."""
    source = tmp_path / "clip"
    source.mkdir()
    with tarfile.open(source / "a.tar", "w") as tar:
        for key in range(600):
            about = json.dumps({"label": 1, "category": "x"}).encode()
            for ending, content in (("png", b"image"), ("json", about), ("txt", b"a caption")):
                member = tarfile.TarInfo(f"{key}.{ending}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    out = tmp_path / "out"
    (pattern,) = table_data.annotation_shares([source], out, 0.3, 0.6)
    assert pattern == f"{out / 'shares' / 'clip-labels30-captions60'}/*.tar"
    (written,) = pathlib.Path(pattern).parent.glob("*.tar")
    (single,) = table_data.annotation_shares([source], out, 0.3, 0.6, one_tar=True)
    assert pathlib.Path(single).read_bytes() == written.read_bytes()
    labels, captions, keys_ = set(), set(), set()
    with tarfile.open(written) as tar:
        for member in tar:
            key, ending = member.name.split(".")
            if ending == "png":
                keys_.add(key)
            elif ending == "txt":
                captions.add(key)
            elif "label" in json.loads(tar.extractfile(member).read()):
                labels.add(key)
    kept = {key for key in keys_ if table_data.held_out(key)}
    assert len(keys_) == 600 and kept <= labels and kept <= captions
    trained = len(keys_ - kept)
    for found, share in ((labels, 0.3), (captions, 0.6), (labels & captions, 0.18)):
        error = (share * (1 - share) / trained) ** 0.5
        assert abs(len(found - kept) / trained - share) < 4 * error


def test_fashion_mnist_is_written_as_a_folder(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(table_data, "FASHION_IMAGES", 3)
    assert not table_data.fashion(tmp_path, tmp_path / "fashion")
    pixels = bytes(range(256)) * 10
    with gzip.open(tmp_path / "train-images-idx3-ubyte.gz", "w") as file:
        file.write(bytes(16) + pixels[: 3 * 784])
    with gzip.open(tmp_path / "train-labels-idx1-ubyte.gz", "w") as file:
        file.write(bytes(8) + bytes([4, 0, 4]))
    assert table_data.fashion(tmp_path, tmp_path / "fashion")
    written = sorted(path.relative_to(tmp_path / "fashion") for path in tmp_path.rglob("*.png"))
    assert [str(path) for path in written] == ["0/00001.png", "4/00000.png", "4/00002.png"]
    with Image.open(tmp_path / "fashion" / "0" / "00001.png") as image:
        assert image.size == (28, 28) and image.convert("L").tobytes() == pixels[784:1568]


@pytest.mark.slow
def test_short_run_is_reported_and_not_repeated(
    images: pathlib.Path,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # This process creates its eight devices now; the processes that it starts have one.
    jax.devices()
    monkeypatch.setenv("XLA_FLAGS", xla_flags.FASTEST)
    arguments = [
        "--data",
        str(images),
        "--out",
        str(tmp_path),
        "--protocol",
        "flops",
        "--sets",
        "one",
        "--methods",
        "supervised",
        "--steps",
        "2",
        "--seeds",
        "1",
    ]
    arguments += [f"--override={key}={value}" for key, value in SMALL.items()]
    assert tables.main(arguments) == 0
    output = capsys.readouterr().out
    assert (
        "kNN, other style %" in output
        and "kNN, own style %" in output
        and "Not run: M3I (steps=2, " in output
    )
    (result,) = json.loads((tmp_path / "results.json").read_text())
    assert (
        result["values"]["steps"] > 2
        and result["values"]["flops"] > 0
        and 0 <= result["values"]["own/eval/knn/top1"] <= 1
    )
    hits = paired.unpack_hits(result["hits"])
    assert hits.mean() == pytest.approx(result["values"]["eval/knn/top1"], abs=2 / len(hits))
    assert str(tmp_path) not in json.dumps(result["commands"]) and str(
        table_sets.ROOT
    ) not in json.dumps(result["commands"])
    monkeypatch.setattr(
        table_runs.subprocess, "run", lambda *_, **__: pytest.fail("the run was repeated")
    )
    assert tables.main(arguments) == 0


def test_altered_runs_are_rows_of_their_own(
    sets: dict[str, table_sets.Set], tmp_path: pathlib.Path
) -> None:
    """A result of a trial replaces none, and its settings come after those of the search."""
    one = sets["emoji-8x8"]
    rows = table_rows.altered_rows(one.rows, {"optim.lr": "1.0"}, "optim.lr=1.0")
    altered = dataclasses.replace(one, rows=rows)
    run = table_runs.Run(altered, rows["sim (optim.lr=1.0)"], 0, chosen={"optim.lr": "2.0"})
    assert run.path(tmp_path).name == "sim__optim.lr_1.0_-0" and run.row.unaltered == "sim"
    (command, *_) = table_runs.commands(run, tmp_path, [5], 1)
    assert [text for text in command if text.startswith("--config.optim.lr=")] == [
        "--config.optim.lr=1.0"
    ]
    initial = rows["untrained (optim.lr=1.0)"]
    assert initial.settings["optim.lr"] == "1e-12" and initial.searched == "M3I"
    long = table_runs.run_directory("epochs", "x", "M3I (" + ", ".join(["a.b=1"] * 60) + ")", 0)
    assert len(long.rpartition("/")[2]) < 250
    queue = table_runs.run_queue({"search": sets["search"], "x": altered}, ["x"], "epochs", 3, [])
    assert not queue  # its trials are missing, as without the change


def test_equal_flops_and_a_failed_run_is_skipped(
    sets: dict[str, table_sets.Set], tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image_set = sets["emoji"]
    costs = {"m3i": 8.0, "mae": 3.0}
    monkeypatch.setattr(table_runs, "flops_a_step", lambda run, stage, out: costs[stage.form])
    run = table_runs.Run(image_set, table_rows.METHODS["MAE"], 5, "flops")
    (steps,) = table_runs.steps_of(run, tmp_path)
    assert abs(steps * 3.0 / (image_set.steps * 8.0) - 1) < 0.01
    first, second, third = table_runs.commands(run, tmp_path, [steps], 7)
    assert f"steps={steps}" in first[3] and "--config.seed=5" in first
    assert "--config.train.steps=7" in second and "--mode=features" in third
    monkeypatch.setattr(table_runs, "commands", lambda *_: [["-c", "raise SystemExit(3)"]])
    assert table_runs.run_once(run, tmp_path, 1, {}) is None


def test_every_run_of_every_table_has_a_valid_configuration(
    sets: dict[str, table_sets.Set], tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(table_runs, "chosen_settings", lambda *_: {})
    queue = table_runs.run_queue(sets, list(sets), "epochs", 1, [])
    assert {"emoji-8x8", "clipart-8x8", "mixed-8x8-labels30-captions100"} <= set(sets)
    assert len({run.path(tmp_path) for run in queue}) == len(queue) > 100
    for run in queue:
        for stage in run.row.stages:
            config = configuration.load_config(table_runs.config_spec(run.image_set, stage, 40))
            settings = table_sets.overrides(run.image_set, run.row, run.seed, run.chosen)
            configuration.apply_overrides(config, settings)
            assert configuration.resolve(config).train.steps == 40


def test_a_directory_without_tars_is_refused(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tables.main(["--data", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "holds no STYLE-NUMBER.tar" in capsys.readouterr().err


def test_the_search_takes_no_further_settings(
    images: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--data", str(images), "--out", str(tmp_path), "--sets", "search"]
    assert tables.main([*flags, "--override", "optim.lr=1"]) == 2
    assert "--sets search: optim.lr=1 would change trials" in capsys.readouterr().err


def test_results_of_sets_that_cannot_be_made_here_are_kept(tmp_path: pathlib.Path) -> None:
    """Without scikit-learn there are no digits; their results stay in the file nevertheless."""
    results = [
        {"protocol": "flops", "set": "digits", "form": form, "seed": seed, "values": {}}
        for form in ("M3I", "MAE")
        for seed in (0, 1)
    ]
    file = tmp_path / "results.json"
    file.write_text(json.dumps([*results, results[0] | {"values": {"loss": 1.0}}]))
    found = table_results.read_results(file, tmp_path, {})
    assert [(r["form"], r["seed"]) for r in found] == [(r["form"], r["seed"]) for r in results]
    assert found[0]["values"] == {"loss": 1.0}


def test_the_kept_tables_are_those_of_the_kept_results() -> None:
    """Figures in a document come from runs whose command is recorded with them."""
    kept = table_sets.ROOT / "tests" / "data" / "tables"
    results = json.loads((kept / "results.json").read_text())
    output = (kept / "tables.md").read_text()
    tables_ = {(r["protocol"], r["set"]) for r in results}
    for protocol, name in tables_:
        rows = [r for r in results if (r["protocol"], r["set"]) == (protocol, name)]
        other = any("own/eval/knn/top1" in r["values"] for r in rows)
        columns = table_sets.COLUMNS
        if other:
            transfer = name.endswith("8x8")
            more = columns + table_sets.TRANSFER_COLUMNS
            columns = more if transfer else table_sets.STYLE_COLUMNS
        if name.startswith("mixed"):
            columns = table_sets.MIXED_COLUMNS
        if name in ("recent", "encoders"):
            columns = table_sets.RECENT_COLUMNS
        shown = table_sets.Set(name, "", "", {}, columns, {})
        title = f"### {name}, {table_results.TITLES[protocol]}"
        assert f"{title}\n\n{table_results.markdown_table(shown, rows)}" in output
    assert all(r["commands"] and r["machine"] and r["seed"] >= 0 for r in results)
    absolute = re.compile(r"(?<![\w.*])/\w")  # an absolute path
    assert not [
        found
        for r in results
        for text in (*r["commands"], r["machine"])
        if (found := absolute.search(text))
    ]
    assert absolute.search("python --workdir /somewhere/run")
    assert absolute.search("path=/somewhere")
