"""Laws of names and words: one public name has one meaning, and words that the field's terms
replaced do not come back (m3i_jax/README.md has the glossary). Each checker is first tried on a
small offender, then run over the package."""

import ast
import io
import pathlib
import re
import tokenize
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping

import pytest

ROOT = pathlib.Path(__file__).parent.parent
# Names that several modules define because their callers handle the modules alike: the protocol of
# each, and the modules that may define it. Any other public name is defined once in the package.
PROTOCOLS: dict[str, tuple[str, tuple[str, ...]]] = {
    "init": ("init(model, rng, ...) -> parameters of one network", ("models/",)),
    "apply": ("apply(model, params, inputs, ...) -> outputs of one network", ("models/",)),
    "losses": ("losses(settings, params, maps, ...) of one detection head", ("models/dense/",)),
    "detect": ("detect(settings, params, maps, sizes) of one detection head", ("models/dense/",)),
    "fits": ("whether the arrays of a Pallas kernel fit the fast memory", ("models/",)),
    "forward": ("one implementation of an operator, without gradient", ("models/",)),
    "backward": ("the gradients of that implementation", ("models/",)),
    **{
        name: (f"{name}(path, ...) of one format of converted data", ("data/sources/",))
        for name in ("write_shard", "shard_length", "check_shard", "write_shard_index")
    },
    "measure": ("measure(...) -> Metric of one evaluator", ("evaluation/",)),
    "run": ("run(config, ...) -> exit code of one mode", ("modes/",)),
    "main": ("a command line, `python -m MODULE`", ("main.py", "data/tokenizer.py")),
}
# As names: identifiers that package code defines, without leading underscores, and file names.
RETIRED_NAMES = {
    *("apart", "drawn", "easel", "leaks", "loans", "looked", "maker", "spoken", "tally", "told"),
    *("Answers", "Easel", "Given", "Goal", "Maker", "Outside", "Seen", "Spoken", "Told"),
    *("mine", "picture", "pictures", "whom"),
}
# As prose: comments, docstrings, log lines and error messages.
RETIRED_WORDS = ("told", "whom", "nobody", "likewise", "thereby", "picture", "pictures")
# A directory of a run, whose name old runs have, and a word of their data.txt.
KEPT_WORDS = re.compile(r"\bpictures(/|, fingerprint)")
# Captions are data, which stay as they were.
CAPTIONS = {"m3i_jax/data/sources/shapes.py": re.compile(r"\ba picture of\b")}


def definitions(source: str) -> Iterator[tuple[int, str]]:
    """(line, name) of everything that a source names itself: functions, classes, arguments,
    aliases, and variables and attributes that it assigns to."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.lineno, node.name
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.attr
        elif isinstance(node, ast.alias) and node.asname:
            yield node.lineno, node.asname


def prose(source: str) -> Iterator[tuple[int, str]]:
    """(line, text) of comments and of strings of more than one word, without doctest code. Strings
    of one word are keys and paths."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            if " " not in node.value.strip():
                continue
            for offset, line in enumerate(node.value.splitlines()):
                if not line.lstrip().startswith((">>>", "...")):
                    yield node.lineno + offset, line
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string


def retired_names(source: str, name: str) -> list[str]:
    """Complaints about retired names that a file has or defines."""
    stem = pathlib.PurePosixPath(name).stem
    if stem not in RETIRED_NAMES and not any(word in source for word in RETIRED_NAMES):
        return []
    found = {(1, stem)} if stem in RETIRED_NAMES else set()
    found |= {(n, word) for n, word in definitions(source) if word.strip("_") in RETIRED_NAMES}
    return [f"{name}:{line}: the name '{word}' is retired" for line, word in sorted(found)]


def markdown_prose(source: str) -> Iterator[tuple[int, str]]:
    """(line, text) of a Markdown file without fenced blocks and code."""
    fenced = False
    for number, line in enumerate(source.splitlines(), 1):
        if line.startswith("```"):
            fenced = not fenced
        elif not fenced:
            yield number, re.sub(r"`[^`]*`", "", line)


def retired_words(source: str, name: str) -> list[str]:
    """Complaints about retired words in the prose of a file. Parts of paths, dotted names, quoted
    keys and hyphenated words do not count."""
    pattern = re.compile(rf"(?<![\w./'\"-])({'|'.join(RETIRED_WORDS)})(?![\w/'\"-])", re.IGNORECASE)
    if not re.search("|".join(RETIRED_WORDS), source, re.IGNORECASE):
        return []
    lines = markdown_prose(source) if name.endswith(".md") else prose(source)
    kept = [KEPT_WORDS, *([CAPTIONS[name]] if name in CAPTIONS else [])]
    complaints = []
    for line, text in sorted(lines):
        for phrase in kept:
            text = phrase.sub("", text)
        complaints += [
            f"{name}:{line}: the word '{word}' is retired: {text.strip()[:60]}"
            for word in pattern.findall(text)
        ]
    return complaints


def ambiguous_names(sources: Mapping[str, str]) -> list[str]:
    """Complaints about public functions and classes that several modules of {file: source} define,
    and about names of a protocol outside the modules that follow it."""
    homes: dict[str, list[str]] = defaultdict(list)
    for name, source in sources.items():
        for node in ast.parse(source).body:
            if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.name.startswith("_"):
                continue
            allowed = PROTOCOLS.get(node.name, ("", ()))[1]
            if not name.removeprefix("m3i_jax/").startswith(allowed):
                homes[node.name].append(name)
    return [
        f"'{defined}' is defined by {' and '.join(names)}: give each its own name"
        for defined, names in sorted(homes.items())
        if len(names) > 1 or defined in PROTOCOLS
    ]


def sources(*folders: str, pattern: str = "*.py") -> dict[str, str]:
    """{path below the root: text} of every file of some folders whose name fits a pattern."""
    paths = sorted(path for folder in folders for path in (ROOT / folder).rglob(pattern))
    assert paths, f"no {pattern} in {', '.join(folders)}"
    return {path.relative_to(ROOT).as_posix(): path.read_text() for path in paths}


@pytest.mark.parametrize(
    ("name", "offending", "accepted"),
    [
        ("a.py", "class Seen: ...", "samples_seen = 1"),
        ("a.py", "def f(told): ...", "def f(message): ..."),
        ("a.py", "self._looked = 1", "x = module.looked"),
        ("a.py", "from m3i_jax import b as loans", "import loans_of_others"),
        ("a.py", "for picture in images: ...", "for image in images: ..."),
    ],
)
def test_the_checker_of_retired_names(name: str, offending: str, accepted: str) -> None:
    assert retired_names(offending, name) and not retired_names(accepted, name)


def test_file_names_are_names() -> None:
    assert retired_names("", "m3i_jax/data/loans.py")
    assert not retired_names("", "m3i_jax/data/shared_buffers.py")


@pytest.mark.parametrize(
    ("offending", "accepted"),
    [
        ("# it is told and retried", "# it is logged and retried"),
        ("raise E('Nobody came')", "raise E('no host came')"),
        ('"""A picture of it."""', '"""Figures are in WORKDIR/pictures/."""'),
        ('f"{x}: one picture"', 'path / "pictures"'),
        ("def f():\n    '''Told twice.\n    '''", "def f():\n    '''As\n    >>> told = 1\n    '''"),
    ],
)
def test_the_checker_of_retired_words(offending: str, accepted: str) -> None:
    assert retired_words(offending, "a.py") and not retired_words(accepted, "a.py")


def test_the_checker_of_ambiguous_names() -> None:
    once = {"m3i_jax/a.py": "def f(): ...", "m3i_jax/b.py": "def _f(): ...\nclass G: ..."}
    assert not ambiguous_names(once)
    assert ambiguous_names(once | {"m3i_jax/c.py": "class f: ..."})
    assert not ambiguous_names({f"m3i_jax/models/{x}.py": "def init(): ..." for x in "ab"})
    assert ambiguous_names({"m3i_jax/data/a.py": "def init(): ..."})


@pytest.mark.smoke
def test_one_name_has_one_meaning() -> None:
    complaints = ambiguous_names(sources("m3i_jax"))
    assert not complaints, "\n".join(complaints)


@pytest.mark.smoke
@pytest.mark.parametrize("check", [retired_names, retired_words])
def test_no_retired_word_comes_back(check: Callable[[str, str], list[str]]) -> None:
    files = sources("m3i_jax", "configs").items()
    complaints = [complaint for name, text in files for complaint in check(text, name)]
    assert not complaints, "\n".join(complaints)


def test_no_retired_word_in_a_readme() -> None:
    texts = {"README.md": (ROOT / "README.md").read_text()}
    texts |= sources("configs", "launch", "m3i_jax", "tests", pattern="README.md")
    complaints = [
        complaint for name, text in texts.items() for complaint in retired_words(text, name)
    ]
    assert not complaints, "\n".join(complaints)
    assert retired_words("It is told.", "a.md") and not retired_words(
        "`told` and\n```\ntold\n```", "a.md"
    )


def test_the_files_that_the_readme_of_the_package_names_exist() -> None:
    text = (ROOT / "m3i_jax" / "README.md").read_text()
    named = set(re.findall(r"`((?:[a-z_0-9]+/)+[a-z_0-9]+\.py)`", text))
    paths = {
        ROOT / name if name.startswith("tests/") else ROOT / "m3i_jax" / name for name in named
    }
    assert len(paths) > 30
    assert not sorted(str(path) for path in paths if not path.exists())
