"""Every README is executed: all commands and all Python blocks of all README.md files, in the order
in which they appear, the root's first, in one scratch copy of the project.

What is run: blocks fenced as ```bash, as one script each (`bash -euo pipefail`), and blocks fenced
as ```python, as one program each. Both run from the root of the copy. Blocks fenced as text, json,
bibtex, yaml or toml are not run. Any other fence, or none, fails, so that no command hides in one.
A README uses only files that it makes itself or that ship with the project.

What is left out of a bash block: commands that install, and those that would run these tests (the
patterns of LEFT_OUT). Commands after && still run.

How training commands are shortened: a line with `m3i_jax.main` and `--config FILE`, or with
`launch/quickstart.sh`, gets the overrides TINY appended (two steps of a toy model), so it must not
depend on files that only the full size would make. A line without `--config FILE` takes the
settings of a run that an earlier line made.

The first block of the root's README starts Python, as a user's commands do. In all others,
`python -m m3i_jax.main` and a Python block are each a child of a process that has imported
everything (`fork_server.py`).

Data: `/data/images` stands for a folder of images (two classes, captions beside them) and
`/data/shards` for a folder of img2dataset tars `*.tar`. Use these paths in a README; they are
replaced by small data made here. `--topology=v5e:4x4` becomes `--topology=cpu:4`, since the
compiler for TPUs is not installed everywhere.

Marks: a comment on the last line before a block changes how it is run,
`<!-- test: DIRECTIVE; DIRECTIVE -->`:

    append ARGUMENTS   more overrides for the training commands of this block, after TINY
    as-is              none of TINY for this block
    exit STATUS        the block must end with this status, not 0
    slow               run by `-m slow` only; no other block may need its files
    skip REASON        not run; pytest shows the reason
"""

import dataclasses
import io
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator

import pytest

from m3i_jax import config as configuration
from tests import xla_flags
from tests.fork_server import ForkServer

ROOT = pathlib.Path(__file__).parent.parent
# The READMEs of the project, the root's first: folders that users do not get are not searched.
READMES = [
    ROOT / "README.md",
    *sorted(
        p
        for name in ("configs", "launch", "m3i_jax", "tests")
        for p in (ROOT / name).rglob("README.md")
    ),
]
NAMES = {path: path.relative_to(ROOT).as_posix() for path in READMES}
IN_ORDER = True  # of `--random`: a block uses what earlier ones made
COLUMNS = 100
LINES = 150  # of the root's README; everything else is in the README of its folder
RUN, QUIET = {"bash", "python"}, {"text", "json", "bibtex", "yaml", "toml"}
SECONDS = 300
LEFT_OUT = [
    r"(sudo )?apt(-get)? ",
    r"(\S*/)?(python[\d.]*|uv) -?m? ?(venv|pip install)\b",
    r"(\S*/)?pip[\d.]* install\b",
    r"(source|\.) \S+/activate\b",
    r"git clone\b",
    r"cd m3i[_-]jax$",
    r"(bash |\./)launch/test\.sh\b",
]
# fmt: off
TINY = [
    "train.steps=2", "train.batch_size=8", "train.microbatches=1", "train.log_every=1",
    "train.save_every=2", "optim.warmup_steps=1", "data.size=64", "data.holdout=0.25",
    "data.image_size=32", "data.augment.jitter_p=0", "data.caption_length=8",
    "data.vocabulary_size=300", "data.tokenizer=train", "model.dtype=float32",
    "model.encoder.patch_size=8", "model.encoder.width=16", "model.encoder.depth=1",
    "model.encoder.heads=2",
    "model.decoder.width=16", "model.decoder.depth=1", "model.decoder.heads=2",
    "model.pool.width=16", "model.pool.heads=2", "model.text.width=16", "model.text.depth=1",
    "model.text.heads=2", "model.text.embed=16", "evaluate.attention=false",
    "evaluate.confusion=false", "evaluate.examples=false", "evaluate.k=3", "evaluate.batch_size=8",
    "evaluate.train_limit=32", "evaluate.query_limit=16",
]
# fmt: on


@dataclasses.dataclass(frozen=True, kw_only=True)
class Block:
    file: str = "README.md"
    line: int
    language: str
    text: str
    append: str = ""
    as_is: bool = False
    status: int = 0
    slow: bool = False
    skip: str = ""


def directives(comment: str) -> dict[str, str | bool | int]:
    """The directives of a mark as fields of Block."""
    out: dict[str, str | bool | int] = {}
    for part in filter(None, (p.strip() for p in comment.split(";"))):
        word, _, rest = part.partition(" ")
        if word == "append" and rest:
            out["append"] = rest
        elif word == "as-is" and not rest:
            out["as_is"] = True
        elif word == "slow" and not rest:
            out["slow"] = True
        elif word == "exit" and rest.isdigit():
            out["status"] = int(rest)
        elif word == "skip" and rest:
            out["skip"] = rest
        else:
            raise ValueError(
                f"<!-- test: {part} -->: use append ARGUMENTS, as-is, exit STATUS, slow or skip"
                " REASON"
            )
    return out


def blocks(text: str, file: str = "README.md") -> list[Block]:
    """Every fenced block of a Markdown text; `file` is its path, for test ids and errors."""
    out, lines, before, start = [], text.splitlines(), "", 0
    fence, language, body = "", "", []
    for number, line in enumerate(lines, 1):
        if not fence and (opening := re.match(r"\s*(`{3,}|~{3,})\s*(\S*)", line)):
            fence, language, body, start = opening[1], opening[2], [], number
        elif fence and re.fullmatch(rf"\s*{fence[0]}{{{len(fence)},}}\s*", line):
            mark = re.fullmatch(r"\s*<!--\s*test:\s*(.*?)\s*-->\s*", before)
            out.append(
                Block(
                    file=file,
                    line=start,
                    language=language,
                    text="\n".join(body) + "\n",
                    **directives(mark[1] if mark else ""),
                )
            )
            fence = before = ""
        elif fence:
            body.append(line)
        elif line.strip():
            before = line
    if fence:
        raise ValueError(f"{file}:{start}: the fence is never closed")
    return out


def script(block: Block) -> tuple[str, int]:
    """The bash script of a block, and the number of README commands in it."""
    out, count = [], 0
    tiny = [] if block.as_is else [f"--config.{item}" for item in TINY]
    if tiny and block.file != "README.md":  # whose runs draw them
        tiny.append("--config.train.panel_every=0")
    overrides = " ".join((*tiny, *block.append.split()))
    for line in re.sub(r"\\\n\s*", "", block.text).splitlines():
        parts = line.strip().split(" && ")
        while parts and any(re.match(pattern, parts[0].strip()) for pattern in LEFT_OUT):
            line = " && ".join(parts := parts[1:])
        if not parts:
            continue
        command = line.strip()
        if command and not command.startswith("#"):
            count += 1
            small = re.search(r"m3i_jax\.main .*--config |launch/quickstart\.sh", command)
            if small and overrides:
                end = re.search(r"\s+(\||&|[12]?>|#\s)|;(?=\s)|\s*$", line)
                line = f"{line[: end.start()]} {overrides}{line[end.start() :]}"
        out.append(line)
    return "\n".join(out) + "\n", count


def images() -> Iterator[tuple[str, str, bytes]]:
    """(class, name, JPEG) of a few small images of two classes."""
    image_module = pytest.importorskip("PIL.Image")
    for index in range(32):
        jpeg, kind = io.BytesIO(), ("dark", "light")[index % 2]
        image_module.new("RGB", (48, 40), (60 + 120 * (index % 2), 7 * index, 90)).save(
            jpeg, "JPEG"
        )
        yield kind, f"{index:05d}", jpeg.getvalue()


@pytest.fixture(scope="session")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A clone of the project, with small data beside it."""
    home = tmp_path_factory.mktemp("readme")
    for name in ("m3i_jax", "configs", "launch"):
        shutil.copytree(
            ROOT / name, home / "clone" / name, ignore=shutil.ignore_patterns("__pycache__")
        )
    for name in ("setup.py", "requirements.txt", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, home / "clone" / name)
    (home / "shards").mkdir()
    with tarfile.open(home / "shards" / "00000.tar", "w") as tar:
        for kind, name, jpeg in images():
            folder = home / "images" / kind
            folder.mkdir(parents=True, exist_ok=True)
            caption = f"a {kind} picture"
            (folder / f"{name}.jpg").write_bytes(jpeg)
            (folder / f"{name}.txt").write_text(caption)
            label = json.dumps({"caption": caption, "label": int(kind == "light")})
            for ending, content in (
                ("jpg", jpeg),
                ("txt", caption.encode()),
                ("json", label.encode()),
            ):
                member = tarfile.TarInfo(f"{name}.{ending}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return home


def environment(home: pathlib.Path, *folders: pathlib.Path) -> dict[str, str]:
    """The variables of a block; its commands are looked for in some folders first."""
    # One device, as most users have; optimization off, since compilation takes most of the time.
    some = os.environ | {"XLA_FLAGS": xla_flags.FASTEST}
    some |= {
        "M3I_VENV": sys.prefix,
        "M3I_INSTALL": "0",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(home / "clone"),
    }
    paths = (*folders, pathlib.Path(sys.executable).parent, os.environ["PATH"])
    return some | {"PATH": os.pathsep.join(map(str, paths))}


@pytest.fixture(scope="session")
def forked(scratch: pathlib.Path) -> Iterator[pathlib.Path]:
    """A folder whose `python` runs commands in children of one process."""
    folder = scratch / "forked"
    folder.mkdir()
    server = ForkServer(folder, scratch / "clone", environment(scratch))
    yield folder
    server.close()


def execute(command: list[str], home: pathlib.Path, status: int, *folders: pathlib.Path) -> str:
    done = subprocess.run(
        command,
        cwd=home / "clone",
        env=environment(home, *folders),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert done.returncode == status, (
        f"status {done.returncode}, not {status}:\n{done.stdout[-6000:]}"
    )
    return done.stdout


def prepared(block: Block, home: pathlib.Path) -> list[str]:
    """The command that runs a block, with data and topology replaced."""
    text = script(block)[0] if block.language == "bash" else block.text
    for folder in ("images", "shards"):
        text = text.replace(f"/data/{folder}", str(home / folder))
    text = text.replace("--topology=v5e:4x4", "--topology=cpu:4")
    ending = "sh" if block.language == "bash" else "py"
    path = home / f"{block.file.replace('/', '_')}_{block.line}.{ending}"
    path.write_text(text)
    return (
        ["bash", "-euo", "pipefail", str(path)]
        if block.language == "bash"
        else ["python", str(path)]
    )


BLOCKS = [block for path, name in NAMES.items() for block in blocks(path.read_text(), name)]
FIRST = next(block for block in BLOCKS if block.language in RUN)  # of the root's README


def complaints(found: list[Block]) -> list[str]:
    """Reasons why READMEs with these blocks would not be tested by running them."""
    out = [
        f"{b.file}:{b.line}: a block fenced as '{b.language}': use one of {sorted(RUN | QUIET)}"
        for b in found
        if b.language not in RUN | QUIET
    ]
    commands = [b for b in found if b.language == "bash"]
    if not any(script(b)[1] for b in commands if not b.skip):
        out.append("no bash block with a command that can be run")
    if not any(b.language == "python" and not b.skip for b in found):
        out.append("no python block that can be run")
    for needed in ("bash launch/quickstart.sh", "bash launch/test.sh"):
        if not any(needed in b.text for b in commands):
            out.append(f"'{needed}' is in no bash block")
    return out


def test_all_blocks_are_run() -> None:
    assert not complaints([b for b in BLOCKS if b.file == "README.md"])
    assert not complaints(BLOCKS)
    assert {"configs/README.md", "launch/README.md", "m3i_jax/objective/README.md"} <= {
        b.file for b in BLOCKS if b.language in RUN
    }


def prose(text: str) -> str:
    """A Markdown text without its fenced blocks."""
    return re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("path", READMES, ids=NAMES.values())
def test_links_lead_to_files(path: pathlib.Path) -> None:
    text = prose(path.read_text())
    links = re.findall(r"\]\(([^)\s#]+)[^)]*\)", text) + re.findall(r"src=\"([^\"]+)\"", text)
    local = [link for link in links if not re.match(r"[a-z]+:", link)]
    missing = [link for link in local if not (path.parent / link).exists()]
    assert not missing


def test_every_readme_is_linked_from_the_root() -> None:
    text = prose(READMES[0].read_text())
    assert not [name for name in list(NAMES.values())[1:] if f"({name})" not in text]


@pytest.mark.parametrize("path", READMES, ids=NAMES.values())
def test_lines_fit(path: pathlib.Path) -> None:
    """At most COLUMNS columns, except in tables, which Markdown cannot wrap."""
    lines = enumerate(path.read_text().splitlines(), 1)
    assert not [n for n, line in lines if len(line) > COLUMNS and not line.startswith("|")]


def test_the_first_page_is_short() -> None:
    assert len(READMES[0].read_text().splitlines()) <= LINES


CASES = [
    pytest.param(
        b,
        id=f"{b.file.removesuffix('README.md')}line{b.line}-{b.language}",
        marks=[pytest.mark.slow] if b.slow else [],
    )
    for b in BLOCKS
    if b.language in RUN
]


@pytest.mark.parametrize("block", CASES)
def test_block(block: Block, scratch: pathlib.Path, request: pytest.FixtureRequest) -> None:
    if block.skip:
        pytest.skip(block.skip)
    if block.language == "bash" and not script(block)[1]:
        return  # installs only; `complaints` requires that other blocks are run
    folders = [] if block == FIRST else [request.getfixturevalue("forked")]
    execute(prepared(block, scratch), scratch, block.status, *folders)


@pytest.mark.slow
@pytest.mark.parametrize("block", [case for case in CASES if case.values[0].language == "python"])
def test_python_block_imports_what_it_uses(block: Block, scratch: pathlib.Path) -> None:
    """In a process of a reader: the fork server has imported the whole package before."""
    if block.skip:
        pytest.skip(block.skip)
    execute(prepared(block, scratch), scratch, block.status)


EXAMPLE = """
# Title
```bash
git clone https://example.org/m3i_jax && cd m3i_jax
bash launch/quickstart.sh     # a few minutes
bash launch/test.sh
python -m m3i_jax.main --config configs/folder.py:path=/data/images \\
    --workdir runs/mine | tail -n 3
```
<!-- test: append --config.seed=3; exit 2 -->

~~~python
print(1)
~~~
"""


def test_extraction() -> None:
    shell, program = blocks(EXAMPLE)
    assert (shell.file, shell.language, shell.line, shell.status) == ("README.md", "bash", 3, 0)
    assert (program.language, program.text, program.append, program.status) == (
        "python",
        "print(1)\n",
        "--config.seed=3",
        2,
    )
    text, count = script(shell)
    first, second = text.splitlines()
    assert count == 2
    assert first.startswith("bash launch/quickstart.sh --config.train.steps=2 ") and first.endswith(
        "     # a few minutes"
    )
    assert second.startswith(
        "python -m m3i_jax.main --config configs/folder.py:path=/data/images --workdir runs/mine"
        " --config.train."
    )
    assert second.endswith("=16 | tail -n 3")
    assert (
        script(dataclasses.replace(shell, as_is=True))[0].splitlines()[0]
        == "bash launch/quickstart.sh     # a few minutes"
    )
    assert (
        script(dataclasses.replace(shell, append="--config.seed=3"))[0]
        .splitlines()[0]
        .endswith("=16 --config.seed=3     # a few minutes")
    )
    assert script(Block(line=1, language="bash", text="python -m m3i_jax.main --help\n")) == (
        "python -m m3i_jax.main --help\n",
        1,
    )
    assert not complaints([shell, program])


@pytest.mark.parametrize(
    "line",
    [
        "python3 -m venv .venv",
        ". .venv/bin/activate",
        "pip install -e '.[test]'",
        "python -m pip install .",
    ],
)
def test_installation_is_left_out(line: str) -> None:
    assert script(Block(line=1, language="bash", text=line + "\n"))[1] == 0


def test_what_follows_an_installation_is_run() -> None:
    text = "git clone https://example.org/m3i_jax && cd m3i_jax && ls configs\n"
    assert script(Block(line=1, language="bash", text=text)) == ("ls configs\n", 1)


@pytest.mark.parametrize(
    "text",
    [
        "Only words.",
        "```bash\nbash launch/test.sh\n```",
        EXAMPLE.replace("~~~python", "~~~"),
        EXAMPLE.replace("```bash", "```console"),
        EXAMPLE.replace("```bash", "<!-- test: skip never -->\n```bash"),
        EXAMPLE.replace("launch/quickstart.sh", "launch/start.sh"),
    ],
)
def test_a_readme_that_runs_nothing_is_refused(text: str) -> None:
    assert complaints(blocks(text))


def test_unknown_marks_are_refused() -> None:
    with pytest.raises(ValueError, match="use append"):
        blocks("<!-- test: sometimes -->\n```bash\nls\n```\n")


def test_a_failing_block_fails(scratch: pathlib.Path) -> None:
    failing = Block(line=0, language="bash", text="false\ntrue\n")
    with pytest.raises(AssertionError, match="status 1, not 0"):
        execute(prepared(failing, scratch), scratch, failing.status)
    data = Block(line=0, language="bash", text="ls /data/images/dark /data/shards\n")
    assert {"00000.jpg", "00000.txt", "00000.tar"} <= set(
        execute(prepared(data, scratch), scratch, 0).split()
    )


def test_the_overrides_are_settings() -> None:
    config = configuration.default_config()
    configuration.apply_overrides(config, TINY)
    configuration.resolve(config)
