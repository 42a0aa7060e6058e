"""The runner of the toy-scale tables: its arithmetic, its splits of the data, and one run of two
steps on built-in images in tars."""

import io
import json
import pathlib
import re
import tarfile

import jax
import pytest
from PIL import Image

from m3i_jax import config as configuration
from m3i_jax import schema
from m3i_jax.data.sources import base, registry
from m3i_jax.data.sources.shapes import ShapesSource
from tests import xla_flags
from tests.bench.tables import __main__ as tables
from tests.bench.tables import data as table_data
from tests.bench.tables import results as table_results
from tests.bench.tables import sets as table_sets

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


def keys(path: pathlib.Path) -> set[str]:
    source = registry.open_kind("tars", str(path), "", schema.Data())
    return {base.source_key(source, i) for i in range(len(source))}


def test_no_table_trains_on_held_out_images(images: pathlib.Path, tmp_path: pathlib.Path) -> None:
    sets = table_sets.image_sets(images, tmp_path)
    assert {"emoji", "one", "two", "tuning"} <= set(sets)
    source = registry.open_kind("tars", sets["emoji"].path, "", schema.Data())
    kept = {
        base.source_key(part, i)
        for part in [base.split_by_hash(source, table_data.HOLDOUT, "held_out")]
        for i in range(len(part))
    }
    for style in ("one", "two"):
        styles = tmp_path / "data" / "styles"
        assert (
            keys(styles / f"{style}-held_out.tar") == kept
            and not keys(styles / f"{style}-train.tar") & kept
        )
    tuned = {key.removeprefix("tune-") for key in keys(tmp_path / "data" / "tuning" / "*.tar")}
    assert len(kept) > 3 and len(tuned) == 40 - len(kept) and not tuned & kept
    assert (
        sets["one"].overrides["data.holdout_split"] == "two-held_out.tar"
        and sets["one"].own == "one-held_out.tar"
    )


def test_table_has_mean_deviation_and_missing_methods(
    images: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    key, image_set = "eval/knn/top1", table_sets.image_sets(images, tmp_path)["emoji"]
    rows = [("M3I", 0, 0.5), ("M3I", 1, 0.4), ("CLIP", 0, 0.3)]
    results = [
        {"set": "emoji", "form": f, "seed": s, "values": {key: v, "steps": 3.0, "flops": 2e12}}
        for f, s, v in rows
    ]
    lines = table_results.markdown_table(image_set, results).splitlines()
    assert lines[0].startswith("| method | seeds | kNN % | steps")
    assert lines[2].startswith("| M3I | 2 | **45.0 ± 7.1** | 3 | 2.00 |") and lines[3].startswith(
        "| CLIP | 1 | 30.0 | 3 |"
    )
    assert lines[-1] == "Not run: M3I without mix, supervised, SiameseIM, MAE."


def test_best_single_method_gets_more_seeds(images: pathlib.Path, tmp_path: pathlib.Path) -> None:
    sets = table_sets.image_sets(images, tmp_path)
    first = tables.run_queue(sets, ["emoji"], 3, [])
    assert [r.method for r in first] == [*table_sets.METHODS, table_sets.UNTRAINED] and {
        r.seed for r in first
    } == {0}
    worth = {
        "M3I": 0.9,
        "M3I without mix": 0.1,
        "supervised": 0.2,
        "CLIP": 0.3,
        "SiameseIM": 0.4,
        "MAE": 0.1,
    }
    results = [
        {"set": "emoji", "form": m, "seed": 0, "values": {"eval/knn/top1": v}}
        for m, v in worth.items()
    ]
    later = [r for r in tables.run_queue(sets, ["emoji"], 3, results) if r.seed]
    assert [(r.method, r.seed) for r in later] == [
        (m, seed) for seed in (1, 2) for m in ("M3I", "SiameseIM", "M3I without mix")
    ]


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
        and "Not run: M3I, CLIP." in output
    )
    (result,) = json.loads((tmp_path / "results.json").read_text())
    assert (
        result["values"]["steps"] > 2
        and result["values"]["flops"] > 0
        and 0 <= result["values"]["own/eval/knn/top1"] <= 1
    )
    assert str(tmp_path) not in json.dumps(result["commands"]) and str(
        table_sets.ROOT
    ) not in json.dumps(result["commands"])
    monkeypatch.setattr(
        tables.subprocess, "run", lambda *_, **__: pytest.fail("the run was repeated")
    )
    assert tables.main(arguments) == 0


def test_equal_flops_and_a_failed_run_is_skipped(
    images: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image_set = table_sets.image_sets(images, tmp_path)["emoji"]
    monkeypatch.setattr(
        tables, "flops_a_step", lambda run, out: {"M3I": 8.0, "MAE": 3.0}[run.method]
    )
    steps, cost = tables.steps_of(table_sets.Run(image_set, "MAE", 0), tmp_path)
    assert abs(steps * cost / (image_set.steps * 8.0) - 1) < 0.01
    command = tables.commands(table_sets.Run(image_set, "MAE", 5), tmp_path, steps, 7)
    assert (
        f"steps={steps}" in command[0][3]
        and "--config.seed=5" in command[0]
        and "--config.train.steps=7" in command[1]
    )
    monkeypatch.setattr(tables, "commands", lambda *_: [["-c", "raise SystemExit(3)"]])
    assert tables.run_once(table_sets.Run(image_set, "MAE", 0), images, tmp_path, 1) is None


def test_every_run_of_every_table_has_a_valid_configuration(
    images: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    sets = table_sets.image_sets(images, tmp_path)
    queue = tables.run_queue(sets, list(sets), 1, [])
    assert len(queue) > len(table_sets.TRIED) and len({run.path(tmp_path) for run in queue}) == len(
        queue
    )
    for run in queue:
        config = configuration.load_config(table_sets.config_spec(run, 40))
        configuration.apply_overrides(config, table_sets.overrides(run))
        assert configuration.resolve(config).train.steps == 40


def test_a_directory_without_tars_is_refused(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tables.main(["--data", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "holds no STYLE-NUMBER.tar" in capsys.readouterr().err


def test_the_kept_tables_are_those_of_the_kept_results() -> None:
    """Figures in a document come from runs whose command is recorded with them."""
    kept = table_sets.ROOT / "tests" / "data" / "tables"
    results = json.loads((kept / "results.json").read_text())
    output = (kept / "tables.md").read_text()
    for name in dict.fromkeys(r["set"] for r in results):
        styled = any("own/eval/knn/top1" in r["values"] for r in results if r["set"] == name)
        columns = table_sets.STYLE_COLUMNS if styled else table_sets.COLUMNS
        assert (
            f"### {name}\n\n"
            + table_results.markdown_table(table_sets.Set(name, "", "", {}, columns, ()), results)
            in output
        )
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
