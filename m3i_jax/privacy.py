"""Privacy of a run's output: no secrets in texts, no control characters on terminals, and files
that only their owner can read.

Secrets enter through paths (`s3://KEY:SECRET@bucket`, `https://host/x?X-Amz-Signature=...`), the
environment (`HF_TOKEN`) and messages of libraries. They would leave through the console, logs,
tracebacks and text files of a run. All of these pass `redact`: the console through `redact_logs`,
files through `reporting.atomic_write`.
"""

import contextlib
import itertools
import json
import logging
import os
import re
import sys
from collections.abc import Iterator, Mapping
from typing import Any

HIDDEN = "***"
LEAST = 8  # characters; shorter values of environment variables may be ordinary words
# Names of secrets. "token" matches, "tokenizer" and "tokens" do not.
_SECRET = (
    r"(?<![\w.-])[\w.-]{0,60}(?:token(?!i[sz]|s)|secret(?!ar)|passwo?r?d|pwd|api[_-]?key|access[_-]?key|private[_-]?key|credential|signature|"
    r"authorization)[\w.-]{0,60}"
)
_NAME = re.compile(
    r"TOKEN|SECRET|PASSW|PASSPHRASE|API_?KEY|ACCESS_?KEY|PRIVATE_?KEY|SIGNATURE|CREDENTIAL|AUTHORIZATION|SAS\b",
    re.IGNORECASE,
)
_RULES: list[tuple[re.Pattern[str], Any]] = [
    # user:password@ of a URL; a port is no password. A password may contain a slash, as S3's do.
    (re.compile(r"(://)[^/:@\s'\"<>]{0,200}:(?!\d+[/@])[^@\s'\"<>]{1,500}@"), rf"\1{HIDDEN}@"),
    (re.compile(r"((?:https?|ftp|git)://)[^/@\s'\"<>]{1,500}@"), rf"\1{HIDDEN}@"),
    # Every value of a URL's query: the name of the signature differs between stores.
    (
        re.compile(r"(://[^\s'\"<>?]{0,2000}\?)([^\s'\"<>]{0,200}=[^\s'\"<>]*)"),
        lambda m: m[1] + re.sub(r"=[^&;#]*", f"={HIDDEN}", m[2]),
    ),
    (
        re.compile(
            r"-----BEGIN [A-Z ]*PRIVATE KEY-----(?:[\w+/=\s\\]*-----END [A-Z ]*PRIVATE"
            r" KEY-----|[\w+/=\\]*)"
        ),
        HIDDEN,
    ),
    (
        re.compile(r"\b(bearer|basic)\s+(?=[\w+/=.~-]*\d)[\w+/=.~-]{16,}", re.IGNORECASE),
        rf"\1 {HIDDEN}",
    ),
    (
        re.compile(
            rf"({_SECRET}['\"]?\s*[=:]\s*['\"]?)(?!\*\*\*)[^\s'\",;&)\]}}]{{6,}}", re.IGNORECASE
        ),
        rf"\1{HIDDEN}",
    ),
    # Prefixes of keys by provider.
    (
        re.compile(
            r"\b(?:A[KS]IA[0-9A-Z]{16}|AIza[\w-]{35}|hf_[A-Za-z0-9]{20,}|gh[pousr]_[A-Za-z0-9]{30,}|github_pat_\w{30,})"
        ),
        HIDDEN,
    ),
    (
        re.compile(
            r"\b(?:glpat-[\w-]{20,}|xox[abprs]-[\w-]{10,}|sk-[\w-]{20,}|ya29\.[\w-]{20,}|eyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]+)"
        ),
        HIDDEN,
    ),
]
# Images of a page. Their text is random, so it may have the form of a key; a short one is no PNG.
_IMAGE = re.compile(r"(?<![\w:])data:image/[a-z]{3,4};base64,[A-Za-z0-9+/]{64,}={0,2}")
# Control characters and characters that change the direction of text, except tab and line ends.
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


def redact(text: str, *, environment: Mapping[str, str] | None = None) -> str:
    """Returns the text with every secret replaced by "***".

    Args:
      text: any; base64 text of its images (data:image/...) stays.
      environment: variables whose values are secret if their names say so; those of the process if
        not given.

    >>> text = "s3://AKID:p/w+d@bucket/x.tar, https://h/x?X-Amz-Signature=0a1b&part=2"
    >>> redact(text, environment={})
    's3://***@bucket/x.tar, https://h/x?X-Amz-Signature=***&part=***'
    >>> redact("no such model: hunter22-hunter22", environment={"HF_TOKEN": "hunter22-hunter22"})
    'no such model: ***'
    >>> redact("gs://bucket/part-?.tar on host:8080, 12 tokens: 300", environment={})
    'gs://bucket/part-?.tar on host:8080, 12 tokens: 300'
    """
    if images := _IMAGE.findall(text):  # what is around them is redacted as one text
        mark, number = f"\x00{os.urandom(8).hex()}-", itertools.count()
        rest = redact(
            _IMAGE.sub(lambda _: f"{mark}{next(number)}\x00", text), environment=environment
        )
        return re.sub(rf"{mark}(\d+)\x00", lambda match: images[int(match[1])], rest)
    for name, value in (os.environ if environment is None else environment).items():
        # A path is no secret.
        if (
            len(value) >= LEAST
            and value in text
            and _NAME.search(name)
            and not value.startswith(("/", "~", "."))
        ):
            text = text.replace(value, HIDDEN)
    for pattern, replacement in _RULES:
        text = pattern.sub(replacement, text)
    return text


def redact_tree(value: Any) -> Any:
    """`redact` applied to every text in nested lists, tuples and dictionaries, each by itself, keys
    of dictionaries included.

    >>> redact_tree({"path": "https://me:word-1@host/x", "caption/token": 9.2192, "sizes": [1, 2]})
    {'path': 'https://***@host/x', 'caption/token': 9.2192, 'sizes': [1, 2]}
    """
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, dict):
        return {redact_tree(k): redact_tree(v) for k, v in value.items()}
    return type(value)(map(redact_tree, value)) if isinstance(value, list | tuple) else value


def escape_control(text: str, *, line: bool = False) -> str:
    """Returns the text with control characters escaped, so that a terminal does not interpret them.
    `line`: line ends and tabs too.

    All text from data (names, captions, classes) passes this function before it is written to a
    page, a text file or the log.

    >>> escape_control("a\\x1b]0;title\\x07\\n"), escape_control("a\\nb", line=True)
    ('a\\\\x1b]0;title\\\\x07\\n', 'a\\\\nb')
    """
    out = _CONTROL.sub(_escape, text)
    return re.sub(r"[\r\n\t]", _escape, out) if line else out


def _escape(match: re.Match[str]) -> str:
    return match[0].encode("unicode_escape").decode("ascii")


def json_text(value: Any, *, indent: int | None = None) -> str:
    """Returns a value as JSON text; non-ASCII letters are kept, control characters written as
    `\\uXXXX`.

    >>> print(json_text({"猫": "a\\x1b[31m\\x9b"}))
    {"猫": "a\\u001b[31m\\u009b"}
    """
    return _CONTROL.sub(
        lambda m: f"\\u{ord(m[0]):04x}", json.dumps(value, indent=indent, ensure_ascii=False)
    )


_COLOUR = re.compile("\x1b\\[[0-9;]*m")
CLEAR = "\x1b[K"  # clears to the end of the line, for progress lines


def plain_text(text: str) -> str:
    """Returns the text for a console: without secrets and colours, and with control characters
    escaped, except CLEAR.

    >>> plain_text("\\x1b[31mred\\x1b[0m \\x1b[2J \\x1b[K")
    'red \\\\x1b[2J \\x1b[K'
    """
    return CLEAR.join(escape_control(_COLOUR.sub("", piece)) for piece in redact(text).split(CLEAR))


class _Stream:
    """A text stream that redacts its input; all other attributes are those of the wrapped stream.

    Where the program that reads a pipe has ended (`| head`), the rest is discarded, with one line
    on stderr: a run, and the files that it writes, do not depend on a reader of the console."""

    def __init__(self, stream: Any) -> None:
        self._stream, self._read = stream, True

    def write(self, text: str) -> int:
        with self._guarded():
            self._stream.write(plain_text(text))
        return len(text)

    def flush(self) -> None:
        with self._guarded():
            self._stream.flush()

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[None]:
        """Discard the stream if its reader has ended; put its name into any other OSError, as for
        any other file."""
        try:
            yield
        except BrokenPipeError:
            self._discard()
        except OSError as error:
            error.filename = error.filename or getattr(self._stream, "name", None)
            raise

    def _discard(self) -> None:
        # without its descriptor, what is buffered would fail again when Python ends
        with (
            contextlib.suppress(OSError, ValueError, AttributeError),
            open(os.devnull, "wb") as devnull,
        ):
            os.dup2(devnull.fileno(), self._stream.fileno())
        first, self._read = self._read, False
        if first and sys.stderr not in (None, self):
            name = getattr(self._stream, "name", "the output")
            print(
                f"m3i_jax: {name}: the program that reads it has ended; nothing more is printed",
                file=sys.stderr,
                flush=True,
            )

    def writelines(self, lines: Any) -> None:
        for text in lines:
            self.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _redacting_factory(factory: Any) -> Any:
    """A factory of log records with redacted messages, for handlers that write to a stream of their
    own."""

    def make(*arguments: Any, **options: Any) -> logging.LogRecord:
        record = factory(*arguments, **options)
        # A message that cannot be formatted is reported by the handler.
        with contextlib.suppress(Exception):
            record.msg, record.args = plain_text(record.getMessage()), ()
        return record

    return make


@contextlib.contextmanager
def redact_logs(*, forever: bool = False) -> Iterator[None]:
    """Pass all printed text, log records and tracebacks through `plain_text`. `forever`: also after
    the block, for the traceback of an error that ends the process."""
    before, factory = (sys.stdout, sys.stderr), logging.getLogRecordFactory()
    sys.stdout, sys.stderr = (
        stream if stream is None or isinstance(stream, _Stream) else _Stream(stream)
        for stream in before
    )
    logging.setLogRecordFactory(_redacting_factory(factory))
    try:
        yield
    finally:
        if not forever:
            sys.stdout, sys.stderr = before
            logging.setLogRecordFactory(factory)


def guard_output() -> None:
    """`redact_logs` for the rest of this process; for workers, whose warnings reach the console of
    the trainer."""
    redact_logs(forever=True).__enter__()


@contextlib.contextmanager
def private_umask(private: bool) -> Iterator[None]:
    """Context manager: if `private`, files created in the block are accessible to their owner only
    (0600, directories 0700); otherwise the umask decides."""
    before = os.umask(0o077)
    os.umask(before | (0o077 if private else 0))
    try:
        yield
    finally:
        os.umask(before)
