"""Executes the notebooks of configs/notebooks, without Jupyter.

    python -m tests.notebooks           # runs all, each in an empty folder; fails if a cell fails
    python -m tests.notebooks --write   # and stores the outputs in the notebooks
    python -m tests.notebooks --owner NAME    # sets the account on GitHub in all of them

The project has no public address yet: badges and installations name github.com/OWNER until the
last command is run, which the check of a release asks for (.ci/release.py).

A notebook becomes one script: a line `!command` is run by bash, the value of a cell's last
expression is shown as PNG if it has one, otherwise as text. Nothing else of IPython is supported.
"""

import argparse
import ast
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from typing import Any

ROOT = pathlib.Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "configs" / "notebooks").glob("*.ipynb"))
CELL, PNG, TEXT = "\x1ecell ", "\x1epng ", "\x1etext"
SECONDS = 1800
PREAMBLE = f'''
import base64 as _base64, subprocess as _subprocess, sys as _sys

def _shell(command):
    _sys.stdout.flush()
    done = _subprocess.run(["bash", "-o", "pipefail", "-c", command], stderr=_subprocess.STDOUT)
    if done.returncode:
        raise SystemExit(f"{{command}}: status {{done.returncode}}")

def _show(value):
    if hasattr(value, "_repr_png_"):
        print("{PNG!s}" + _base64.b64encode(value._repr_png_()).decode())
    elif value is not None:
        print("{TEXT!s}")
        print(repr(value))
'''


def script(source: str) -> str:
    """A cell as plain Python."""
    joined = re.sub(r"\\\n\s*(?=.*)", " ", source) if "!" in source else source
    plain = re.sub(r"^(\s*)!(.*)$", lambda m: f"{m[1]}_shell({m[2]!r})", joined, flags=re.M)
    tree = ast.parse(plain)
    if tree.body and isinstance(tree.body[-1], ast.Expr) and not plain.rstrip().endswith(";"):
        last = tree.body[-1]
        if not ast.unparse(last).startswith(("_shell(", "print(")):
            lines = plain.splitlines()
            value = "\n".join(lines[last.lineno - 1 :])
            plain = "\n".join([*lines[: last.lineno - 1], f"_show({value})"])
    return plain + "\n"


def outputs(printed: str, count: int) -> list[dict[str, Any]]:
    """What a cell printed, as outputs of a notebook."""
    found: list[dict[str, Any]] = []
    parts = re.split(rf"({PNG}.*\n|{TEXT}\n)", printed)
    stream = parts[0]
    if stream.strip():
        found.append({"name": "stdout", "output_type": "stream", "text": lines_of(stream)})
    for mark, text in zip(parts[1::2], parts[2::2], strict=True):
        data: dict[str, Any] = {"text/plain": lines_of(text.rstrip("\n"))}
        if mark.startswith(PNG):
            data = {"image/png": mark.removeprefix(PNG).strip(), "text/plain": ["<image>"]}
        found.append(
            {
                "data": data,
                "execution_count": count,
                "metadata": {},
                "output_type": "execute_result",
            }
        )
    return found


def lines_of(text: str) -> list[str]:
    return text.splitlines(keepends=True)


def code_cells(notebook: dict[str, Any]) -> list[dict[str, Any]]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def execute(notebook: dict[str, Any], folder: pathlib.Path) -> list[list[dict[str, Any]]]:
    """The outputs of all code cells of a notebook that is run in a folder.

    Raises:
      RuntimeError: a cell fails; the text ends with what it printed.
    """
    parts = [PREAMBLE]
    for number, cell in enumerate(code_cells(notebook)):
        parts += [f'print("{CELL}{number}", flush=True)', script("".join(cell["source"]))]
    path = folder / "cells.py"
    path.write_text("\n".join(parts))
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    environment["PATH"] = f"{pathlib.Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        [sys.executable, str(path)],
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    printed = re.split(rf"^{CELL}\d+\n", done.stdout, flags=re.M)[1:]
    if done.returncode:
        raise RuntimeError(f"cell {len(printed)} failed:\n{done.stdout[-4000:]}")
    return [outputs(text, count) for count, text in enumerate(printed, 1)]


def with_owner(text: str, owner: str) -> str:
    """The text with the addresses of the project in the account of this name.

    >>> with_owner("x.com/github/OWNER/m3i_jax/blob git+https://github.com/OWNER/m3i_jax", "me")
    'x.com/github/me/m3i_jax/blob git+https://github.com/me/m3i_jax'
    """
    return re.sub(r"(/github(?:\.com)?/)[\w.-]+(?=/m3i_jax\b)", rf"\g<1>{owner}", text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--write", action="store_true", help="store the outputs")
    parser.add_argument("--owner", default="", help="the account on GitHub; runs nothing")
    parser.add_argument("names", nargs="*", help="names without .ipynb; none: all")
    flags = parser.parse_args()
    if flags.owner:
        if not re.fullmatch(r"[A-Za-z0-9-]+", flags.owner):
            parser.error(f"--owner {flags.owner}: is no account; give its name alone")
        for path in NOTEBOOKS:
            path.write_text(with_owner(path.read_text(), flags.owner))
        return 0
    for path in NOTEBOOKS:
        if flags.names and path.stem not in flags.names:
            continue
        notebook = json.loads(path.read_text())
        with tempfile.TemporaryDirectory() as folder:
            results = execute(notebook, pathlib.Path(folder))
        for count, (cell, result) in enumerate(zip(code_cells(notebook), results, strict=True), 1):
            cell["outputs"], cell["execution_count"] = result, count
        if flags.write:
            path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")
        print(f"{path.name}: {len(results)} cells")
    return 0


if __name__ == "__main__":
    sys.exit(main())
