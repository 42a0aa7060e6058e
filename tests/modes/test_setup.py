"""Setup of a run: captions are tokenized if an objective reads them, or if no objective is
given."""

import dataclasses
import pathlib
import shutil
import types

import pytest

from m3i_jax import config as configuration
from m3i_jax.data import tokenizer
from m3i_jax.data.sources import base
from m3i_jax.data.sources.shapes import ShapesSource
from m3i_jax.errors import UserError
from m3i_jax.modes import compare, show, train
from m3i_jax.modes import setup as jobs
from m3i_jax.training.trainer import run_length
from tests import saved, toy

SMALL = {
    "data__size": 40,
    "data__classes": -1,
    "data__captions": "auto",
    "data__holdout": 0.3,
    "train__batch_size": 16,
}


@pytest.mark.parametrize(
    ("trains", "captions", "wanted"),
    [
        ([], "auto", "yes"),
        ([("mim",)], "auto", "no"),
        ([("mim",)], "yes", "yes"),
        ([("mim",), ("sim", "weakly_supervised")], "auto", "yes"),
    ],
)
def test_captions_are_tokenized_only_for_objectives_that_read_them(
    trains, captions: str, wanted: str, tmp_path: pathlib.Path
) -> None:
    job = jobs.open_setup(
        toy.settings(**SMALL | {"data__captions": captions}), str(tmp_path), trains=trains
    )
    assert job.config.data.captions == wanted
    assert (
        (job.tokenizer is not None) == (wanted == "yes") == (tmp_path / "tokenizer.json").is_file()
    )


def test_an_impossible_objective_is_refused_before_a_vocabulary_is_learnt(
    tmp_path: pathlib.Path,
) -> None:
    with pytest.raises(UserError, match="config.objective.forms: supervised"):
        jobs.open_setup(
            toy.settings(**SMALL | {"data__classes": 0}),
            str(tmp_path),
            trains=[("mim",), ("supervised",)],
        )
    assert not (tmp_path / "tokenizer.json").exists()


def test_a_comparison_tokenizes_captions_if_one_form_reads_them(
    tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even if the objective of the configuration, which is not trained, reads none."""
    seen = []
    monkeypatch.setattr(
        compare.train,
        "pretrain",
        lambda job, allow, **_: seen.append(job) or compare.loop.PREEMPTED,
    )
    settings = toy.settings(
        **SMALL | {"objective__forms": "mim", "compare__forms": "weakly_supervised"}
    )
    assert (
        compare.run(settings, workdir=str(tmp_path), allow_changes=False) == compare.loop.PREEMPTED
    )
    assert seen[0].tokenizer is not None and seen[0].config.objective.forms == (
        "weakly_supervised",
    )


def test_a_reopened_run_has_the_same_images(tmp_path: pathlib.Path) -> None:
    """Some of 40 shapes are held out. If config.txt had the number of the others, a reopened run
    would hold out other images, and --mode=eval would evaluate on them."""
    first = jobs.open_setup(toy.settings(**SMALL), str(tmp_path), trains=[("mim",)])
    assert len(first.held_out) and first.config.data.size == len(first.train) < 40
    again = jobs.open_setup(
        configuration.resolve(configuration.config_from_text(first.text, "config.txt")),
        str(tmp_path),
        trains=[("mim",)],
    )
    assert (
        again.identity == first.identity
        and len(again.held_out) == len(first.held_out)
        and again.text == first.text
    )


def test_the_length_of_a_run_is_of_the_epochs_of_its_stream(tmp_path: pathlib.Path) -> None:
    """A keep-list of 32 shapes, each of them four times an epoch; --mode=show plans the same."""
    arrow, parquet = map(pytest.importorskip, ("pyarrow", "pyarrow.parquet"))
    keys = [base.source_key(ShapesSource(40), i) for i in range(32)]
    parquet.write_table(arrow.table({"key": keys, "weight": [4.0] * 32}), tmp_path / "a.parquet")
    kept = {"data__keep": (str(tmp_path / "a.parquet"),), "data__holdout": 0.0}
    for changes, size in ((kept, 128), ({**kept, "data__keep": ()}, 40)):
        config = toy.settings(**{**SMALL, **changes, "train__epochs": 3.0, "train__steps": 0})
        job = jobs.open_setup(config, str(tmp_path), trains=[("mim",)])
        assert job.config.data.size == size == show.assume_data(config)[0].data.size
        assert run_length(job.config).steps == 3 * (size // 16)


def test_a_resumed_run_keeps_its_rounded_batch(tmp_path: pathlib.Path, capsys) -> None:
    """Eight data shards round 62 images to 64. On devices that need no rounding it stays 64:
    another batch would be another run."""
    asked = SMALL | {"data__size": 200, "train__batch_size": 62, "train__round_batch": True}
    first = jobs.open_setup(toy.settings(**asked), str(tmp_path))
    (tmp_path / "config.txt").write_text(first.text)
    elsewhere = toy.settings(**asked, parallel__mesh="(1,1,8)")
    capsys.readouterr()
    assert (
        first.config.train.batch_size
        == jobs.open_setup(elsewhere, str(tmp_path)).config.train.batch_size
        == 64
    )
    assert (
        f"train.batch_size: 64, as in the run in {tmp_path}, instead of 62"
        in capsys.readouterr().out
    )
    assert jobs.open_setup(elsewhere, str(tmp_path / "new")).config.train.batch_size == 62
    fewer = toy.settings(**asked | {"train__batch_size": 32}, parallel__mesh="(1,1,8)")
    # configured, so it is reported as a change
    assert jobs.open_setup(fewer, str(tmp_path)).config.train.batch_size == 32


def test_a_batch_that_is_much_larger_is_another(tmp_path: pathlib.Path) -> None:
    """Eight data shards round 40 images by a fifth, to 48: on other devices 40 may be meant."""
    asked = SMALL | {"data__size": 200, "train__batch_size": 40, "train__round_batch": True}
    first = jobs.open_setup(toy.settings(**asked), str(tmp_path))
    (tmp_path / "config.txt").write_text(first.text)
    again = jobs.open_setup(toy.settings(**asked, parallel__mesh="(1,1,8)"), str(tmp_path))
    assert (first.config.train.batch_size, again.config.train.batch_size) == (48, 40)


def test_a_rounded_batch_that_does_not_divide_is_refused(tmp_path: pathlib.Path) -> None:
    """Two data shards round 50 images to 52, which eight do not divide."""
    asked = SMALL | {"data__size": 200, "train__batch_size": 50, "train__round_batch": True}
    first = jobs.open_setup(toy.settings(**asked, parallel__mesh="(2,1,4)"), str(tmp_path))
    assert first.config.train.batch_size == 52
    train.write_settings(first)
    more = jobs.open_setup(toy.settings(**asked), str(tmp_path))
    position = {"fingerprint": first.fingerprint, "samples_seen": 0}
    with pytest.raises(UserError, match="train.batch_size: 52 -> 64.* add --allow-changes"):
        train.check_same_run(more, position, False)
    assert train.check_same_run(more, position, True)


def test_a_resumed_run_says_that_its_evaluations_changed(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = jobs.open_setup(toy.settings(**SMALL), str(tmp_path))
    train.write_settings(first)
    saved = types.SimpleNamespace(
        newest_good=lambda: 70,
        position=lambda step: {"fingerprint": first.fingerprint, "samples_seen": 8},
    )
    capsys.readouterr()
    assert train._newest_position(first, saved, False)[2] is False
    assert "evaluat" not in capsys.readouterr().out
    evaluate = dataclasses.replace(first.config.evaluate, k=7)
    other = dataclasses.replace(first, config=dataclasses.replace(first.config, evaluate=evaluate))
    assert train._newest_position(other, saved, False)[2] is False  # nor is it refused
    said = capsys.readouterr().out
    assert "evaluate.k: 20 -> 7: evaluations up to step 70 had" in said


def test_a_dense_head_has_as_many_names_as_it_predicts(tmp_path: pathlib.Path) -> None:
    """Data with fewer classes than the recipe's head, as a part of ADE20k, and with more."""
    for classes, last in ((20, "19"), (2, "square")):
        config = configuration.load_config("configs/transfer/segment.py")
        config.data.update({"size": 20, "classes": classes})
        job = jobs.open_setup(configuration.resolve(config), str(tmp_path / str(classes)))
        assert len(job.classes) == job.config.data.classes == classes
        assert job.classes[-1] == last


def test_categories_that_the_data_lack_are_counted_as_never_seen(tmp_path: pathlib.Path) -> None:
    config = configuration.load_config("configs/transfer/detect.py")
    config.data.update({"size": 20, "classes": 20})
    config.dense.detect.loss = "federated"
    counts = jobs.open_setup(configuration.resolve(config), str(tmp_path)).task.category_counts
    assert len(counts) == 20 and counts[0] > 0 and counts[-1] == 0


@pytest.mark.parametrize("shared", [True, False])
def test_a_working_directory_on_the_disk_of_each_host_is_refused(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, shared: bool
) -> None:
    """As the second host of two."""
    if shared:
        (tmp_path / ".shared-word").touch()
    monkeypatch.setattr(jobs.jax, "process_index", lambda: 1)
    monkeypatch.setattr(jobs.time, "sleep", lambda seconds: None)
    for name, value in {
        "host_names": lambda: 2,
        "barrier": lambda name: None,
        "host_label": lambda number: f"host {number}",
        "exchange_values": lambda name, text: ["word" if name == "shared" else "", text],
    }.items():
        monkeypatch.setattr(jobs.parallel, name, value)
    if shared:
        jobs.require_shared(tmp_path)
    else:
        with pytest.raises(UserError, match=r"is another directory on host 1 than on host 0; give"):
            jobs.require_shared(tmp_path)


def test_a_vocabulary_is_made_again_until_there_is_a_checkpoint(tmp_path: pathlib.Path) -> None:
    """--mode=preview may have made another one before; that of a run stays."""
    sizes = [SMALL | {"data__vocabulary_size": size} for size in (270, 280)]
    for changes in (*sizes, sizes[0]):
        job = jobs.open_setup(toy.settings(**changes), str(tmp_path))
        assert job.vocabulary == changes["data__vocabulary_size"]
    for run in (tmp_path, tmp_path / "compare" / "mim-0"):
        step = run / "checkpoints" / "7"
        step.mkdir(parents=True)
        assert jobs.has_checkpoints(tmp_path)
        assert jobs.open_setup(toy.settings(**sizes[0]), str(tmp_path)).vocabulary == 270
        with pytest.raises(UserError, match=r"data\.vocabulary_size=270, not 280, and the run"):
            jobs.open_setup(toy.settings(**sizes[1]), str(tmp_path))
        step.rmdir()
    with (
        jobs.lock_workdir(tmp_path),  # a training before its first checkpoint
        pytest.raises(UserError, match=r"data\.vocabulary_size=270, not 280, and the run"),
    ):
        jobs.open_setup(toy.settings(**sizes[1]), str(tmp_path))


def test_text_weights_of_a_run_come_with_its_vocabulary(
    tmp_path: pathlib.Path, caplog, capsys: pytest.CaptureFixture[str]
) -> None:
    """Other captions make another vocabulary of the same size, by which every array would fit. It
    is made where no array of tokens is taken, or where its size shows that it is another one."""
    first, own = tmp_path / "first", tmp_path / "own"
    jobs.open_setup(toy.settings(**SMALL), str(own))
    saved.run(first, toy.settings(objective__forms="weakly_supervised"))
    theirs = tokenizer.train_tokenizer(["the quick brown fox", "the lazy dog"] * 9, 300, 8)
    theirs.origin = {"data.tokenizer": "train", "data.vocabulary_size": toy.VOCABULARY}
    theirs.save(str(first / "tokenizer.json"))
    started = SMALL | {"init_from": str(first)}

    def opened(workdir: pathlib.Path, **changes: object) -> str:
        return jobs.open_setup(toy.settings(**changes), str(workdir)).tokenizer.core.to_str()

    made, taken = (own / "tokenizer.json").read_text(), theirs.core.to_str()
    assert made != taken and opened(tmp_path / "new", **started) == taken
    assert "the tokenizer of the run that this one starts from" in capsys.readouterr().out
    assert opened(tmp_path / "new", **started) == taken  # the same command again
    assert opened(tmp_path / "part", **started, init__only="('^text/token',)") == taken
    # which that run does not have
    assert opened(tmp_path / "head", **started, init__only="('^captioner/logits',)") == made
    assert opened(tmp_path / "encoder", **started, init__only="('^encoder/',)") == made
    assert not caplog.text
    assert opened(tmp_path / "new", **SMALL) == made  # started from another run, or from none
    assert "another init_from, or none: it is made again" in caplog.text
    other = {**started, "data__vocabulary_size": 290}
    assert opened(tmp_path / "size", **other) not in (made, taken)
    # a checkpoint needs it, whatever became of that run
    assert opened(tmp_path / "kept", **started) == taken
    (tmp_path / "kept" / "checkpoints" / "7").mkdir(parents=True)
    shutil.rmtree(first / "checkpoints")
    assert opened(tmp_path / "kept", **started) == taken
    (first / "config.txt").unlink()  # a directory of Hugging Face has a tokenizer.json, too
    assert opened(tmp_path / "hugging", **started) == made


def test_a_vocabulary_without_text_weights_is_not_taken(tmp_path: pathlib.Path) -> None:
    """--mode=data writes one of the captions of a run that trains none of them."""
    first = tmp_path / "first"
    saved.run(first, toy.settings(objective__forms="mim"))
    theirs = tokenizer.train_tokenizer(["the quick brown fox", "the lazy dog"] * 9, 300, 8)
    theirs.origin = {"data.tokenizer": "train", "data.vocabulary_size": toy.VOCABULARY}
    theirs.save(str(first / "tokenizer.json"))
    assert jobs.starting_tokenizer(toy.settings(**SMALL, init_from=str(first))) is None


def test_a_run_of_a_comparison_has_its_vocabulary(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where an earlier start wrote another one, but no checkpoint."""
    monkeypatch.setattr(compare.train, "pretrain", lambda job, allow, **_: 0)
    for size in (270, 280):
        job = jobs.open_setup(
            toy.settings(**SMALL | {"data__vocabulary_size": size}), str(tmp_path)
        )
        one = compare.config_for(job, "mim", 0)
        assert compare.run_one(one, False) == 0
        saved = tokenizer.Tokenizer.load(str(one.workdir / "tokenizer.json"), 16)
        assert saved.vocabulary == size and saved.origin["data.vocabulary_size"] == size
