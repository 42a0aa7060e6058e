"""Rows F: what comes with data, a name or a configuration runs nothing, leads nowhere and shows nothing; what is written is its owner's."""

import ast
import html.parser
import io
import json
import logging
import os
import pathlib
import stat
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler

import numpy as np
import pytest

from m3i_jax import config as configuration
from m3i_jax import main as command
from m3i_jax import privacy, schema
from m3i_jax.data import array_records, class_names, records, remote, sources, tokenizer
from m3i_jax.data.folder import Folder
from m3i_jax.data.tars import Tars
from m3i_jax.errors import UserError
from m3i_jax.modes import data as data_mode
from m3i_jax.reporting import data_page, writers
from tests import broken
from tests.test_main import TINY

ROOT = pathlib.Path(__file__).parent.parent.parent
JPEG = broken.encode(broken.smooth(40, 48), "JPEG")


def pickled(canary: pathlib.Path) -> bytes:
    """A pickle, written by hand, that makes a file when it is loaded."""
    return f"cos\nmkdir\n(S'{canary}'\ntR.".encode()


def objects(canary: pathlib.Path, names: tuple[str, ...]) -> bytes:
    """An .npz whose arrays are "objects", which only a pickle can hold."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as packed:
        for name in names:
            header = b"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }".ljust(117) + b"\n"
            packed.writestr(f"{name}.npy", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + pickled(canary))
    return buffer.getvalue()


def tar(place: pathlib.Path, members: list[tuple[str, bytes]]) -> str:
    place.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(place, "w", format=tarfile.GNU_FORMAT) as out:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            out.addfile(member, io.BytesIO(content))
    return str(place)


def read_all(source: sources.Source) -> None:
    """Every record, as the pipeline looks at it."""
    for i in range(len(source)):
        record = source[i]
        records.clean_caption(record.caption)
        try:
            records.decode(record.image)
        except records.BadRecord:
            continue


@pytest.mark.fast
@pytest.mark.row("F1")
def test_the_payload_itself_fires(tmp_path: pathlib.Path) -> None:
    """Else none of the tests below could fail."""
    ForkingPickler.loads(pickled(tmp_path / "fired"))
    assert (tmp_path / "fired").is_dir()
    unsafe_load = {"allow_pickle": True}  # spelt so that the law against it, which is read from the source, keeps its eye on all else
    with np.load(io.BytesIO(objects(tmp_path / "again", ("x",))), **unsafe_load) as packed:
        _ = packed["x"]
    assert (tmp_path / "again").is_dir()


def in_a_member(ending: str) -> Callable[[pathlib.Path, bytes], None]:
    def place(folder: pathlib.Path, payload: bytes) -> None:
        read_all(Tars(tar(folder / "0.tar", [("1.jpg", JPEG), (f"1.{ending}", payload), ("2.jpg", payload)])))

    return place


def in_a_picture(folder: pathlib.Path, payload: bytes) -> None:
    (folder / "1.jpg").write_bytes(payload)
    (folder / "1.txt").write_bytes(payload)
    read_all(Folder(str(folder)))


def in_the_tar_index(folder: pathlib.Path, payload: bytes) -> None:
    path, cache = tar(folder / "0.tar", [("1.jpg", JPEG)]), folder / "cache"
    Tars(path, cache=str(cache))
    (index,) = cache.iterdir()
    with np.load(index) as saved:
        names = tuple(saved.files)
    index.write_bytes(objects(folder.parent / "fired", names))
    read_all(Tars(path, cache=str(cache)))


def records_in(folder: pathlib.Path, image: bytes = JPEG) -> pathlib.Path:
    pytest.importorskip("array_record.python.array_record_module")
    array_records.write_shard(str(folder / "x-00000-of-00001.array_record"), [sources.Record("1", image, 0, "a")])
    array_records.write_index(str(folder), classes=("a",))
    return folder


def in_the_columns(folder: pathlib.Path, payload: bytes) -> None:
    (columns,) = records_in(folder).glob("*.npz")
    columns.write_bytes(objects(folder.parent / "fired", ("key", "label", "caption", "digest")))
    with pytest.raises(UserError, match="missing or damaged"):
        array_records.ArrayRecords(str(folder))


def in_the_index(folder: pathlib.Path, payload: bytes) -> None:
    (records_in(folder) / "dataset.json").write_bytes(payload)
    with pytest.raises(UserError, match="is damaged"):
        array_records.ArrayRecords(str(folder))


def in_a_record(folder: pathlib.Path, payload: bytes) -> None:
    read_all(array_records.ArrayRecords(str(records_in(folder, payload))))


def in_the_tokenizer(folder: pathlib.Path, payload: bytes) -> None:
    (folder / "tokenizer.json").write_bytes(payload)
    with pytest.raises(UserError, match="is damaged"):
        tokenizer.Tokenizer.load(str(folder / "tokenizer.json"), 16)


def in_the_names(folder: pathlib.Path, payload: bytes) -> None:
    for name in ("names.txt", "names.json"):
        (folder / name).write_bytes(payload)
        try:
            class_names.from_file(str(folder / name), ("0", "1"))
        except UserError:
            continue


def in_the_log(folder: pathlib.Path, payload: bytes) -> None:
    (folder / "metrics.jsonl").write_bytes(payload + b"\n")
    assert writers.resume(folder / "metrics.jsonl", 5)
    configuration.difference(payload.decode("latin-1"), configuration.to_text(schema.Config()))


def in_an_override(folder: pathlib.Path, payload: bytes) -> None:
    for key in ("optim.lr", "data.crop_scale", "train.steps", "model.scan"):
        for text in (payload.decode(), f"__import__('os').mkdir({str(folder.parent / 'fired')!r})"):
            with pytest.raises(UserError):
                configuration.override(configuration.default(), [f"{key}={text}"])


PLACES = {
    **{f"a member .{ending} of a tar": in_a_member(ending) for ending in ("pkl", "pyd", "json", "cls", "txt")},
    "a picture": in_a_picture,
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
    "import pathlib\npathlib.Path({canary!r}).mkdir()\nfrom m3i_jax.config import default\ndef get_config(path=''):\n    return default()\n"
)


def asked(canary: pathlib.Path, folder: pathlib.Path) -> dict[str, list[str]]:
    """Command lines that want code to be run which is no configuration of the user's."""
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
        "one below the data": ["--config", f"{folder}/data/deep/config.py", f"--config.data.path={folder}/data"],
        "one in a mixture": ["--config", f"{folder}/data/config.py", f"--config.data.mixture=folder:{folder}/data@x=3"],
        "pipe:": [*there, f"--config.data.path=pipe:mkdir {canary}"],
        "pipe://": ["--config", "configs/tars.py", f"--config.data.path=pipe://mkdir {canary}"],
        "ssh://": ["--config", "configs/tars.py", f"--config.data.path=ssh://host/$(mkdir {canary})/*.tar"],
        "a chain": ["--config", "configs/tars.py", f"--config.data.path=simplecache::file://{folder}/*.tar"],
        "a shell": [*there, f"--config.data.path=$(mkdir {canary})"],
        "interpolation": [*there, "--config.data.path=${oc.env:HOME}"],
        "an expression": [*quick, f"--config.optim.lr=__import__('os').mkdir('{canary}')"],
        "an expression in a list": [*quick, f"--config.data.crop_scale=(__import__('os').mkdir('{canary}'), 1)"],
        "a form": [*quick, f"--config.objective.forms=__import__('os').mkdir('{canary}')"],
        "names in YAML": [*there, f"--config.data.path={folder}/data", f"--config.data.class_names={folder}/evil.yaml"],
        "a mode": [*quick, "--mode=../../evil"],
    }


@pytest.mark.fast
@pytest.mark.row("F3")
def test_only_the_configuration_of_the_user_is_run(trials, tmp_path: pathlib.Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(ROOT)
    canary = tmp_path / "fired"
    lines = asked(canary, tmp_path)
    for name, arguments in lines.items():
        code = command.main([*arguments, "--workdir", str(tmp_path / "run")])
        out, err = capsys.readouterr()
        assert trials.add(code == 2 and err.count("\n") == 1 and "Traceback" not in err + out and not canary.exists()), (name, code, err)
    trials.figure = f"0 of {len(lines)} payloads fired; with F1: 0 of {len(lines) + len(PLACES)}"
    assert len(lines) >= 15


@pytest.mark.fast
@pytest.mark.row("F3")
def test_a_configuration_outside_the_data_is_run(tmp_path: pathlib.Path, monkeypatch, capsys) -> None:
    """The same file, where its user keeps it: what is refused above is the place."""
    (tmp_path / "data").mkdir()
    (tmp_path / "mine.py").write_text(CODE.format(canary=str(tmp_path / "ran")))
    code = command.main(["--config", f"{tmp_path}/mine.py:path={tmp_path}/data", "--mode=show", "--config.data.source=folderr"])
    assert code == 2 and "did you mean folder?" in capsys.readouterr().err and (tmp_path / "ran").is_dir()


HOSTILE = [
    name
    for i in range(13)
    for name in (
        f"../{i}.jpg", f"/{i}.jpg", f"a/../../{i}.jpg", f"../../../../../../tmp/escaped{i}.jpg", f"./../{i}.jpg", f"//{i}.jpg",
        f"line\nforged line {i}.jpg", f"\x1b]0;title{i}\x07.jpg", f"\x1b[2J\x1b[1;1H{i}.jpg", f"\r{i}\x08\x08.jpg", f"\u202egpj.{i}.jpg",
        f"a\\..\\..\\{i}.jpg", f"C:\\{i}.jpg", f"~/{i}.jpg", f"$HOME/{i}.jpg", f"{'d/' * 100}{i}.jpg",
    )
]  # fmt: skip


def everything_below(folder: pathlib.Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.mark.fast
@pytest.mark.row("F2", "C7")
def test_no_name_of_an_archive_leads_out_or_commands_a_terminal(trials, tmp_path: pathlib.Path, monkeypatch, capsys, caplog) -> None:
    """What is read, what is converted and what is told of them: nothing is written but the shards of the conversion."""
    monkeypatch.chdir(tmp_path)
    shard = tar(tmp_path / "in" / "0.tar", [(name, JPEG if i % 2 else b"broken") for i, name in enumerate(HOSTILE)])
    with tarfile.open(shard, "a", format=tarfile.GNU_FORMAT) as out:
        for number, kind in enumerate((tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE)):
            member = tarfile.TarInfo(f"{number}.jpg")
            member.type, member.linkname = kind, "/etc/passwd"
            out.addfile(member)
    before, above = everything_below(tmp_path), sorted(os.listdir(tmp_path.parent))
    with caplog.at_level(logging.WARNING):
        source = Tars(str(tmp_path / "in"))
    outside = sum(name.startswith("/") or ".." in name.split("/") for name in HOSTILE)
    assert source.ignored["names that lead outside"] == outside and source.ignored["links"] == 2 and source.ignored["special members"] == 3
    assert all("0.tar" in message for message in caplog.messages) and len(caplog.messages) == 3
    assert len(source) == len(HOSTILE) - outside
    read_all(source)
    assert everything_below(tmp_path) == before
    arguments = ["--config", f"{ROOT}/configs/tars.py:path={tmp_path}/in", *TINY, "--workdir", str(tmp_path / "run")]
    monkeypatch.setattr(data_mode.survey.speed, "__kwdefaults__", {"seconds": 0.02})
    assert command.main([*arguments, "--mode=data", "--config.data.holdout=0"]) == 0
    out, err = capsys.readouterr()
    told = out + err
    for name in HOSTILE:
        assert trials.add(not (tmp_path / name).exists() or str(name).startswith("a/")), name
    assert not any(c in told for c in "\x1b\x07\x08\r\u202e") and "\nforged" not in told and "\\x1b" in told
    assert sorted(os.listdir(tmp_path.parent)) == above and not list(pathlib.Path("/tmp").glob("escaped*.jpg"))
    assert everything_below(tmp_path / "in") == ["0.tar"]
    trials.figure = f"0 of {len(HOSTILE)} names escaped"
    assert len(HOSTILE) >= 200


@pytest.mark.fast
@pytest.mark.row("F2")
def test_links_do_not_lead_out_of_a_folder(tmp_path: pathlib.Path) -> None:
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "1.jpg").write_bytes(JPEG)
    folder = tmp_path / "pictures"
    folder.mkdir()
    (folder / "own.jpg").write_bytes(JPEG)
    (folder / "file.jpg").symlink_to(tmp_path / "secret" / "1.jpg")
    (folder / "below").symlink_to(tmp_path / "secret")
    (folder / "loop").symlink_to(folder)
    os.mkfifo(folder / "pipe.jpg")
    source = Folder(str(folder))
    assert [source.key(i) for i in range(len(source))] == ["own.jpg"]
    assert {k: n for k, n in source.ignored.items() if n} == {
        "links out of the folder": 2, "links to a folder above": 1, "special files": 1,
    }  # fmt: skip


SECRETS = {
    "password of a URL": "pa55-w0rd-one",
    "signature of a URL": "5ignature-two-0123456789",
    "token of a URL": "t0ken-three-0123456789",
    "key of the environment": "env1ronment-four-0123456789",
    "password of the environment": "env1ronment-five",
    "access key": "AKIAIOSFODNN7EXAMPLE",
    "bearer": "b3arer.six.0123456789abcdef",
    "token of a hub": "hf_abcdefghijklmnopqrstuvwx0123456789",
    "JSON web token": "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.c2lnbmF0dXJl",
    "assignment": "assigned-seven-01234",
}


@pytest.fixture
def planted(monkeypatch) -> dict[str, str]:
    """Ten secrets, in the environment and in texts that hold one each."""
    s = SECRETS
    monkeypatch.setenv("HF_TOKEN", s["key of the environment"])
    monkeypatch.setenv("STORE_PASSWORD", s["password of the environment"])
    return {
        "password of a URL": f"memory://user:{s['password of a URL']}@store/shards",
        "signature of a URL": f"https://store.example/x.tar?X-Amz-Signature={s['signature of a URL']}&part=1",
        "token of a URL": f"gs://bucket/x.tar?token={s['token of a URL']}",
        "key of the environment": f"/no/such/{s['key of the environment']}/folder",
        "password of the environment": f"/no/such-{s['password of the environment']}",
        "access key": f"/no/such/{s['access key']}",
        "bearer": f"/no/such/Authorization: Bearer {s['bearer']}",
        "token of a hub": f"/no/such/{s['token of a hub']}",
        "JSON web token": f"/no/such/{s['JSON web token']}",
        "assignment": f"/no/such/api_key={s['assignment']}",
    }


def found(text: str) -> list[str]:
    return [name for name, secret in SECRETS.items() if secret in text]


@pytest.mark.fast
@pytest.mark.row("F4")
def test_no_secret_is_in_a_message_a_log_or_a_traceback(trials, planted, monkeypatch, capsys, caplog, tmp_path: pathlib.Path) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(remote, "persist", lambda path, act: (_ for _ in ()).throw(UserError(f"{path!r} cannot be read")))
    pytest.importorskip("fsspec")
    for name, path in planted.items():
        kind = "tars" if "://" in path else "folder"
        arguments = ["--config", f"configs/{kind}.py", f"--config.data.path={path}", "--workdir", str(tmp_path / "run")]
        assert command.main(arguments) == 2
        out, err = capsys.readouterr()
        with privacy.guarded():
            logging.getLogger("m3i_jax.anything").warning("cannot read %s", path)
            try:
                raise OSError(path)
            except OSError:
                sys.excepthook(*sys.exc_info())
            writers.say(f"reading {path}")
        logged = "".join(capsys.readouterr()) + caplog.messages[-1]
        assert "***" in err and logged.count("***") >= 3, (name, err, logged)
        assert trials.add(not found(out + err + logged)), (name, found(out + err + logged), err, logged)
    trials.figure = f"0 of {len(planted)} secrets in messages, logs and tracebacks"


@pytest.mark.fast
@pytest.mark.row("F4")
def test_no_secret_is_in_a_file_of_a_run(trials, planted, monkeypatch, capsys, tmp_path: pathlib.Path) -> None:
    """The address of a source holds one secret, captions and names the others: every file of --mode=data and of the start of a run."""
    fsspec = pytest.importorskip("fsspec")
    monkeypatch.chdir(ROOT)
    url, path = planted["password of a URL"], tmp_path / "0.tar"
    texts = list(planted.values())
    members = [(f"{i}.{kind}", JPEG if kind == "jpg" else texts[i % 10].encode()) for i in range(30) for kind in ("jpg", "txt")]
    tar(path, [*members, (f"{SECRETS['access key']}.jpg", b"broken")])
    fsspec.filesystem("memory").pipe(f"{url.removeprefix('memory:/')}/0.tar", path.read_bytes())
    monkeypatch.setattr(data_mode.survey.speed, "__kwdefaults__", {"seconds": 0.02})
    run = tmp_path / "run"
    arguments = [
        "--config",
        "configs/tars.py",
        f"--config.data.path={url}",
        *TINY,
        "--config.data.size=0",
        "--config.train.batch_size=16",
        "--workdir",
        str(run),
    ]
    assert command.main([*arguments, "--mode=data"]) == 0
    assert command.main([*arguments, "--mode=show"]) == 0
    started(arguments, monkeypatch)
    printed = "".join(capsys.readouterr())
    written = {file.name: file.read_bytes().decode("latin-1") for file in run.rglob("*") if file.is_file()}
    # The vocabulary and the index are the data's own words, for this program to read; all else is for people.
    written = {name: text for name, text in written.items() if name != "tokenizer.json" and not name.startswith("tar_index")}
    assert {"config.txt", "data.txt", "data.json", "data.html"} <= written.keys()
    for name in SECRETS:
        where = [file for file, text in written.items() if SECRETS[name] in text]
        assert trials.add(not where and SECRETS[name] not in printed), (name, where)
    assert "memory://***@store" in written["config.txt"] and "memory://***@store" in printed
    trials.figure = f"0 of {len(SECRETS)} secrets in {len(written)} files"


def started(arguments: list[str], monkeypatch) -> None:
    """What --mode=train writes before the first step: settings and data of the run, and again with new credentials."""
    from m3i_jax.modes import job as jobs
    from m3i_jax.modes import train

    def settings(swap: tuple[str, str] = ("", "")) -> schema.Config:
        made = configuration.load("configs/tars.py")
        configuration.override(made, [a.replace(*swap)[len("--config.") :] for a in arguments if a.startswith("--config.")])
        return configuration.resolve(made)

    for swap in (("", ""), (SECRETS["password of a URL"], SECRETS["password of a URL"])):
        job = jobs.open_job(settings(swap), arguments[-1])
        train.agree(job, {"samples_seen": 8, "fingerprint": job.fingerprint}, False)


@pytest.mark.fast
@pytest.mark.row("F4")
def test_new_credentials_are_no_other_configuration(tmp_path: pathlib.Path) -> None:
    """A signed address is another one every hour: a run resumes with it; with another file it does not."""
    old, new, other = (
        privacy.redact(
            configuration.to_text(schema.Config(data=schema.Data(path=f"https://me:{key}@host/{name}.tar?X-Amz-Signature={key}")))
        )
        for key, name in (("one-11111", "a"), ("two-22222", "a"), ("two-22222", "b"))
    )
    assert configuration.difference(old, new) == [] and len(configuration.difference(old, other)) == 1


@pytest.mark.fast
@pytest.mark.row("F4")
def test_what_is_no_secret_stays() -> None:
    for text in (
        "config.data.tokenizer: 'trained-by-others' is none of train, clip",
        "12 tokens: 1234567 of them, secretary: nobody, a basic understanding of it",
        "gs://bucket/x-??.tar, host:8080/path, abfs://container@account.dfs.core.windows.net/x",
        "data.path = '/data/2024-01-01/pictures'",
        configuration.help_table(),
        configuration.to_text(schema.Config()),
    ):
        assert privacy.redact(text, environment={"PATH": "/data/2024-01-01", "AUTHOR": "pictures", "TOKEN": "short"}) == text


@pytest.mark.fast
@pytest.mark.row("F5")
@pytest.mark.parametrize("private", [True, False])
def test_files_are_their_owners(private: bool, trials, monkeypatch, tmp_path: pathlib.Path, capsys) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(data_mode.survey.speed, "__kwdefaults__", {"seconds": 0.02})
    run, folder = tmp_path / "made" / "run", tmp_path / "pictures"
    broken.fill(folder, good=12, kinds=2)
    before = os.umask(0o022)
    try:
        arguments = [
            "--config",
            f"configs/folder.py:path={folder}",
            *TINY,
            "--config.data.size=0",
            "--config.train.batch_size=16",
            "--workdir",
            str(run),
        ]
        assert command.main([*arguments, "--mode=data", f"--config.report.private={private}"]) == 0
        assert os.umask(0o022) == 0o022, "the umask of the process is not put back"
    finally:
        os.umask(before)
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in [run.parent, run, *run.rglob("*")]}
    assert len(modes) >= 5
    for path, mode in modes.items():
        wanted = (0o700 if path.is_dir() else 0o600) if private else (0o755 if path.is_dir() else 0o644)
        assert trials.add(mode == wanted or (path == run and mode == 0o700)), (path, oct(mode))


BOMBS = """
import json, os, pathlib, resource, sys, time
from m3i_jax.data import array_records, arrays, class_names, sources, tokenizer
from m3i_jax.data.tars import Tars
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
    "nested": lambda: Tars(str(folder / "nested.tar"))[0].label == -1,
    "huge": lambda: refused(lambda: array_records.ArrayRecords(str(folder / "huge"))),
    "names": lambda: refused(lambda: class_names.from_file(str(folder / "names.json"), ("0",))),
    "tokenizer": lambda: refused(lambda: tokenizer.Tokenizer.load(str(folder / "tokenizer.json"), 9)),
    "inflates": lambda: arrays.load(str(folder / "inflates.npz")) is None,
    "claims": lambda: arrays.load(str(folder / "claims.npz")) is None,
}
for name, act in acts.items():
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    good = act()
    print(json.dumps([name, good, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, time.process_time() - start]))
"""


@pytest.mark.fast
@pytest.mark.row("F6")
def test_metadata_is_limited_before_it_is_parsed(trials, tmp_path: pathlib.Path) -> None:
    """Each in a process that says how much memory it took; the limit is the matrix's."""
    pytest.importorskip("array_record.python.array_record_module")
    keys = json.dumps({str(i): i for i in range(1_000_000)})
    tar(tmp_path / "nested.tar", [("1.json", b"[" * (1 << 20)), ("1.jpg", JPEG), ("2.json", keys.encode()), ("2.jpg", JPEG)])
    (tmp_path / "huge").mkdir()
    (tmp_path / "names.json").write_text("[" + "[]," * 12_000_000 + "[]]")  # 0.7 GB when it is parsed
    for name in ("huge/dataset.json", "tokenizer.json"):
        (tmp_path / name).hardlink_to(tmp_path / "names.json")
    with zipfile.ZipFile(tmp_path / "inflates.npz", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as packed:
        header = b"{'descr': '|u1', 'fortran_order': False, 'shape': (600000000,), }".ljust(117) + b"\n"
        with packed.open("x.npy", "w") as member:
            member.write(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)
            for _ in range(600):
                member.write(bytes(1_000_000))
    with zipfile.ZipFile(tmp_path / "claims.npz", "w") as packed:
        header = b"{'descr': '<f8', 'fortran_order': False, 'shape': (1000000000000000,), }".ljust(117) + b"\n"
        packed.writestr("x.npy", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + b"0")
    done = subprocess.run(
        [sys.executable, "-c", BOMBS, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    told = [json.loads(line) for line in done.stdout.splitlines()]
    for name, good, grown, seconds in told:
        assert trials.add(good and grown < 300 * 1024), (name, good, grown, seconds)
    trials.figure = f"most memory {max(grown for *_, grown, _ in told) / 1024:.0f} MB, longest {max(s for *_, s in told):.1f} s of a core"
    assert len(told) == 6


ALLOWED = {("m3i_jax/config.py", "exec_module"), ("m3i_jax/data/tokenizer.py", "subprocess.run")}
MODULES = {"pickle", "cPickle", "cloudpickle", "dill", "marshal", "shelve", "yaml", "joblib", "pty", "commands", "telnetlib", "ctypes"}
CALLS = {
    "eval", "exec", "compile", "os.system", "os.popen", "os.startfile", "os.putenv", "tempfile.mktemp", "torch.load", "yaml.load",
    "yaml.unsafe_load", "yaml.full_load", "shutil.unpack_archive", "np.frombuffer_object", "asyncio.create_subprocess_shell",
    "exec_module", "load_module", "extractall", "load_state_dict_from_url",
}  # fmt: skip


def unsafe(source: str, name: str) -> list[str]:
    """Complaints about a file: what runs text, unpickles, starts programs, unpacks, or opens a file to everybody."""
    out = []
    for node in ast.walk(ast.parse(source)):
        found: list[str] = []
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            found += [m for m in modules if m.split(".")[0] in MODULES]
            if isinstance(node, ast.ImportFrom):
                found += [f"{node.module}.{a.name}" for a in node.names if f"{node.module}.{a.name}" in CALLS]
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            keywords = {k.arg: k.value for k in node.keywords}
            if called in CALLS or called.split(".")[-1] in {"exec_module", "load_module", "extractall"}:
                found.append(called.split(".")[-1] if called.endswith("_module") else called)
            if called.split(".")[0] in ("subprocess", "pexpect") or called.startswith(("os.exec", "os.spawn", "os.posix_spawn")):
                found.append(called)
            for argument in ("shell", "allow_pickle", "trust_remote_code"):
                if argument in keywords and not (isinstance(keywords[argument], ast.Constant) and not keywords[argument].value):
                    found.append(f"{argument}=")
            if called.split(".")[-1] == "load" and called.split(".")[0] in ("np", "numpy") and "allow_pickle" not in keywords:
                found.append(f"{called} without allow_pickle=False")
            if called.split(".")[-1] in ("chmod", "fchmod", "mkdir", "makedirs", "open"):
                modes = [a for a in [*node.args, *keywords.values()] if isinstance(a, ast.Constant) and type(a.value) is int]
                found += [f"{called} for everybody" for a in modes if called != "open" and 0o100 < a.value <= 0o7777 and a.value & 0o002]
        out += [f"{name}:{node.lineno}: {what}" for what in found if (name, what) not in ALLOWED]
    return out


@pytest.mark.fast
@pytest.mark.row("F7")
@pytest.mark.parametrize(
    ("bad", "good"),
    [
        ("eval('1')", "model.eval()"), ("exec(x)", "executor(x)"), ("import pickle", "import json"),
        ("from yaml import load", "import csv"),
        ("import os\nos.system('ls')", "import os\nos.getcwd()"), ("np.load(p)", "np.load(p, allow_pickle=False)"),
        ("np.load(p, allow_pickle=x)", "load(p)"), ("subprocess.run(['ls'])", "process.run(['ls'])"), ("f(shell=True)", "f(shell=False)"),
        ("torch.load(p)", "json.load(p)"), ("t.extractall()", "t.extractfile()"), ("spec.loader.exec_module(m)", "spec.loader.name"),
        ("os.chmod(p, 0o777)", "os.chmod(p, 0o600)"), ("os.execv(p, a)", "os.fsync(p)"), ("compile(a, b, 'exec')", "re.compile(a)"),
    ],
)  # fmt: skip
def test_the_reader_of_source_sees(bad: str, good: str) -> None:
    assert unsafe(bad, "a.py") and not unsafe(good, "a.py")


@pytest.mark.fast
@pytest.mark.row("F7")
def test_nothing_unsafe_is_in_the_source(trials) -> None:
    files = [path for folder in ("m3i_jax", "configs", "launch") for path in sorted((ROOT / folder).rglob("*.py"))]
    assert len(files) > 100
    allowed = set()
    for path in files:
        name, source = path.relative_to(ROOT).as_posix(), path.read_text()
        complaints = unsafe(source, name)
        assert trials.add(not complaints), "\n".join(complaints)
        allowed |= {entry for entry in ALLOWED if entry[0] == name and entry[1].split(".")[-1] in source}
    assert allowed == ALLOWED, "the allow-list has an entry that nobody uses"
    for path in sorted((ROOT / "launch").glob("*.sh")):
        words = path.read_text().replace(";", " ; ").split()
        assert trials.add("eval" not in words and "777" not in words and "curl" not in words), path
    trials.figure = f"0 unsafe calls in {trials.trials} files outside an allow-list of {len(ALLOWED)}"


@pytest.mark.fast
@pytest.mark.row("F2")
def test_text_of_the_data_does_nothing_on_the_page() -> None:
    """Captions, class names and keys are text to whoever reads data.html, whatever they hold."""
    attacks = [
        "<script>fired()</script>", '"><img src=x onerror=fired()>', "' onload='fired()", "</title><svg onload=fired()>",
        '" style="background:url(javascript:fired())', "<a href=javascript:fired()>", "&lt;script&gt;fired()&lt;/script&gt;",
    ]  # fmt: skip
    picture = [{"jpeg": JPEG, "key": a, "size": "1 x 1", "label": a, "caption": a} for a in attacks]
    page = data_page._pictures(picture) + data_page._table(attacks, [attacks], 1)
    seen: list[tuple[str, dict[str, str | None]]] = []
    reader = html.parser.HTMLParser()
    reader.handle_starttag = lambda name, attributes: seen.append((name, dict(attributes)))
    reader.feed(page)
    assert {name for name, _ in seen} == {"div", "figure", "img", "figcaption", "b", "br", "span", "table", "tr", "th", "td"}
    assert {key for _, attributes in seen for key in attributes} == {"alt", "src", "class"}
    assert all(a["alt"] in attacks and a["src"].startswith("data:image/jpeg;base64,") for name, a in seen if name == "img")
