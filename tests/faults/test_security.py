"""Rows F1, F3 and F6: data, archives and configurations run no code and take no more memory than
their size."""

import io
import json
import os
import pathlib
import subprocess
import sys
import zipfile
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler

import numpy as np
import pytest

from m3i_jax import config as configuration
from m3i_jax import main as command
from m3i_jax import schema
from m3i_jax.data import tokenizer
from m3i_jax.data.sources import array_record, base, class_names
from m3i_jax.data.sources.folder import FolderSource
from m3i_jax.data.sources.tars import TarSource
from m3i_jax.errors import UserError
from m3i_jax.reporting import writers
from tests.faults.hostile import JPEG, PEAK, ROOT, read_all, tar


def pickled(canary: pathlib.Path) -> bytes:
    """A hand-written pickle that creates a file when it is loaded."""
    return f"cos\nmkdir\n(S'{canary}'\ntR.".encode()


def objects(canary: pathlib.Path, names: tuple[str, ...]) -> bytes:
    """An .npz with object arrays, which only a pickle can hold."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as packed:
        for name in names:
            header = b"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }".ljust(117) + b"\n"
            packed.writestr(
                f"{name}.npy",
                b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + pickled(canary),
            )
    return buffer.getvalue()


@pytest.mark.fast
@pytest.mark.row("F1")
def test_the_payload_itself_fires(tmp_path: pathlib.Path) -> None:
    """Without this, none of the tests below could fail."""
    ForkingPickler.loads(pickled(tmp_path / "fired"))
    assert (tmp_path / "fired").is_dir()
    # written so that the check of the source (tests/test_laws.py) accepts this line alone
    unsafe_load = {"allow_pickle": True}
    with np.load(io.BytesIO(objects(tmp_path / "again", ("x",))), **unsafe_load) as packed:
        _ = packed["x"]
    assert (tmp_path / "again").is_dir()


def in_a_member(ending: str) -> Callable[[pathlib.Path, bytes], None]:
    def place(folder: pathlib.Path, payload: bytes) -> None:
        read_all(
            TarSource(
                tar(
                    folder / "0.tar",
                    [("1.jpg", JPEG), (f"1.{ending}", payload), ("2.jpg", payload)],
                )
            )
        )

    return place


def in_a_picture(folder: pathlib.Path, payload: bytes) -> None:
    (folder / "1.jpg").write_bytes(payload)
    (folder / "1.txt").write_bytes(payload)
    read_all(FolderSource(str(folder)))


def in_the_tar_index(folder: pathlib.Path, payload: bytes) -> None:
    path, cache = tar(folder / "0.tar", [("1.jpg", JPEG)]), folder / "cache"
    TarSource(path, cache=str(cache))
    (index,) = cache.iterdir()
    with np.load(index) as saved:
        names = tuple(saved.files)
    index.write_bytes(objects(folder.parent / "fired", names))
    read_all(TarSource(path, cache=str(cache)))


def records_in(folder: pathlib.Path, image: bytes = JPEG) -> pathlib.Path:
    pytest.importorskip("array_record.python.array_record_module")
    array_record.write_shard(
        str(folder / "x-00000-of-00001.array_record"), [base.Record("1", image, 0, "a")]
    )
    array_record.write_shard_index(str(folder), classes=("a",))
    return folder


def in_the_columns(folder: pathlib.Path, payload: bytes) -> None:
    joined, columns = sorted(records_in(folder).glob("*.npz"))  # of all shards, and of one
    planted = objects(folder.parent / "fired", ("key", "label", "caption", "digest"))
    joined.write_bytes(planted)
    read_all(array_record.ArrayRecordSource(str(folder)))
    columns.write_bytes(planted)
    with pytest.raises(UserError, match="missing or damaged"):
        array_record.ArrayRecordSource(str(folder))


def in_the_index(folder: pathlib.Path, payload: bytes) -> None:
    (records_in(folder) / "dataset.json").write_bytes(payload)
    with pytest.raises(UserError, match="is damaged"):
        array_record.ArrayRecordSource(str(folder))


def in_a_record(folder: pathlib.Path, payload: bytes) -> None:
    read_all(array_record.ArrayRecordSource(str(records_in(folder, payload))))


def in_the_tokenizer(folder: pathlib.Path, payload: bytes) -> None:
    (folder / "tokenizer.json").write_bytes(payload)
    with pytest.raises(UserError, match="is damaged"):
        tokenizer.Tokenizer.load(str(folder / "tokenizer.json"), 16)


def in_the_names(folder: pathlib.Path, payload: bytes) -> None:
    for name in ("names.txt", "names.json"):
        (folder / name).write_bytes(payload)
        try:
            class_names.class_names_from_file(str(folder / name), ("0", "1"))
        except UserError:
            continue


def in_the_log(folder: pathlib.Path, payload: bytes) -> None:
    (folder / "metrics.jsonl").write_bytes(payload + b"\n")
    assert writers.truncate_log(folder / "metrics.jsonl", 5)
    configuration.config_difference(
        payload.decode("latin-1"), configuration.config_to_text(schema.Config())
    )


def in_an_override(folder: pathlib.Path, payload: bytes) -> None:
    for key in ("optim.lr", "data.crop_scale", "train.steps", "model.scan"):
        for text in (payload.decode(), f"__import__('os').mkdir({str(folder.parent / 'fired')!r})"):
            with pytest.raises(UserError):
                configuration.apply_overrides(configuration.default_config(), [f"{key}={text}"])


PLACES = {
    **{
        f"a member .{ending} of a tar": in_a_member(ending)
        for ending in ("pkl", "pyd", "json", "cls", "txt")
    },
    "an image": in_a_picture,
    "the index of tars": in_the_tar_index,
    "the columns of a shard": in_the_columns,
    "dataset.json": in_the_index,
    "a record": in_a_record,
    "tokenizer.json": in_the_tokenizer,
    "class names": in_the_names,
    "the log and the saved configuration": in_the_log,
    "an override": in_an_override,
}


@pytest.mark.fast
@pytest.mark.row("F1")
def test_no_pickle_is_loaded(trials, tmp_path: pathlib.Path) -> None:
    for number, (name, plant) in enumerate(PLACES.items()):
        folder = tmp_path / str(number) / "place"
        folder.mkdir(parents=True)
        plant(folder, pickled(folder.parent / "fired"))
        assert trials.add(not (folder.parent / "fired").exists()), name
    trials.figure = f"0 of {len(PLACES)} payloads fired"
    assert len(PLACES) >= 12


CODE = (
    "import pathlib\npathlib.Path({canary!r}).mkdir()\n"
    "from m3i_jax.config import default_config\n"
    "def get_config(path=''):\n    return default_config()\n"
)


def asked(canary: pathlib.Path, folder: pathlib.Path) -> dict[str, list[str]]:
    """Command lines that try to run code outside of the user's configuration."""
    code = CODE.format(canary=str(canary))
    (folder / "data" / "deep").mkdir(parents=True)
    for name in ("data/config.py", "data/deep/config.py", "evil.txt"):
        (folder / name).write_text(code)
    (folder / "evil.yaml").write_text(f"!!python/object/apply:os.mkdir ['{canary}']\n")
    (folder / "evil.json").write_text(json.dumps({"py/object": "os.mkdir", "args": [str(canary)]}))
    (folder / "data" / "1.jpg").write_bytes(JPEG)
    quick, there = ["--config", "configs/quickstart.py"], ["--config", "configs/folder.py"]
    return {
        "a URL": ["--config", "https://example.org/config.py"],
        "a file URL": ["--config", f"file://{folder}/data/config.py"],
        "YAML": ["--config", f"{folder}/evil.yaml"],
        "JSON": ["--config", f"{folder}/evil.json"],
        "another ending": ["--config", f"{folder}/evil.txt"],
        "a configuration in the data": ["--config", f"{folder}/data/config.py:path={folder}/data"],
        "one below the data": [
            "--config",
            f"{folder}/data/deep/config.py",
            f"--config.data.path={folder}/data",
        ],
        "one in a mixture": [
            "--config",
            f"{folder}/data/config.py",
            f"--config.data.mixture=folder:{folder}/data@x=3",
        ],
        "pipe:": [*there, f"--config.data.path=pipe:mkdir {canary}"],
        "pipe://": ["--config", "configs/tars.py", f"--config.data.path=pipe://mkdir {canary}"],
        "ssh://": [
            "--config",
            "configs/tars.py",
            f"--config.data.path=ssh://host/$(mkdir {canary})/*.tar",
        ],
        "a chain": [
            "--config",
            "configs/tars.py",
            f"--config.data.path=simplecache::file://{folder}/*.tar",
        ],
        "a shell": [*there, f"--config.data.path=$(mkdir {canary})"],
        "interpolation": [*there, "--config.data.path=${oc.env:HOME}"],
        "an expression": [*quick, f"--config.optim.lr=__import__('os').mkdir('{canary}')"],
        "an expression in a list": [
            *quick,
            f"--config.data.crop_scale=(__import__('os').mkdir('{canary}'), 1)",
        ],
        "a form": [*quick, f"--config.objective.forms=__import__('os').mkdir('{canary}')"],
        "names in YAML": [
            *there,
            f"--config.data.path={folder}/data",
            f"--config.data.class_names={folder}/evil.yaml",
        ],
        "a mode": [*quick, "--mode=../../evil"],
    }


@pytest.mark.fast
@pytest.mark.row("F3")
def test_only_the_configuration_of_the_user_is_run(
    trials, tmp_path: pathlib.Path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(ROOT)
    canary = tmp_path / "fired"
    lines = asked(canary, tmp_path)
    for name, arguments in lines.items():
        code = command.main([*arguments, "--workdir", str(tmp_path / "run")])
        out, err = capsys.readouterr()
        assert trials.add(
            code == 2
            and err.count("\n") == 1
            and "Traceback" not in err + out
            and not canary.exists()
        ), (name, code, err)
    trials.figure = f"0 of {len(lines)} payloads fired; with F1: 0 of {len(lines) + len(PLACES)}"
    assert len(lines) >= 15


@pytest.mark.fast
@pytest.mark.row("F3")
def test_a_configuration_outside_the_data_is_run(
    tmp_path: pathlib.Path, monkeypatch, capsys
) -> None:
    """The same file in a directory of the user: the tests above refuse the place."""
    (tmp_path / "data").mkdir()
    (tmp_path / "mine.py").write_text(CODE.format(canary=str(tmp_path / "ran")))
    code = command.main(
        [
            "--config",
            f"{tmp_path}/mine.py:path={tmp_path}/data",
            "--mode=show",
            "--config.data.source=folderr",
        ]
    )
    assert (
        code == 2
        and "did you mean folder?" in capsys.readouterr().err
        and (tmp_path / "ran").is_dir()
    )


BOMBS = (
    PEAK
    + """
import json, os, pathlib, sys, time
from m3i_jax.data import tokenizer
from m3i_jax.data.sources import array_record, base, class_names
from m3i_jax.data.sources.tars import TarSource
from m3i_jax.errors import UserError
import numpy as np

folder = pathlib.Path(sys.argv[1])

def refused(act):
    try:
        act()
    except UserError:
        return True
    return False

acts = {
    "nested": lambda: TarSource(str(folder / "nested.tar"))[0].label == -1,
    "huge": lambda: refused(lambda: array_record.ArrayRecordSource(str(folder / "huge"))),
    "names": lambda: refused(
        lambda: class_names.class_names_from_file(str(folder / "names.json"), ("0",))
    ),
    "tokenizer": lambda: refused(
        lambda: tokenizer.Tokenizer.load(str(folder / "tokenizer.json"), 9)
    ),
    "inflates": lambda: base.load_arrays(str(folder / "inflates.npz")) is None,
    "claims": lambda: base.load_arrays(str(folder / "claims.npz")) is None,
}
for name, act in acts.items():
    before, start = peak(), time.process_time()
    good = act()
    print(json.dumps([name, good, peak() - before, time.process_time() - start]))
"""
)


@pytest.mark.fast
@pytest.mark.row("F6")
def test_metadata_is_limited_before_it_is_parsed(trials, tmp_path: pathlib.Path) -> None:
    """Each in a process that reports its memory; the limit is that of the matrix."""
    pytest.importorskip("array_record.python.array_record_module")
    keys = json.dumps({str(i): i for i in range(1_000_000)})
    tar(
        tmp_path / "nested.tar",
        [("1.json", b"[" * (1 << 20)), ("1.jpg", JPEG), ("2.json", keys.encode()), ("2.jpg", JPEG)],
    )
    (tmp_path / "huge").mkdir()
    # 0.7 GB when it is parsed
    (tmp_path / "names.json").write_text("[" + "[]," * 12_000_000 + "[]]")
    for name in ("huge/dataset.json", "tokenizer.json"):
        (tmp_path / name).hardlink_to(tmp_path / "names.json")
    with zipfile.ZipFile(
        tmp_path / "inflates.npz", "w", zipfile.ZIP_DEFLATED, compresslevel=1
    ) as packed:
        header = (
            b"{'descr': '|u1', 'fortran_order': False, 'shape': (330000000,), }".ljust(117) + b"\n"
        )
        with packed.open("x.npy", "w") as member:
            member.write(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)
            for _ in range(330):
                member.write(bytes(1_000_000))
    with zipfile.ZipFile(tmp_path / "claims.npz", "w") as packed:
        header = (
            b"{'descr': '<f8', 'fortran_order': False, 'shape': (1000000000000000,), }".ljust(117)
            + b"\n"
        )
        packed.writestr(
            "x.npy", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + b"0"
        )
    done = subprocess.run(
        [sys.executable, "-c", BOMBS, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    results = [json.loads(line) for line in done.stdout.splitlines()]
    for name, good, grown, seconds in results:
        assert trials.add(good and grown < 300 * 1024), (name, good, grown, seconds)
    trials.figure = (
        f"most memory {max(grown for *_, grown, _ in results) / 1024:.0f} MB, longest"
        f" {max(s for *_, s in results):.1f} s of a core"
    )
    assert len(results) == 6
