"""Row B12, file by file: a run reads back what it wrote. Single bits; test_run_files.py damages
whole files."""

import json
import os
import pathlib
import random
import zlib
from typing import Any

import numpy as np
import pytest

from m3i_jax import config as configuration
from m3i_jax import run_files, schema
from m3i_jax.data import tokenizer
from m3i_jax.data.sources import base
from m3i_jax.errors import UserError
from m3i_jax.modes import train
from m3i_jax.reporting import run_log, writers
from tests.faults.test_checkpoints import flip
from tests.faults.test_operation import job

pytestmark = [pytest.mark.fast, pytest.mark.row("B12")]
CAPTIONS = ["a red cat", "a red dog", "the cat and the dog"]
DATA = schema.Data(vocabulary_size=300, caption_length=8)


@pytest.fixture
def words(tmp_path: pathlib.Path) -> pathlib.Path:
    """A saved tokenizer."""
    path = tmp_path / "tokenizer.json"
    tokenizer.train_tokenizer(CAPTIONS, 300, 8).save(str(path))
    return path


class Images(list[base.Record]):
    """Records with captions, as a source."""

    classes = ()

    def fingerprint(self) -> str:
        return base.stable_digest(*CAPTIONS)


def images() -> Any:
    return Images(base.Record(str(k), b"", caption=text) for k, text in enumerate(CAPTIONS))


def test_two_ids_that_were_exchanged_are_noticed(words: pathlib.Path) -> None:
    """An undamaged tokenizer, but another one."""
    saved = json.loads(words.read_text())
    vocabulary = saved["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    words.write_text(json.dumps(saved))
    with pytest.raises(
        UserError, match=r"tokenizer\.json: is damaged.*restore it, or delete it to train it again"
    ):
        tokenizer.open_tokenizer(DATA, images(), str(words))
    words.unlink()
    assert tokenizer.open_tokenizer(DATA, images(), str(words)).ids(
        "a red cat"
    ) == tokenizer.train_tokenizer(CAPTIONS, 300, 8).ids("a red cat")


def test_no_flipped_bit_of_a_tokenizer_is_silent(words: pathlib.Path, trials) -> None:
    r, size = random.Random(0), words.stat().st_size
    for _ in range(600):
        bit = r.randrange(8 * size)
        flip(words, bit)
        with pytest.raises(UserError, match="is damaged"):
            tokenizer.Tokenizer.load(str(words), 8)
        flip(words, bit)
        trials.add(True)
    tokenizer.Tokenizer.load(str(words), 8)
    trials.figure = "0 of 600 flips of tokenizer.json silent"


def test_a_tokenizer_of_another_run_is_refused_by_the_position(words: pathlib.Path) -> None:
    """Undamaged, with its own digest; but the checkpoint was trained with another one."""
    position = {"samples_seen": 8, "fingerprint": "f", "files": train.tokenizer_of(words.parent)}
    here = job(words.parent)
    train.write_settings(here)
    train.check_same_run(here, position, False)
    tokenizer.train_tokenizer([*CAPTIONS, "some other words"], 300, 8).save(str(words))
    with pytest.raises(
        UserError,
        match=r"another configuration \(tokenizer\.json: .*were written\); .* --allow-changes",
    ):
        train.check_same_run(here, position, False)
    train.check_same_run(here, position, True)


def test_how_a_run_read_its_first_weights_is_no_other_run(tmp_path: pathlib.Path, capsys) -> None:
    """A recipe of a later version reads others of the same source; the checkpoint needs neither."""
    position = {"samples_seen": 8, "fingerprint": "f"}
    train.write_settings(job(tmp_path, init_from="/a"))
    capsys.readouterr()
    train.check_same_run(job(tmp_path, init_from="/a"), position, False)
    assert "init.weights" not in capsys.readouterr().out
    train.check_same_run(job(tmp_path, init_from="/a", init__weights="ema"), position, False)
    words = "warning: init.weights: 'online' -> 'ema': has no effect, because the run continues"
    assert words in capsys.readouterr().out
    with pytest.raises(UserError, match=r"configuration \(init_from: '/a' -> '/b'\)"):
        train.check_same_run(job(tmp_path, init_from="/b"), position, False)


def test_what_the_network_does_not_read_is_no_other_run(tmp_path: pathlib.Path) -> None:
    """A recipe of an earlier version set it; what is read on either side is another run."""
    position = {"samples_seen": 8, "fingerprint": "f"}
    old = {"model__encoder__rope_base": 50.0, "model__encoder__cls_token": False}
    magnitude = {"data__rand_augment__magnitude": 5.0}
    train.write_settings(job(tmp_path, **old, **magnitude, model__decoder__cls="yes"))
    none = {"model__encoder__cls_token": False}
    train.check_same_run(job(tmp_path, **none), position, False)
    with pytest.raises(UserError, match=r"ops: 0 -> 2; data.rand_augment.magnitude: 5.0 -> 9"):
        operations = {"data__rand_augment__ops": 2}
        train.check_same_run(job(tmp_path, **none | operations), position, False)
    with pytest.raises(UserError, match=r"configuration \(model.encoder.cls_token: [^;]*\)"):
        train.check_same_run(job(tmp_path, model__decoder__cls="yes"), position, False)
    with pytest.raises(UserError, match="model.encoder.positions.*; model.encoder.rope_base: 50"):
        rotary = {"model__encoder__positions": "rope", "model__encoder__rope_base": 100.0}
        train.check_same_run(job(tmp_path, **none | rotary), position, False)


def test_settings_that_cannot_be_compared_are_logged(tmp_path: pathlib.Path, capsys) -> None:
    position = {"samples_seen": 8, "fingerprint": "f"}
    train.write_settings(job(tmp_path))
    text = (tmp_path / "config.txt").read_text()
    flip(tmp_path / "config.txt", 8 * (text.index("optim.lr = ") + 11))
    with pytest.raises(
        UserError,
        match=r"config\.txt: is damaged.*delete it to continue with the settings of this command",
    ):
        train.check_same_run(job(tmp_path), position, False)
    with pytest.raises(UserError, match=r"config\.txt: is damaged"):
        configuration.load_from_workdir(str(tmp_path), "--workdir")
    (tmp_path / "config.txt").unlink()
    train.check_same_run(job(tmp_path), position, False)
    assert "config.txt is missing" in capsys.readouterr().out


def test_a_file_of_an_older_run_is_taken_as_it_is(tmp_path: pathlib.Path) -> None:
    (tmp_path / "config.txt").write_text("seed = 7\n")
    assert (
        configuration.load_from_workdir(str(tmp_path), "--workdir").seed == 7
        and not (tmp_path / "digests").exists()
    )


def test_a_process_that_is_killed_between_the_two_writes_leaves_a_file_that_is_known(
    tmp_path: pathlib.Path, monkeypatch
) -> None:
    path = tmp_path / "config.txt"
    run_files.write_text_atomic(path, "old", noted=True)
    for content in ("newer", "newest"):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(
                run_files, "atomic_file", lambda path: (_ for _ in ()).throw(KeyboardInterrupt)
            )
            run_files.write_text_atomic(path, content, noted=True)
        assert run_files.read_run_text(path) == ("old" if content == "newer" else "newer")
        run_files.write_text_atomic(path, content, noted=True)
    assert run_files.read_run_text(path) == "newest"


def test_a_log_is_known_up_to_where_it_was_noted(tmp_path: pathlib.Path, caplog, trials) -> None:
    """Any flipped bit of the recorded beginning is detected; the tail that a killed run left is not
    covered, and gives no warning."""
    log = tmp_path / "metrics.jsonl"
    lines = writers.JsonLines(log)
    for step in range(1, 5):
        lines.write(step, {"loss": 1.0 / step})
    size, _ = lines.mark()
    lines.write(5, {"loss": 0.1})  # killed here
    whole = log.read_bytes()
    assert len(run_log.load_run_log(tmp_path).lines) == 5 and not caplog.text
    for bit in random.Random(0).choices(range(8 * size), k=60):
        flip(log, bit)
        caplog.clear()
        run_log.read_log_lines(log)
        assert trials.add("is not what the run wrote" in caplog.text), bit
        flip(log, bit)
    log.write_bytes(whole[: size - 3])
    caplog.clear()
    assert (
        len(run_log.load_run_log(tmp_path).lines) == 3
        and f"{size - 3:,} bytes, {size:,} were written" in caplog.text
    )


def test_a_resumed_log_that_was_cut_is_known_again(tmp_path: pathlib.Path, caplog) -> None:
    log = tmp_path / "metrics.jsonl"
    for first in (1, 3):
        writers.truncate_log(log, first - 1)
        lines = writers.JsonLines(log)
        for step in range(first, first + 6):
            lines.write(step, {"loss": 1.0 / step})
        lines.close()
        assert not run_files.read_log(log)[1]
    assert [line["step"] for line in run_log.read_log_lines(log)] == [
        1,
        2,
        *range(3, 9),
    ] and not caplog.text
    writers.truncate_log(log, 4)  # and killed before anything else is written
    assert not run_files.read_log(log)[1]


def test_a_log_that_is_a_pipe_is_refused_at_once(tmp_path: pathlib.Path) -> None:
    os.mkfifo(tmp_path / "metrics.jsonl")
    with pytest.raises(UserError, match="cannot write .*metrics.jsonl"):
        writers.JsonLines(tmp_path / "metrics.jsonl")


def test_no_flipped_bit_of_an_index_is_silent(tmp_path: pathlib.Path, trials) -> None:
    """All bits of names, headers and checksums, and a thousand of the content: the index is read as
    it was written, or not at all."""
    path = str(tmp_path / "index.npz")
    columns = {
        "offset": np.arange(5000, dtype=np.int64),
        "keys": np.frombuffer(os.urandom(4000), np.uint8),
        "few": np.arange(3),
    }
    base.save_arrays(path, **columns)
    content, r = bytearray(pathlib.Path(path).read_bytes()), random.Random(0)

    def same(got: dict[str, np.ndarray] | None) -> bool:
        return got is None or (
            got.keys() == columns.keys()
            and all(np.array_equal(got[name], columns[name]) for name in columns)
        )

    heads = [
        at
        for at in range(len(content) - 4)
        if content[at : at + 2] == b"PK" or content[at : at + 6] == b"\x93NUMPY"
    ]
    every = [
        8 * at + r.randrange(8)
        for head in heads
        for at in range(head, min(head + 80, len(content)))
    ]
    for bit in every + r.choices(range(8 * len(content)), k=1000):
        flip(pathlib.Path(path), bit)
        assert trials.add(same(base.load_arrays(path))), bit
        flip(pathlib.Path(path), bit)
    assert base.load_arrays(path) is not None
    trials.figure = f"0 of {trials.trials:,} flips of an index silent"


def test_an_index_whose_shape_became_smaller_is_no_index(tmp_path: pathlib.Path) -> None:
    """numpy reads fewer numbers then, and does not reach the checksum at the end."""
    path = tmp_path / "index.npz"
    base.save_arrays(str(path), offset=np.arange(5000, dtype=np.int64))
    content = path.read_bytes()
    assert content.count(b"(5000,)") == 1
    path.write_bytes(content.replace(b"(5000,)", b"(1000,)"))
    with np.load(path) as opened:
        assert len(opened["offset"]) == 1000
    assert base.load_arrays(str(path)) is None


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_an_index_that_is_no_file_is_no_index(tmp_path: pathlib.Path, make) -> None:
    make(tmp_path / "index.npz")
    assert base.load_arrays(str(tmp_path / "index.npz")) is None


def test_a_right_checksum_is_no_reason_to_believe_in_a_structure(tmp_path: pathlib.Path) -> None:
    assert run_files.unseal_note(run_files.seal_note([(3, "x")])) == [[3, "x"]]
    line = b"[" * 100_000
    assert run_files.unseal_note(line + b"\n%08x\n" % zlib.crc32(line)) is None
    for value in (None, 3, {"a": 1}, [3], [[3]], [["3", "x"]], [[True, "x"]], [[3, "x", 4]]):
        assert run_files.parse_marks(value) is None
