"""The runner of the toy-scale tables: its arithmetic, its parts of the data, and one run of a few
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
from tests.bench import table_data, tables

SMALL = {
    "model.encoder.width": "32", "model.encoder.depth": "1", "model.encoder.heads": "1", "model.pool.width": "32", "model.pool.heads": "1",
    "model.decoder.width": "32", "model.decoder.heads": "1", "model.text.width": "32", "model.text.heads": "1",
    "evaluate.linear": "false", "data.captions": "no",
}  # fmt: skip


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
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


def test_no_table_trains_on_what_it_or_another_holds_out(
    pictures: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    found = tables.sets(pictures, tmp_path)
    assert {"emoji", "one", "two", "tuning"} <= set(found)
    whole = registry.open_kind("tars", found["emoji"].path, "", schema.Data())
    kept = {
        base.source_key(part, i)
        for part in [base.split_by_hash(whole, table_data.HOLDOUT, "held_out")]
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
        found["one"].overrides["data.holdout_split"] == "two-held_out.tar"
        and found["one"].own == "one-held_out.tar"
    )


def test_the_table_has_mean_spread_and_what_is_missing(
    pictures: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    key, made = "eval/knn/top1", tables.sets(pictures, tmp_path)["emoji"]
    rows = [("M3I", 0, 0.5), ("M3I", 1, 0.4), ("CLIP", 0, 0.3)]
    results = [
        {"set": "emoji", "form": f, "seed": s, "values": {key: v, "steps": 3.0, "flops": 2e12}}
        for f, s, v in rows
    ]
    lines = tables.table(made, results).splitlines()
    assert lines[0].startswith("| method | seeds | kNN % | steps")
    assert lines[2].startswith("| M3I | 2 | **45.0 ± 7.1** | 3 | 2.00 |") and lines[3].startswith(
        "| CLIP | 1 | 30.0 | 3 |"
    )
    assert lines[-1] == "Not run: M3I without mix, supervised, SiameseIM, MAE."


def test_more_seeds_are_for_the_best_once_it_is_known(
    pictures: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    found = tables.sets(pictures, tmp_path)
    first = tables.queue(found, ["emoji"], 3, [])
    assert [r.method for r in first] == [*tables.METHODS, tables.UNTRAINED] and {
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
    later = [r for r in tables.queue(found, ["emoji"], 3, results) if r.seed]
    assert [(r.method, r.seed) for r in later] == [
        (m, seed) for seed in (1, 2) for m in ("M3I", "SiameseIM", "M3I without mix")
    ]


def test_a_run_of_two_steps_is_told_and_not_run_again(
    pictures: pathlib.Path,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # this process has its eight by now, if no test has asked for them yet; what it starts has one
    jax.devices()
    monkeypatch.setenv(
        "XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    )
    asked = [
        "--data",
        str(pictures),
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
    asked += [f"--override={key}={value}" for key, value in SMALL.items()]
    assert tables.main(asked) == 0
    told = capsys.readouterr().out
    assert (
        "kNN, other style %" in told
        and "kNN, own style %" in told
        and "Not run: M3I, CLIP." in told
    )
    (result,) = json.loads((tmp_path / "results.json").read_text())
    assert (
        result["values"]["steps"] > 2
        and result["values"]["flops"] > 0
        and 0 <= result["values"]["own/eval/knn/top1"] <= 1
    )
    assert str(tmp_path) not in json.dumps(result["commands"]) and str(
        tables.ROOT
    ) not in json.dumps(result["commands"])
    monkeypatch.setattr(tables.subprocess, "run", lambda *_, **__: pytest.fail("it was run again"))
    assert tables.main(asked) == 0


def test_equal_flops_and_a_failure_that_stops_nothing(
    pictures: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one_set = tables.sets(pictures, tmp_path)["emoji"]
    monkeypatch.setattr(
        tables, "flops_a_step", lambda run, out: {"M3I": 8.0, "MAE": 3.0}[run.method]
    )
    steps, cost = tables.steps_of(tables.Run(one_set, "MAE", 0), tmp_path)
    assert abs(steps * cost / (one_set.steps * 8.0) - 1) < 0.01
    command = tables.commands(tables.Run(one_set, "MAE", 5), tmp_path, steps, 7)
    assert (
        f"steps={steps}" in command[0][3]
        and "--config.seed=5" in command[0]
        and "--config.train.steps=7" in command[1]
    )
    monkeypatch.setattr(tables, "commands", lambda *_: [["-c", "raise SystemExit(3)"]])
    assert tables.one(tables.Run(one_set, "MAE", 0), pictures, tmp_path, 1) is None


def test_every_run_of_every_table_is_a_configuration(
    pictures: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    found = tables.sets(pictures, tmp_path)
    wanted = tables.queue(found, list(found), 1, [])
    assert len(wanted) > len(tables.TRIED) and len({run.place(tmp_path) for run in wanted}) == len(
        wanted
    )
    for run in wanted:
        config = configuration.load_config(tables.trained(run, 40))
        configuration.apply_overrides(config, tables.overrides(run))
        assert configuration.resolve(config).train.steps == 40


def test_a_directory_without_tars_is_refused(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tables.main(["--data", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "holds no STYLE-NUMBER.tar" in capsys.readouterr().err


def test_the_kept_tables_are_those_of_the_kept_results() -> None:
    """Figures that stand in a document come from runs whose command stands beside them."""
    kept = tables.ROOT / "tests" / "data" / "tables"
    results = json.loads((kept / "results.json").read_text())
    told = (kept / "tables.md").read_text()
    for name in dict.fromkeys(r["set"] for r in results):
        styled = any("own/eval/knn/top1" in r["values"] for r in results if r["set"] == name)
        columns = tables.OF_STYLES if styled else tables.COLUMNS
        assert (
            f"### {name}\n\n" + tables.table(tables.Set(name, "", "", {}, columns, ()), results)
            in told
        )
    assert all(r["commands"] and r["machine"] and r["seed"] >= 0 for r in results)
    absolute = re.compile(r"(?<![\w.*])/\w")  # the place of a file on somebody's machine
    assert not [
        found
        for r in results
        for text in (*r["commands"], r["machine"])
        if (found := absolute.search(text))
    ]
    assert absolute.search("python --workdir /somewhere/run")
    assert absolute.search("path=/somewhere")
