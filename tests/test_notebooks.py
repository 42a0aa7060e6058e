"""The notebooks run from top to bottom, and hold the outputs of a run."""

import json
import pathlib
import re

import pytest

from tests import notebooks
from tests.notebooks import ROOT

FILES = pytest.mark.parametrize("path", notebooks.NOTEBOOKS, ids=lambda path: path.stem)


@FILES
def test_outputs_are_stored(path: pathlib.Path) -> None:
    text = path.read_text()
    notebook = json.loads(text)
    assert (notebook["nbformat"], len(text) < 1_000_000) == (4, True)
    cells = notebooks.code_cells(notebook)
    assert [cell["execution_count"] for cell in cells] == [*range(1, len(cells) + 1)]
    assert sum(bool(cell["outputs"]) for cell in cells) >= 3
    assert not re.search(r"/(tmp|root|home|work)/", text), "an absolute path of the machine"


@FILES
def test_a_badge_opens_it(path: pathlib.Path) -> None:
    first = "".join(json.loads(path.read_text())["cells"][0]["source"])
    place = path.relative_to(ROOT).as_posix()
    assert re.search(
        rf"\]\(https://colab\.research\.google\.com/github/[^/]+/m3i_jax/blob/main/{place}\)", first
    )


@FILES
def test_one_command_gives_all_addresses_an_owner(
    path: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy, plain = tmp_path / path.name, path.read_text()
    copy.write_text(plain)
    monkeypatch.setattr(notebooks, "NOTEBOOKS", [copy])
    for owner in ("some-one", "OWNER"):
        monkeypatch.setattr("sys.argv", ["notebooks", "--owner", owner])
        assert notebooks.main() == 0
        found = re.findall(r"github(?:\.com)?/([^/]+)/m3i_jax", copy.read_text())
        assert found == [owner] * 2
    assert copy.read_text() == notebooks.with_owner(plain, "OWNER")


@FILES
def test_links_lead_to_files(path: pathlib.Path) -> None:
    texts = ["".join(cell["source"]) for cell in json.loads(path.read_text())["cells"]]
    links = [link for text in texts for link in re.findall(r"\]\((\.\.[^)#]*)", text)]
    assert links and all((path.parent / link).exists() for link in links)


@pytest.mark.slow
@FILES
def test_all_cells_run(path: pathlib.Path, tmp_path: pathlib.Path) -> None:
    notebook = json.loads(path.read_text())
    found = notebooks.execute(notebook, tmp_path)
    stored = [cell["outputs"] for cell in notebooks.code_cells(notebook)]

    def kinds(cells: list[list[dict]]) -> list[list[list[str]]]:
        return [[sorted(output.get("data", ["stream"])) for output in cell] for cell in cells]

    assert kinds(found) == kinds(stored)


def test_a_cell_becomes_a_script(tmp_path: pathlib.Path) -> None:
    shell = ["!echo a \\\n", "    b\n", "x = 3\n", "x + 1"]
    cells = [shell, ["print(5)"], ["if x:\n", "    !echo c"]]
    notebook = {"cells": [{"cell_type": "code", "source": source} for source in cells]}
    first, second, third = notebooks.execute(notebook, tmp_path)
    assert [o["output_type"] for o in first] == ["stream", "execute_result"]
    assert (first[0]["text"], first[1]["data"]) == (["a b\n"], {"text/plain": ["4"]})
    assert (second[0]["text"], third[0]["text"]) == (["5\n"], ["c\n"])


def test_an_image_is_shown(tmp_path: pathlib.Path) -> None:
    source = ["from PIL import Image\n", "Image.new('RGB', (2, 2))"]
    notebook = {"cells": [{"cell_type": "code", "source": source}]}
    [[shown]] = notebooks.execute(notebook, tmp_path)
    assert shown["data"]["image/png"].startswith("iVBOR")


def test_a_failing_cell_fails(tmp_path: pathlib.Path) -> None:
    notebook = {"cells": [{"cell_type": "code", "source": ["!false | cat"]}]}
    with pytest.raises(RuntimeError, match="cell 1 failed"):
        notebooks.execute(notebook, tmp_path)
