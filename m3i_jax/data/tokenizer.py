"""Tokenizes captions: with a byte-pair encoding trained on the captions of the run, or with CLIP's.
Both use the `tokenizers` package.

`python -m m3i_jax.data.tokenizer FOLDER` downloads CLIP's vocabulary (1.4 MB, MIT licence) from a
package on the Python package index, without installing anything."""

import collections
import gzip
import hashlib
import importlib.util
import itertools
import logging
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from m3i_jax import progress, run_files, schema
from m3i_jax.data.decode import clean_caption, sample_captions
from m3i_jax.data.region_texts import region_corpus
from m3i_jax.data.sources import base
from m3i_jax.errors import UserError

VOCABULARY = "bpe_simple_vocab_16e6.txt.gz"
SHA256 = "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a"
FILE_LIMIT = 1 << 24  # characters of a saved tokenizer; CLIP's has 4 million
FETCH = "python -m m3i_jax.data.tokenizer FOLDER"
# packages that contain the file; they are located without being imported
_PACKAGES = ("open_clip", "clip", "eva_clip", "mobileclip")
_MERGES = 48_894  # lines of the file that CLIP uses
_UNPACKED_LIMIT = 1 << 23  # bytes; CLIP's file has 3.2 million
_TOKEN_LIMIT = 256  # characters of a token of the file
_TRAINED, _CLIP = ("<pad>", "<start>", "<end>"), ("<|startoftext|>", "<|endoftext|>")
# in an origin: digest of what the texts are read from; of the tokenizer that init_from has
_CAPTIONS, TAKEN = "captions", "init_from"
_log = logging.getLogger(__name__)
_LITERALS = re.compile(
    "|".join(map(re.escape, (*_TRAINED, *_CLIP, "<start_of_text>", "<end_of_text>")))
)


class Tokenizer:
    """Encodes a caption as a fixed number of ids: start, text, end, zeros. Zero may also be a real
    id, so use the returned length.

    Args:
        core: a tokenizer of the `tokenizers` package with start and end tokens.
        length: ids to which a caption is padded or cut, start and end included; at least 2.

    Attributes:
        origin: what it was made from, which is saved beside it; {} if unknown.
    """

    def __init__(self, core: tokenizers.Tokenizer, length: int) -> None:
        if length < 2:
            raise UserError(
                f"data.caption_length={length} has no room for the start and the end token: use at"
                " least 3"
            )
        ends = [tuple(map(core.token_to_id, pair)) for pair in (_TRAINED[1:], _CLIP)]
        present = [pair for pair in ends if None not in pair]
        if not present:
            raise UserError(
                f"the tokenizer has neither {_TRAINED[1]!r} nor {_CLIP[0]!r} in its vocabulary: it"
                " was not written by m3i_jax"
            )
        self.core, self.length, self.origin = core, length, dict[str, Any]()
        self.start, self.end = present[0]

    @property
    def vocabulary(self) -> int:
        """Number of ids, start, end and padding included."""
        return self.core.get_vocab_size()

    def ids(self, text: str, *, cleaned: bool = False) -> list[int]:
        """Returns all ids of a text, without start and end. With `cleaned`, `clean_caption` is not
        applied again."""
        return self.core.encode(
            _plain(text if cleaned else clean_caption(text)), add_special_tokens=False
        ).ids

    def frame(self, ids: Sequence[int]) -> tuple[np.ndarray, int]:
        """Returns (int32 [length], number of real ids): start, as many ids as fit, end, zeros."""
        real = [self.start, *ids[: self.length - 2], self.end]
        return np.array(real + [0] * (self.length - len(real)), np.int32), len(real)

    def encode(self, text: str) -> tuple[np.ndarray, int]:
        """Cleans and encodes a caption.

        Args:
            text: the caption of the source.

        Returns:
            (int32 [length], number of real ids, start and end included).

        >>> tokenizer = train_tokenizer(["a red cat", "a red dog", "a cat"], 300, 8)
        >>> ids, length = tokenizer.encode("A RED cat")
        >>> ids.shape, length, tokenizer.decode(ids)
        ((8,), 5, 'a red cat')
        """
        return self.frame(self.ids(text))

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Decodes ids up to the end token to text, for images and reports."""
        ids = [int(i) for i in ids]
        ids = ids[: ids.index(self.end)] if self.end in ids else ids
        return self.core.decode(
            [i for i in ids if i != self.start], skip_special_tokens=False
        ).strip()

    def save(self, path: str) -> None:
        """Writes the JSON of the `tokenizers` package atomically, its digest, and its origin."""
        content, file = self.core.to_str().encode(), pathlib.Path(path)
        mark = run_files.file_mark(content)
        if self.origin:
            file.unlink(missing_ok=True)  # the record would not belong to it
            run_files.note_origin(file, mark, self.origin)
        run_files.note_mark(file, mark)
        base.write_atomic(path, content)

    @classmethod
    def load(cls, path: str, length: int) -> "Tokenizer":
        """Loads a saved tokenizer.

        Raises:
            UserError: the file is missing, is not a tokenizer, or was changed.

        >>> Tokenizer.load("/no/such/tokenizer.json", 77)
        Traceback (most recent call last):
        m3i_jax.errors.UserError: the tokenizer '/no/such/tokenizer.json' cannot be read: No such
        ...
        """
        try:
            text = run_files.read_run_text(
                pathlib.Path(path), "restore it, or delete it to train it again"
            )
            if len(text) > FILE_LIMIT:
                raise UserError(
                    f"the tokenizer {path!r} has more than {FILE_LIMIT >> 20} MiB, so m3i_jax did"
                    " not write it; restore it"
                )
            loaded = cls(tokenizers.Tokenizer.from_str(text), length)
            mark = run_files.file_mark(text.encode())
            loaded.origin = run_files.noted_origin(pathlib.Path(path), mark)
            return loaded
        except OSError as error:
            raise UserError(f"the tokenizer {path!r} cannot be read: {error.strerror}") from error
        except UserError:
            raise
        except Exception as error:  # `tokenizers` raises plain Exception
            raise UserError(
                f"the tokenizer {path!r} is damaged ({error}): restore it, or delete it to train it"
                " again"
            ) from error


def train_tokenizer(
    captions: Iterable[str | bytes], vocabulary_size: int, length: int
) -> Tokenizer:
    """Trains a byte-pair encoding of lower-cased text. All bytes are in the vocabulary, so every
    text can be encoded.

    Args:
        captions: of the source; the same captions give the same tokenizer, in any order.
        vocabulary_size: largest number of ids, at least 259 (256 bytes, padding, start, end).
        length: ids to which a caption is padded or cut.

    Returns:
        The tokenizer; id 0 is padding, 1 the start, 2 the end.

    Raises:
        UserError: no caption has text, or the size is below 259.

    >>> train_tokenizer(["a cat", "a dog"], 260, 77).vocabulary
    260
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if vocabulary_size < len(alphabet) + len(_TRAINED):
        raise UserError(
            f"data.vocabulary_size={vocabulary_size} is too small: 256 bytes, padding, start and"
            " end need at least 259"
        )
    texts = collections.Counter(
        filter(None, (_plain(clean_caption(caption)) for caption in captions))
    )
    if not texts:
        raise UserError(
            "data.tokenizer='train' needs captions, and none has text: set data.captions='no', or"
            " data.tokenizer='clip'"
        )
    core = tokenizers.Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        min_frequency=2,
        special_tokens=list(_TRAINED),
        initial_alphabet=alphabet,
        show_progress=progress.shows_progress(),
    )
    core.train_from_iterator((text for text in sorted(texts) for _ in range(texts[text])), trainer)
    return Tokenizer(core, length)


def _plain(text: str | None) -> str:
    """Lower-cases a text and removes the spellings of special tokens."""
    text, previous = (text or "").lower(), ""
    while text != previous:  # removing one spelling may create another
        previous, text = text, _LITERALS.sub(" ", text)
    return " ".join(text.split())


def clip_tokenizer(path: str = "", length: int = 77) -> Tokenizer:
    """Returns CLIP's byte-pair encoding, with the same ids as OpenAI's tokenizer. The end token is
    kept when a caption is cut.

    Order of the vocabulary: 256 byte characters, the same at the end of a word, the merges of the
    file, start (49406), end (49407).

    Args:
        path: of bpe_simple_vocab_16e6.txt.gz; "" for that of an installed package (open_clip,
            clip).
        length: ids to which a caption is padded or cut.

    Returns:
        The tokenizer, with 49,408 ids.

    Raises:
        UserError: the file is missing or has another format; the message gives the command that
            downloads it.

    >>> clip_tokenizer("/no/such/file")
    Traceback (most recent call last):
    m3i_jax.errors.UserError: CLIP's vocabulary '/no/such/file' cannot be read (No such file ...
    """
    path = os.path.expanduser(path) or _find_installed()
    merges = _read_merges(path)
    characters = list(_byte_characters())
    tokens = (
        characters
        + [c + "</w>" for c in characters]
        + ["".join(pair) for pair in merges]
        + list(_CLIP)
    )
    vocabulary = {token: i for i, token in enumerate(tokens)}
    if problem := _inconsistent(merges, tokens[:512]):
        raise UserError(
            f"{path!r} is not CLIP's vocabulary {VOCABULARY} ({problem}): fetch it with `{FETCH}`"
        )
    bpe = models.BPE(vocab=vocabulary, merges=merges, end_of_word_suffix="</w>")
    core = tokenizers.Tokenizer(bpe)
    words = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(words), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.Sequence([decoders.Replace("</w>", " "), decoders.ByteLevel()])
    return Tokenizer(core, length)


def _inconsistent(merges: Sequence[tuple[str, str]], tokens: Iterable[str]) -> str:
    """Checks that each merge joins two known tokens to a new one; returns the problem, or "".

    >>> _inconsistent([("a", "b"), ("ab", "c")], "abc")
    ''
    >>> _inconsistent([("a", "bc"), ("b", "c")], "abc")
    "pair 1, 'a' and 'bc', has a part that no earlier pair makes"
    """
    known = set(tokens)
    for number, (left, right) in enumerate(merges, 1):
        if left not in known or right not in known:
            return f"pair {number}, {left!r} and {right!r}, has a part that no earlier pair makes"
        if left + right in known:
            return f"pair {number}, {left!r} and {right!r}, makes a token that already exists"
        known.add(left + right)
    return ""


def _byte_characters() -> Iterable[str]:
    """Yields GPT-2's printable characters for the 256 bytes, in CLIP's order: printable bytes
    first."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    yield from map(chr, printable)
    yield from (chr(256 + n) for n in range(256 - len(printable)))


def _read_merges(path: str) -> list[tuple[str, str]]:
    """Reads the merges of the vocabulary file: its first line is a header, and CLIP uses the next
    48,894. The unpacked size is limited, since a file of a few bytes may unpack to gigabytes."""
    try:
        if os.path.exists(path) and not os.path.isfile(path):  # to open a pipe would wait for ever
            raise ValueError("it is not a regular file")
        with gzip.open(path, "rb") as file:
            content = file.read(_UNPACKED_LIMIT + 1)
        if len(content) > _UNPACKED_LIMIT:
            raise ValueError(f"it unpacks to more than {_UNPACKED_LIMIT >> 20} MiB")
        lines = content.decode("utf-8").split("\n")[1 : _MERGES + 1]
        pairs = [tuple(line.split()) for line in lines if line]
        if any(len(pair) != 2 or max(map(len, pair)) > _TOKEN_LIMIT for pair in pairs):
            raise ValueError("a line is not a pair of tokens")
        if len(pairs) < _MERGES or len(set(pairs)) < len(pairs):
            raise ValueError(
                f"it has {len(set(pairs)):,} pairs of tokens, and CLIP's has {_MERGES:,}"
            )
    except OSError as error:
        raise UserError(
            f"CLIP's vocabulary {path!r} cannot be read ({error.strerror or error}): fetch it with"
            f" `{FETCH}`"
        ) from error
    except (ValueError, EOFError, zlib.error) as error:
        raise UserError(
            f"{path!r} is not CLIP's vocabulary {VOCABULARY} ({error}): fetch it with `{FETCH}`"
        ) from error
    return pairs  # type: ignore[return-value]


def _find_installed() -> str:
    """Finds the vocabulary in an installed package, without importing it, since it may need
    torch."""
    for package in _PACKAGES:
        spec = importlib.util.find_spec(package)
        for folder in (spec.submodule_search_locations or []) if spec else []:
            if os.path.isfile(path := os.path.join(folder, VOCABULARY)):
                return path
    raise UserError(
        f"data.tokenizer='clip' needs {VOCABULARY}, and no installed package contains it: run"
        f" `{FETCH}`, then set data.vocabulary to the file"
    )


def open_tokenizer(
    data: schema.Data,
    source: base.DataSource,
    saved: str = "",
    *,
    fixed: bool = False,
    start: Tokenizer | None = None,
) -> Tokenizer:
    """Loads the saved tokenizer of a run, or makes the one of the configuration and saves it, also
    in place of a saved one that was made from other settings or captions.

    Args:
        data: `tokenizer`, `vocabulary`, `vocabulary_size`, `caption_length`.
        source: of the captions for training.
        saved: path of the saved tokenizer; "" to save none.
        fixed: whether checkpoints or other hosts already use the saved one. Other captions do not
            matter then: a run is evaluated on other data, too.
        start: of the run whose text weights this one starts from; it is taken and none is trained.

    Returns:
        The tokenizer.

    Raises:
        UserError: the saved one is fixed, and was made from other settings; see also
            `train_tokenizer` and `clip_tokenizer`.

    >>> source = [base.Record("0", b"", caption="a red cat")]
    >>> open_tokenizer(schema.Data(caption_length=5), source).encode("cat")[0].shape
    (5,)
    """
    taken = base.stable_digest(start.core.to_str()) if start else ""
    if saved and os.path.exists(saved):
        opened = Tokenizer.load(saved, data.caption_length)
        if not (other := _other_origin(opened.origin, data, source, fixed, taken)):
            return opened
        if fixed:
            raise UserError(
                f"{saved}: was made from {other}, and the run in this directory uses it: restore"
                " the setting, or choose another --workdir"
            )
        _log.warning("%s: was made from %s: it is made again", saved, other)
    if start:
        tokenizer = Tokenizer(start.core, data.caption_length)
    elif data.tokenizer == "clip":
        tokenizer = clip_tokenizer(data.vocabulary, data.caption_length)
    else:
        captions = iter(
            sample_captions(source, missing=data.missing) if data.captions != "no" else ()
        )
        if data.regions:
            captions = itertools.chain(captions, region_corpus(source.classes))
        tokenizer = train_tokenizer(
            progress.track_progress(captions, "reading captions", unit="captions"),
            data.vocabulary_size,
            data.caption_length,
        )
    if saved:
        tokenizer.origin = _origin(data, source) | ({TAKEN: taken} if taken else {})
        tokenizer.save(saved)
    return tokenizer


def _origin(data: schema.Data, source: base.DataSource) -> dict[str, Any]:
    """What decides the tokenizer of a configuration: settings, the kind first, and digests."""
    if data.tokenizer == "clip":
        merges = _read_merges(os.path.expanduser(data.vocabulary) or _find_installed())
        digest = base.stable_digest("\n".join(map(" ".join, merges)))
        return {"data.tokenizer": data.tokenizer, "data.vocabulary": digest}
    named = source.classes if data.regions else ()
    captions = base.stable_digest(source.fingerprint(), data.captions != "no", *named)
    sizes = {"data.vocabulary_size": data.vocabulary_size}
    return {"data.tokenizer": data.tokenizer, **sizes, _CAPTIONS: captions}


def _other_origin(
    was: dict[str, Any], data: schema.Data, source: base.DataSource, fixed: bool, taken: str
) -> str:
    """How a saved tokenizer differs in origin from that of a configuration; "" if it does not, as
    far as it is known."""
    if not was:  # of an older version
        return ""
    if (kind := was.get("data.tokenizer")) != data.tokenizer:
        return f"data.tokenizer={kind!r}, not {data.tokenizer!r}"
    try:
        now = _origin(data, source)
    except UserError:  # the vocabulary is not on this machine, and the saved one needs it no more
        if fixed:
            return ""
        raise
    for name, value in now.items():
        if was.get(name) == value or (fixed and name == _CAPTIONS):
            continue
        digests = {_CAPTIONS: "other captions", "data.vocabulary": "another data.vocabulary"}
        return digests.get(name, f"{name}={was.get(name)!r}, not {value!r}")
    if not fixed and was.get(TAKEN, "") != taken:
        return "another init_from, or none"
    return ""


def fetch_vocabulary(folder: str) -> str:
    """Downloads the wheel of `open_clip_torch` with pip and extracts CLIP's vocabulary, without
    installing or running anything of it.

    Args:
        folder: of the vocabulary; created if it is missing.

    Returns:
        The path of the file.

    Raises:
        UserError: pip cannot download the wheel, or the file in it is another one.
    """
    with tempfile.TemporaryDirectory() as temporary:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--only-binary=:all:", "--dest", temporary]
        done = subprocess.run(
            [*command, "open_clip_torch"], capture_output=True, text=True, check=False
        )
        wheels = [name for name in os.listdir(temporary) if name.endswith(".whl")]
        if done.returncode or not wheels:
            last = (done.stderr.strip().splitlines() or ["no wheel was downloaded"])[-1]
            raise UserError(
                f"pip could not download open_clip_torch ({last}): connect to a network, or copy"
                f" {VOCABULARY} from another machine"
            )
        with zipfile.ZipFile(os.path.join(temporary, wheels[0])) as wheel:
            content = wheel.read(f"open_clip/{VOCABULARY}")
    return save_tokenizer(content, folder)


def save_tokenizer(content: bytes, folder: str) -> str:
    """Writes CLIP's vocabulary to a folder after checking its SHA-256."""
    if hashlib.sha256(content).hexdigest() != SHA256:
        raise UserError(
            f"the downloaded {VOCABULARY} is not CLIP's (its SHA-256 is not {SHA256}): nothing was"
            " written"
        )
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, VOCABULARY)
    base.write_atomic(path, content)
    return path


def main(arguments: Sequence[str]) -> int:
    if len(arguments) != 1 or arguments[0].startswith("-"):
        print(f"usage: {FETCH}  (fetches CLIP's vocabulary, 1.4 MB, into FOLDER)", file=sys.stderr)
        return 2
    try:
        path = fetch_vocabulary(arguments[0])
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{path}\nuse it with --config.data.tokenizer=clip --config.data.vocabulary={path}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
