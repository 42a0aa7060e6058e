"""--mode=compare: which runs are trained, which are not repeated, and the content of the table. All
but two runs are replaced by a fake."""

import json
import pathlib
import types

import pytest

from m3i_jax import main as command
from m3i_jax import run_files
from m3i_jax.errors import UserError
from m3i_jax.modes import compare
from m3i_jax.modes import setup as jobs
from m3i_jax.training import loop
from tests import toy

LINES = [
    {"step": 0, "eval/knn/top1": 0.1},
    {"step": 1, "loss": 5.0, "perf/step_seconds": 90.0, "collapse/spread": 0.9},
    {"step": 10, "loss": 4.0, "perf/step_seconds": 2.0, "collapse/spread": 0.8},
    {
        "step": 20,
        "loss": 3.0,
        "perf/step_seconds": 1.0,
        "collapse/spread": 0.7,
        "collapse/alarm": 0.0,
    },
    {"step": 20, "eval/knn/top1": 0.4, "eval/linear/top1": 0.6},
]


def settings(**changes: object):
    small = {"data__size": 40, "data__classes": -1, "data__holdout": 0.3, "train__batch_size": 16}
    return toy.settings(**small | {"compare__forms": "mim,mae+clip", "compare__seeds": 2} | changes)


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[jobs.Setup]:
    """The runs that were trained; each writes a log whose last loss is 3 + seed."""
    made: list[jobs.Setup] = []

    def pretrain(job: jobs.Setup, allow_changes: bool, **_: object) -> int:
        made.append(job)
        compare.train.write_settings(job)
        lines = [
            line | ({"loss": line["loss"] + job.config.seed} if "loss" in line else {})
            for line in LINES
        ]
        (job.workdir / "metrics.jsonl").write_text(
            "".join(json.dumps(line) + "\n" for line in lines)
        )
        return loop.DONE

    monkeypatch.setattr(compare.train, "pretrain", pretrain)
    monkeypatch.setattr(compare, "flops_a_step", lambda job: 7e9 * len(job.config.objective.forms))
    return made


def names(ran: list[jobs.Setup]) -> list[str]:
    return [job.workdir.name for job in ran]


def test_every_form_and_seed_is_a_run_with_common_settings(ran, tmp_path, capsys) -> None:
    assert compare.run(settings(seed=5), workdir=str(tmp_path), allow_changes=False) == 0
    assert names(ran) == ["mim-5", "mim-6", "mae+clip-5", "mae+clip-6"]
    assert [job.config.objective.forms for job in ran] == [("mim",)] * 2 + [("mae", "clip")] * 2
    assert [job.config.seed for job in ran] == [5, 6, 5, 6]
    assert all(job.config.evaluate.linear for job in ran)
    assert (
        len({(job.config.model, job.config.optim, job.config.data) for job in ran}) == 1
        and ran[0].config.data.mask_ratio == 0.5
    )
    assert all(
        (job.workdir / name).is_file()
        for job in ran
        for name in ("config.txt", "result.json", "tokenizer.json")
    )
    out = capsys.readouterr().out
    for name in ("compare.md", "compare.json", "compare.png"):
        assert (tmp_path / name).stat().st_size > 100 and str(tmp_path / name) in out
    assert "Equal images: 20 steps, 320 images, for every objective." in out
    assert (
        "mae, clip" in out.replace("clip, mae", "mae, clip")
        and "the published objective alone" in out
    )


def test_the_table_has_mean_and_deviation_of_the_last_values(ran, tmp_path) -> None:
    compare.run(settings(), workdir=str(tmp_path), allow_changes=False)
    rows = json.loads((tmp_path / "compare.json").read_text())["rows"]
    assert [row["form"] for row in rows] == ["mim", "mae+clip"] and rows[0]["seeds"] == [0, 1]
    found = {name: figure["mean"] for name, figure in rows[0]["figures"].items()}
    assert found["loss"] == 3.5 and rows[0]["figures"]["loss"]["each"] == [3.0, 4.0]
    assert (found["eval/knn/top1"], found["eval/linear/top1"], found["collapse/spread"]) == (
        0.4,
        0.6,
        0.7,
    )
    # neither the first step, which compiles, nor evaluations
    assert found["seconds"] == 9 * 2.0 + 10 * 1.0
    assert found["flops"] == 7e9 and rows[1]["figures"]["flops"]["each"] == [14e9, 14e9]
    assert (
        "| mim | **40.0 ± 0.0** | **60.0 ± 0.0** | 3.5000 ± 0.7071 |"
        in (tmp_path / "compare.md").read_text()
    )


@pytest.mark.parametrize("budget", ["flops", "time"])
def test_all_rows_have_one_budget(ran, tmp_path, monkeypatch, capsys, budget) -> None:
    """mae+clip costs twice as much a step as mim and so has half of the steps, also of warm-up."""
    timed = []

    def time_step(job: jobs.Setup) -> float:
        timed.append(job.config.objective.forms)
        return 0.25 * len(job.config.objective.forms)

    monkeypatch.setattr(compare, "time_step", time_step)
    changes = {"compare__budget": budget, "train__steps": 20, "optim__warmup_steps": 6}
    assert compare.run(settings(**changes), workdir=str(tmp_path), allow_changes=False) == 0
    assert [job.config.train.steps for job in ran] == [20, 20, 10, 10]
    assert [job.config.optim.warmup_steps for job in ran] == [6, 6, 3, 3]
    said = {
        "flops": "Equal FLOPs: 0.14 TFLOP a run, those of 20 steps of mim. Steps: mim 20, mae+clip"
        " 10.",
        "time": "Equal time: 5 seconds of steps a run, as measured on these devices, those of 20",
    }[budget]
    assert said in (tmp_path / "compare.md").read_text() and said in capsys.readouterr().out
    content = json.loads((tmp_path / "compare.json").read_text())
    assert content["settings"]["budget"] == budget
    assert content["settings"]["steps"] == {"mim": 20, "mae+clip": 10}
    again = settings(**changes)
    assert compare.run(again, workdir=str(tmp_path), allow_changes=False) == 0
    assert len(ran) == 4 and len(timed) == (2 if budget == "time" else 0)  # measured once


def test_a_metric_with_the_name_of_a_secret_is_a_number(ran, tmp_path, monkeypatch) -> None:
    """`token: 9.2192` in a text is a secret; in JSON it would cost the whole file."""
    monkeypatch.setitem(LINES[3], "bits/caption/token", 9.219244)
    chosen = settings(compare__forms="mim", compare__seeds=1)
    compare.run(chosen, workdir=str(tmp_path), allow_changes=False)
    result = json.loads((tmp_path / "compare" / "mim-0" / "result.json").read_text())
    assert result["values"]["bits/caption/token"] == 9.219244
    (row,) = json.loads((tmp_path / "compare.json").read_text())["rows"]
    assert row["figures"]["bits/caption/token"]["mean"] == 9.219244
    compare.run(chosen, workdir=str(tmp_path), allow_changes=False)
    assert names(ran) == ["mim-0"]


def test_finished_runs_are_not_repeated(ran, tmp_path) -> None:
    compare.run(settings(compare__forms="mim"), workdir=str(tmp_path), allow_changes=False)
    (tmp_path / "compare" / "mim-1" / "result.json").unlink()
    compare.run(settings(compare__forms="sim,mim"), workdir=str(tmp_path), allow_changes=False)
    assert names(ran) == ["mim-0", "mim-1", "sim-0", "sim-1", "mim-1"]
    rows = json.loads((tmp_path / "compare.json").read_text())["rows"]
    assert [(row["form"], row["seeds"]) for row in rows] == [("sim", [0, 1]), ("mim", [0, 1])]


def test_another_host_takes_what_the_first_reads(ran, tmp_path, monkeypatch) -> None:
    """It may not see the log or the result yet, nor does it write."""
    compare.run(settings(compare__seeds=1), workdir=str(tmp_path), allow_changes=False)
    job = next(job for job in ran if job.workdir.name == "mim-0")
    outcome, result = compare.read_outcome(job), compare.read_result(job, False)
    for name in ("metrics.jsonl", compare.RESULT):
        (job.workdir / name).unlink()
    sent = {"outcome": outcome, "result": result}
    exchange = lambda name, text, **_: [json.dumps(sent[name]) if name in sent else text, text]
    monkeypatch.setattr(compare.parallel, "exchange_values", exchange)
    monkeypatch.setattr(compare.jax, "process_index", lambda: 1)
    assert compare.read_result(job, False) == result
    assert compare.write_result(job, "mim", 0, 7e9) == result
    assert not (job.workdir / compare.RESULT).exists()


def test_a_result_of_other_settings_is_refused(ran, tmp_path) -> None:
    compare.run(settings(), workdir=str(tmp_path), allow_changes=False)
    with pytest.raises(UserError, match=r"mim-0.*optim.lr"):
        compare.run(settings(optim__lr=0.5), workdir=str(tmp_path), allow_changes=False)
    assert len(ran) == 4


def test_rows_that_were_evaluated_with_other_settings_are_named(ran, tmp_path, capsys) -> None:
    """They are one table all the same: a setting of evaluations does not make another run."""
    compare.run(settings(compare__seeds=1), workdir=str(tmp_path), allow_changes=False)
    assert "comparable" not in (tmp_path / "compare.md").read_text()
    (tmp_path / "compare" / "mae+clip-0" / "result.json").unlink()
    again = settings(compare__seeds=1, evaluate__k=7, evaluate__batch_size=8)
    compare.run(again, workdir=str(tmp_path), allow_changes=False)
    lines = (tmp_path / "compare.md").read_text().splitlines()
    (note,) = (line for line in lines if "comparable" in line)
    assert "mim, seed 0 (evaluate.k: 20 -> 7)" in note and "mae" not in note
    assert note[2:] in capsys.readouterr().out


def test_a_result_of_an_earlier_version_has_no_settings_of_evaluations(ran, tmp_path) -> None:
    chosen = settings(compare__forms="mim", compare__seeds=1)
    compare.run(chosen, workdir=str(tmp_path), allow_changes=False)
    path = tmp_path / "compare" / "mim-0" / "result.json"
    result = json.loads(path.read_text())
    del result["evaluate"]
    run_files.write_json_atomic(path, result, noted=True)
    assert compare.run(chosen, workdir=str(tmp_path), allow_changes=False) == 0
    run_files.write_json_atomic(path, result | {"evaluate": 3}, noted=True)
    with pytest.raises(UserError, match="is not the result of a run"):
        compare.run(chosen, workdir=str(tmp_path), allow_changes=False)


def test_preemption_is_returned_and_the_table_has_the_finished_runs(
    ran, tmp_path, monkeypatch
) -> None:
    inner = compare.train.pretrain
    monkeypatch.setattr(
        compare.train,
        "pretrain",
        lambda job, allow, **_: (
            loop.PREEMPTED if job.workdir.name == "mim-1" else inner(job, allow)
        ),
    )
    assert compare.run(settings(), workdir=str(tmp_path), allow_changes=False) == 42
    assert names(ran) == ["mim-0"] and json.loads((tmp_path / "compare.json").read_text())["rows"][
        0
    ]["seeds"] == [0]


def test_a_signal_during_the_last_save_of_a_run_stops_before_the_next(
    ran, tmp_path, monkeypatch, capsys
) -> None:
    inner = compare.train.pretrain

    def pretrain(job: jobs.Setup, allow: bool, *, on_late_notice) -> int:
        if job.workdir.name in ("mim-1", "mae+clip-1"):
            on_late_notice()
        return inner(job, allow)

    monkeypatch.setattr(compare.train, "pretrain", pretrain)
    assert compare.run(settings(), workdir=str(tmp_path), allow_changes=False) == 42
    assert names(ran) == ["mim-0", "mim-1"] and "preempted after 2 of 4" in capsys.readouterr().out
    # its result is not lost, and nothing follows the last run
    assert compare.run(settings(), workdir=str(tmp_path), allow_changes=False) == loop.DONE
    assert names(ran) == ["mim-0", "mim-1", "mae+clip-0", "mae+clip-1"]


def test_a_run_that_is_not_finite_does_not_stop_the_others(
    ran, tmp_path, monkeypatch, capsys
) -> None:
    inner = compare.train.pretrain
    monkeypatch.setattr(
        compare.train,
        "pretrain",
        lambda job, allow, **_: loop.FAILED if job.workdir.name == "mim-0" else inner(job, allow),
    )
    assert compare.run(settings(), workdir=str(tmp_path), allow_changes=False) == loop.FAILED
    assert (
        names(ran) == ["mim-1", "mae+clip-0", "mae+clip-1"]
        and "mim, seed 0" in capsys.readouterr().out
    )
    assert not (tmp_path / "compare" / "mim-0" / "result.json").exists()
    table = (tmp_path / "compare.md").read_text()
    assert "| mim (1 of 2 seeds) | 40.0 |" in table and "| mae+clip | 40.0 ± 0.0 |" in table
    assert "over the seeds that a row has, 1 to 2;" in table


def test_a_run_that_fails_is_in_the_files_and_a_late_signal_stops_after_it(
    ran, tmp_path, monkeypatch, capsys
) -> None:
    """Also where no run has ended, and where the last one fails."""
    inner = compare.train.pretrain

    def pretrain(job: jobs.Setup, allow: bool, *, on_late_notice) -> int:
        if job.workdir.name == "mim-0":
            on_late_notice()
        if job.workdir.name in ("mim-0", "mae+clip-1"):
            return loop.FAILED
        return inner(job, allow)

    def noted() -> list[str]:
        notes = json.loads((tmp_path / "compare.json").read_text())["notes"]
        return [note for note in notes if note.startswith("Failed")]

    monkeypatch.setattr(compare.train, "pretrain", pretrain)
    assert compare.run(settings(), workdir=str(tmp_path), allow_changes=False) == loop.PREEMPTED
    assert not ran and "preempted after 1 of 4" in capsys.readouterr().out
    failed = ["Failed, not in the table: mim, seed 0."]
    assert noted() == failed and "No run has a result" in (tmp_path / "compare.md").read_text()
    monkeypatch.setattr(
        compare.train, "pretrain", lambda *job, **_: pretrain(*job, on_late_notice=lambda: None)
    )
    assert compare.run(settings(), workdir=str(tmp_path), allow_changes=False) == loop.FAILED
    assert names(ran) == ["mim-1", "mae+clip-0"]
    assert noted() == [failed[0].replace(".", "; mae+clip, seed 1.")]


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        (
            {"compare__forms": "mim,mimm"},
            "config.compare.forms: 'mimm' is not one of .*; did you mean mim",
        ),
        (
            {"compare__forms": "mim,clip", "data__captions": "no"},
            "predicts only annotations that this data does not have",
        ),
        ({"compare__forms": "mim,milan"}, "target_checkpoint"),
        (
            {"compare__forms": "mim,sim", "objective__isolate": True},
            "there is no mixed input in mim, sim",
        ),
        ({"compare__forms": "mim,mim"}, "names mim twice"),
        ({"compare__forms": "mim,+clip"}, "joined by +"),
        ({"compare__seeds": 0}, "compare.seeds"),
    ],
)
def test_invalid_comparisons_are_refused_before_any_run(ran, tmp_path, changes, wanted) -> None:
    with pytest.raises(UserError, match=wanted.replace("+", r"\+")):
        compare.run(settings(**changes), workdir=str(tmp_path), allow_changes=False)
    assert not ran


@pytest.mark.slow
def test_two_real_runs(tmp_path, monkeypatch, capsys) -> None:
    tiny = [
        *("model.encoder.depth=1", "train.steps=4", "train.batch_size=16", "train.log_every=1"),
        *(
            "train.panel_every=2",
            "data.size=300",
            "evaluate.train_limit=40",
            "evaluate.query_limit=20",
            "evaluate.batch_size=32",
        ),
        *("optim.warmup_steps=1", "compare.forms=d,mim+clip"),
    ]
    arguments = [
        "--mode=compare",
        "--config",
        "configs/forms.py:form=m3i,size=tiny",
        "--workdir",
        str(tmp_path),
    ]
    arguments += [f"--config.{setting}" for setting in tiny]
    monkeypatch.chdir(command.__file__.rpartition("/m3i_jax/")[0])
    assert command.main(arguments) == 0
    rows = json.loads((tmp_path / "compare.json").read_text())["rows"]
    wanted = {"eval/knn/top1", "eval/linear/top1", "loss", "flops", "seconds"}
    # one text tower more
    assert rows[1]["figures"]["flops"]["mean"] > rows[0]["figures"]["flops"]["mean"] > 1e8
    assert (
        wanted <= set(rows[0]["figures"])
        and "eval/retrieval/text_to_image/r1" in rows[1]["figures"]
    )
    assert (
        "collapse/target_std" in rows[1]["figures"]
        and (tmp_path / "compare/d-0/panels/00000004.png").is_file()
    )
    capsys.readouterr()
    assert command.main(arguments) == 0  # no run is repeated
    assert "compare: 1 of 2" not in capsys.readouterr().out


def test_times_of_steps_are_measured_once_and_verified(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are the lengths of the runs: of a file that changed, a run would get another one."""
    base, asked = types.SimpleNamespace(workdir=tmp_path), {"mim": "a setup", "sim": "another"}
    monkeypatch.setattr(compare, "time_step", lambda setup: float(len(setup)))
    wanted = {"mim": 7.0, "sim": 7.0}
    assert compare._step_seconds(base, asked) == wanted
    monkeypatch.delattr(compare, "time_step")
    assert compare._step_seconds(base, asked) == wanted
    path = tmp_path / "compare" / compare.MEASURED
    listed = {file.name: file.verified for file in run_files.FILES}
    assert listed[path.relative_to(tmp_path).as_posix()] == "note"
    path.write_text(path.read_text().replace("7.0", "8.0"))
    with pytest.raises(UserError, match="restore it, or begin in an empty workdir"):
        compare._step_seconds(base, asked)
