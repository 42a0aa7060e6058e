"""The tokenizer in a workdir: opened again while it is the one of the settings, made again while no
checkpoint needs it, and else refused."""

import gzip
import json
import pathlib

import pytest

from m3i_jax import run_files, schema
from m3i_jax.data import tokenizer
from m3i_jax.data.sources import base
from m3i_jax.errors import UserError

WORDS = ["a red cat and a dog", "the red dog", "a cat and the cat on the red mat"]
DATA = schema.Data(vocabulary_size=280, caption_length=9)


class Captions:
    """A source of some captions."""

    name, classes, captions = "captions", (), True

    def __init__(self, *texts: str) -> None:
        self.texts = texts or WORDS

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: int) -> base.Record:
        return base.Record(str(index), b"", -1, self.texts[index])

    def fingerprint(self) -> str:
        return base.stable_digest(*self.texts)


def write_merges(path: pathlib.Path, *pairs: str) -> str:
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.write("\n".join(["#version: 0.2", *pairs]) + "\n")
    return str(path)


def saved_vocabulary(path: pathlib.Path) -> int:
    return len(json.loads(path.read_text())["model"]["vocab"])


def test_a_tokenizer_is_opened_again(tmp_path: pathlib.Path) -> None:
    """Also where the captions are cut elsewhere, which does not change it."""
    saved = tmp_path / "tokenizer.json"
    first = tokenizer.open_tokenizer(DATA, Captions(), str(saved))
    assert 259 < first.vocabulary <= 280 and first.length == 9
    written = saved.stat().st_mtime_ns
    for fixed in (False, True):
        again = tokenizer.open_tokenizer(
            schema.Data(vocabulary_size=280, caption_length=11), Captions(), str(saved), fixed=fixed
        )
        assert again.core.to_str() == first.core.to_str() and again.length == 11
    assert saved.stat().st_mtime_ns == written


def test_other_settings_make_it_again(tmp_path: pathlib.Path, monkeypatch, caplog) -> None:
    monkeypatch.setattr(tokenizer, "_MERGES", 2)
    saved = tmp_path / "tokenizer.json"
    path = write_merges(tmp_path / "a.gz", "t h", "th e</w>")
    other = write_merges(tmp_path / "b.gz", "c a", "ca t</w>")
    clip = schema.Data(tokenizer="clip", vocabulary=path)
    tokenizer.open_tokenizer(DATA, Captions(), str(saved))
    for data, source, why in (
        (schema.Data(vocabulary_size=270), Captions(), "data.vocabulary_size=280, not 270"),
        (clip, Captions(), "data.tokenizer='train', not 'clip'"),
        (schema.Data(tokenizer="clip", vocabulary=other), Captions(), "another data.vocabulary"),
        (DATA, Captions(), "data.tokenizer='clip', not 'train'"),
        (DATA, Captions("another text", "another one"), "other captions"),
    ):
        caplog.clear()
        made = tokenizer.open_tokenizer(data, source, str(saved))
        assert f"was made from {why}: it is made again" in caplog.text
        assert made.core.to_str() == tokenizer.open_tokenizer(data, source).core.to_str()
        assert saved.read_text() == made.core.to_str()
    # the same merges in another file
    clip = schema.Data(tokenizer="clip", vocabulary=path)
    tokenizer.open_tokenizer(clip, Captions(), str(saved))
    caplog.clear()
    moved = write_merges(tmp_path / "moved.gz", "t h", "th e</w>")
    tokenizer.open_tokenizer(
        schema.Data(tokenizer="clip", vocabulary=moved), Captions(), str(saved)
    )
    assert not caplog.text


def test_a_run_refuses_other_settings_but_not_other_data(
    tmp_path: pathlib.Path, monkeypatch
) -> None:
    monkeypatch.setattr(tokenizer, "_MERGES", 2)
    saved = tmp_path / "tokenizer.json"
    first = tokenizer.open_tokenizer(DATA, Captions(), str(saved))
    with pytest.raises(
        UserError,
        match=r"tokenizer\.json: was made from data\.vocabulary_size=280, not 270, and the run in"
        " this directory uses it: restore the setting, or choose another --workdir",
    ):
        tokenizer.open_tokenizer(
            schema.Data(vocabulary_size=270), Captions(), str(saved), fixed=True
        )
    elsewhere = tokenizer.open_tokenizer(DATA, Captions("other texts"), str(saved), fixed=True)
    assert elsewhere.core.to_str() == first.core.to_str()
    # a machine without the vocabulary file opens the run, and refuses to start another one
    path = write_merges(tmp_path / "a.gz", "t h", "th e</w>")
    clip = schema.Data(tokenizer="clip", vocabulary=path)
    wanted = tokenizer.open_tokenizer(clip, Captions(), str(saved)).core.to_str()
    pathlib.Path(path).unlink()
    opened = tokenizer.open_tokenizer(clip, Captions(), str(saved), fixed=True)
    assert opened.core.to_str() == wanted
    with pytest.raises(UserError, match="cannot be read"):
        tokenizer.open_tokenizer(clip, Captions(), str(saved))


def test_without_a_record_any_tokenizer_is_opened(tmp_path: pathlib.Path) -> None:
    """Of an older version, which wrote none, and one that the user put there."""
    saved = tmp_path / "tokenizer.json"
    tokenizer.train_tokenizer(WORDS, 265, 8).save(str(saved))
    assert not run_files.origin_path(saved).exists()
    for fixed in (False, True):
        assert tokenizer.open_tokenizer(DATA, Captions(), str(saved), fixed=fixed).vocabulary == 265
    saved.unlink()
    tokenizer.open_tokenizer(DATA, Captions(), str(saved))
    own = tokenizer.train_tokenizer(WORDS, 265, 8)
    own.save(str(saved))  # the record is that of another version of the file
    assert tokenizer.open_tokenizer(DATA, Captions(), str(saved)).vocabulary == 265


def test_a_killed_write_leaves_no_wrong_record(tmp_path: pathlib.Path, monkeypatch) -> None:
    """Between the record and the file: the next start makes the file."""
    saved = tmp_path / "tokenizer.json"
    tokenizer.open_tokenizer(DATA, Captions(), str(saved))
    data = schema.Data(vocabulary_size=270)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(tokenizer.base, "write_atomic", lambda *_: (_ for _ in ()).throw(STOP))
        tokenizer.open_tokenizer(data, Captions(), str(saved))
    assert not saved.exists()
    assert tokenizer.open_tokenizer(data, Captions(), str(saved)).vocabulary == 270
    assert saved_vocabulary(saved) == 270
    # a damaged record is none
    run_files.origin_path(saved).write_text("{")
    assert tokenizer.open_tokenizer(DATA, Captions(), str(saved)).vocabulary == 270


STOP = KeyboardInterrupt()
