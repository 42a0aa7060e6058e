"""Row F7: forbidden constructs in the source, from its syntax."""

import ast
import re

import pytest

from tests.faults.hostile import ROOT

ALLOWED = {
    ("launch/ray_train.py", "ctypes"),  # prctl: the program ends with its worker
    ("launch/ray_train.py", "subprocess.run"),
    ("m3i_jax/config/files.py", "exec_module"),
    ("m3i_jax/data/tokenizer.py", "subprocess.run"),
    ("m3i_jax/training/malloc.py", "ctypes"),
}


MODULES = {
    "pickle",
    "cPickle",
    "cloudpickle",
    "dill",
    "marshal",
    "shelve",
    "yaml",
    "joblib",
    "pty",
    "commands",
    "telnetlib",
    "ctypes",
}


CALLS = {
    "eval",
    "exec",
    "compile",
    "os.system",
    "os.popen",
    "os.startfile",
    "os.putenv",
    "tempfile.mktemp",
    "torch.load",
    "yaml.load",
    "yaml.unsafe_load",
    "yaml.full_load",
    "shutil.unpack_archive",
    "np.frombuffer_object",
    "asyncio.create_subprocess_shell",
    "exec_module",
    "load_module",
    "extractall",
    "load_state_dict_from_url",
}


def dotted(node: ast.expr) -> str:
    """The text of an expression. Names and attributes, which most are, in a tenth of the time of
    `ast.unparse`."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    first = node.id if isinstance(node, ast.Name) else ast.unparse(node)
    return ".".join([first, *reversed(parts)])


def unsafe(source: str, name: str) -> list[str]:
    """Complaints about a file: running text, unpickling, starting programs, unpacking archives, or
    opening a file to everybody."""
    out = []
    for node in ast.walk(ast.parse(source)):
        found: list[str] = []
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = (
                [a.name for a in node.names]
                if isinstance(node, ast.Import)
                else [node.module or ""]
            )
            found += [m for m in modules if m.split(".")[0] in MODULES]
            if isinstance(node, ast.ImportFrom):
                found += [
                    f"{node.module}.{a.name}"
                    for a in node.names
                    if f"{node.module}.{a.name}" in CALLS
                ]
        elif isinstance(node, ast.Call):
            called = dotted(node.func)
            keywords = {k.arg: k.value for k in node.keywords}
            if called in CALLS or called.split(".")[-1] in {
                "exec_module",
                "load_module",
                "extractall",
            }:
                found.append(called.split(".")[-1] if called.endswith("_module") else called)
            if called.split(".")[0] in ("subprocess", "pexpect") or called.startswith(
                ("os.exec", "os.spawn", "os.posix_spawn")
            ):
                found.append(called)
            for argument in ("shell", "allow_pickle", "trust_remote_code"):
                if argument in keywords and not (
                    isinstance(keywords[argument], ast.Constant) and not keywords[argument].value
                ):
                    found.append(f"{argument}=")
            if (
                called.split(".")[-1] == "load"
                and called.split(".")[0] in ("np", "numpy")
                and "allow_pickle" not in keywords
            ):
                found.append(f"{called} without allow_pickle=False")
            if called.split(".")[-1] in ("chmod", "fchmod", "mkdir", "makedirs"):
                modes = [
                    a
                    for a in [*node.args, *keywords.values()]
                    if isinstance(a, ast.Constant) and type(a.value) is int
                ]
                found += [
                    f"{called} for everybody"
                    for a in modes
                    if 0o100 < a.value <= 0o7777 and a.value & 0o002
                ]
        out += [f"{name}:{node.lineno}: {what}" for what in found if (name, what) not in ALLOWED]
    return out


@pytest.mark.fast
@pytest.mark.row("F7")
@pytest.mark.parametrize(
    ("bad", "good"),
    [
        ("eval('1')", "model.eval()"),
        ("exec(x)", "executor(x)"),
        ("import pickle", "import json"),
        ("from yaml import load", "import csv"),
        ("import os\nos.system('ls')", "import os\nos.getcwd()"),
        ("np.load(p)", "np.load(p, allow_pickle=False)"),
        ("np.load(p, allow_pickle=x)", "load(p)"),
        ("subprocess.run(['ls'])", "process.run(['ls'])"),
        ("f(shell=True)", "f(shell=False)"),
        ("torch.load(p)", "json.load(p)"),
        ("t.extractall()", "t.extractfile()"),
        ("spec.loader.exec_module(m)", "spec.loader.name"),
        ("os.chmod(p, 0o777)", "os.chmod(p, 0o600)"),
        ("os.execv(p, a)", "os.fsync(p)"),
        ("compile(a, b, 'exec')", "re.compile(a)"),
    ],
)
def test_the_reader_of_source_sees(bad: str, good: str) -> None:
    assert unsafe(bad, "a.py") and not unsafe(good, "a.py")


@pytest.mark.fast
@pytest.mark.row("F7")
def test_nothing_unsafe_is_in_the_source(trials) -> None:
    files = [
        path
        for folder in ("m3i_jax", "configs", "launch")
        for path in sorted((ROOT / folder).rglob("*.py"))
    ]
    assert len(files) > 100
    allowed = set()
    for path in files:
        name, source = path.relative_to(ROOT).as_posix(), path.read_text()
        complaints = unsafe(source, name)
        assert trials.add(not complaints), "\n".join(complaints)
        allowed |= {
            entry for entry in ALLOWED if entry[0] == name and entry[1].split(".")[-1] in source
        }
    assert allowed == ALLOWED, "the allow-list has an unused entry"
    for path in sorted((ROOT / "launch").glob("*.sh")):
        text = path.read_text()
        words = set(text.replace(";", " ; ").split())
        # the key that signs a package is fetched as its publisher says; no program is
        forbidden = {"eval", "777"} | ({"curl"} if path.name != "gcsfuse.sh" else set())
        run = re.search(r"\|\s*(sudo )?(ba)?sh\b", text)
        assert trials.add(not words & forbidden and not run), path
    trials.figure = (
        f"0 unsafe calls in {trials.trials} files outside an allow-list of {len(ALLOWED)}"
    )
