"""What a run may show: texts without secrets, terminals that no file name can command, files that
only their owner reads.

Secrets come in through paths (`s3://KEY:SECRET@bucket`, `https://host/x?X-Amz-Signature=...`),
through the environment (`HF_TOKEN`) and through the messages of libraries. They go out through the
console, through logs and tracebacks, and through the texts beside a run. All of these pass
`redact`: the console through `redact_logs`, files through `reporting.files.write_text`."""

import contextlib
import json
import logging
import os
import re
import sys
from collections.abc import Iterator, Mapping
from typing import Any

HIDDEN = "***"
LEAST = 8  # characters; a shorter value of the environment would also hide words that are no secret
# The name of a secret, from its beginning on: anything that is called a token but no tokenizer, and
# no number of tokens.
_SECRET = (
    r"(?<![\w.-])[\w.-]{0,60}(?:token(?!i[sz]|s)|secret(?!ar)|passwo?r?d|pwd|api[_-]?key|access[_-]?key|private[_-]?key|credential|signature|"
    r"authorization)[\w.-]{0,60}"
)
_NAME = re.compile(
    r"TOKEN|SECRET|PASSW|PASSPHRASE|API_?KEY|ACCESS_?KEY|PRIVATE_?KEY|SIGNATURE|CREDENTIAL|AUTHORIZATION|SAS\b",
    re.IGNORECASE,
)
_RULES: list[tuple[re.Pattern[str], Any]] = [
    # user:password@ of a URL; a port is no password. The password may hold a slash, as S3's do.
    (re.compile(r"(://)[^/:@\s'\"<>]{0,200}:(?!\d+[/@])[^@\s'\"<>]{1,500}@"), rf"\1{HIDDEN}@"),
    (re.compile(r"((?:https?|ftp|git)://)[^/@\s'\"<>]{1,500}@"), rf"\1{HIDDEN}@"),
    # Every value of a URL's query: signatures have a name of their own at every store.
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
    # What providers begin their keys with.
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
# Control characters, and those that turn the direction of a line; not the tab and the ends of
# lines.
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


def redact(text: str, *, environment: Mapping[str, str] | None = None) -> str:
    """A text with "***" where it had a secret.

    Args:
      text: any.
      environment: variables whose values are secret if their names say so; those of the process if
        not given.

    >>> redact("s3://AKID:p/w+d@bucket/x.tar, https://h/x?X-Amz-Signature=0a1b&part=2", environment={})
    's3://***@bucket/x.tar, https://h/x?X-Amz-Signature=***&part=***'
    >>> redact("no such model: hunter22-hunter22", environment={"HF_TOKEN": "hunter22-hunter22"})
    'no such model: ***'
    >>> redact("gs://bucket/part-?.tar on host:8080, 12 tokens: 300", environment={})
    'gs://bucket/part-?.tar on host:8080, 12 tokens: 300'
    """
    for name, value in (os.environ if environment is None else environment).items():
        # a path is no secret
        if (
            len(value) >= LEAST
            and value in text
            and _NAME.search(name)
            and not value.startswith(("/", "~", "."))
        ):
            text = text.replace(value, HIDDEN)
    for rule, instead in _RULES:
        text = rule.sub(instead, text)
    return text


def redact_tree(value: Any) -> Any:
    """`redact` for every text in lists, tuples and dictionaries.

    >>> redact_tree({"path": "https://me:word-1@host/x", "sizes": [1, 2]})
    {'path': 'https://***@host/x', 'sizes': [1, 2]}
    """
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, dict):
        return {k: redact_tree(v) for k, v in value.items()}
    return type(value)(map(redact_tree, value)) if isinstance(value, list | tuple) else value


def escape_control(text: str, *, line: bool = False) -> str:
    """A text that no terminal obeys: control characters are spelt out. `line`: line ends and tabs
    as well.

    Whatever comes from data (names, captions, classes) passes here on its way to a page, a text
    file or a log line.

    >>> escape_control("a\\x1b]0;title\\x07\\n"), escape_control("a\\nb", line=True)
    ('a\\\\x1b]0;title\\\\x07\\n', 'a\\\\nb')
    """
    out = _CONTROL.sub(_spelt, text)
    return re.sub(r"[\r\n\t]", _spelt, out) if line else out


def _spelt(found: re.Match[str]) -> str:
    return found[0].encode("unicode_escape").decode("ascii")


def json_text(value: Any, *, indent: int | None = None) -> str:
    """A value as JSON that no terminal obeys: letters of every script stand as they are, control
    characters as `\\uXXXX`.

    >>> print(json_text({"猫": "a\\x1b[31m\\x9b"}))
    {"猫": "a\\u001b[31m\\u009b"}
    """
    return _CONTROL.sub(
        lambda m: f"\\u{ord(m[0]):04x}", json.dumps(value, indent=indent, ensure_ascii=False)
    )


_COLOUR = re.compile("\x1b\\[[0-9;]*m")
CLEAR = "\x1b[K"  # to the end of the line: progress of our own


def plain_text(text: str) -> str:
    """What a console shows of a text: without secrets and colours, control characters spelt out but
    for CLEAR.

    >>> plain_text("\\x1b[31mred\\x1b[0m \\x1b[2J \\x1b[K")
    'red \\\\x1b[2J \\x1b[K'
    """
    return CLEAR.join(escape_control(_COLOUR.sub("", piece)) for piece in redact(text).split(CLEAR))


class _Stream:
    """A stream of text that redacts what is written to it; everything else is the stream's own."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with self._named():
            self._stream.write(plain_text(text))
        return len(text)

    def flush(self) -> None:
        with self._named():
            self._stream.flush()

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        """An error of the system has the name of the stream, as it has that of any other file."""
        try:
            yield
        except OSError as error:
            error.filename = error.filename or getattr(self._stream, "name", None)
            raise

    def writelines(self, lines: Any) -> None:
        for text in lines:
            self.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _record(made: Any) -> Any:
    """A factory of log records whose messages are redacted, for handlers that hold a stream of
    their own."""

    def make(*arguments: Any, **options: Any) -> logging.LogRecord:
        record = made(*arguments, **options)
        # a message that cannot be made is its handler's to complain about
        with contextlib.suppress(Exception):
            record.msg, record.args = plain_text(record.getMessage()), ()
        return record

    return make


@contextlib.contextmanager
def redact_logs(*, forever: bool = False) -> Iterator[None]:
    """All that is printed, logged or told by a traceback passes `plain_text`. `forever`: also after
    the block, for the traceback of what ends the process."""
    before, made = (sys.stdout, sys.stderr), logging.getLogRecordFactory()
    sys.stdout, sys.stderr = (
        stream if stream is None or isinstance(stream, _Stream) else _Stream(stream)
        for stream in before
    )
    logging.setLogRecordFactory(_record(made))
    try:
        yield
    finally:
        if not forever:
            sys.stdout, sys.stderr = before
            logging.setLogRecordFactory(made)


def guard_output() -> None:
    """`redact_logs` for the rest of this process: of a worker, whose warnings go to the console of
    the trainer."""
    redact_logs(forever=True).__enter__()


@contextlib.contextmanager
def private_umask(private: bool) -> Iterator[None]:
    """Files made in the block belong to their owner alone (0600, directories 0700) if `private`;
    else the umask decides, as ever."""
    before = os.umask(0o077)
    os.umask(before | (0o077 if private else 0))
    try:
        yield
    finally:
        os.umask(before)
