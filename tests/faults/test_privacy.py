"""Rows F2, F4 and F5: names lead out of no directory and control no terminal, outputs have no
secrets, and files belong to their owner."""

import html.parser
import json
import logging
import os
import pathlib
import stat
import subprocess
import sys
import tarfile
import types
from typing import Any

import pytest

from m3i_jax import config as configuration
from m3i_jax import main as command
from m3i_jax import privacy, schema
from m3i_jax.data.sources import array_record, base, remote
from m3i_jax.data.sources.folder import FolderSource
from m3i_jax.data.sources.tars import TarSource
from m3i_jax.errors import UserError
from m3i_jax.modes import data as data_mode
from m3i_jax.reporting import data_page, html_page, writers
from tests import broken, quick_show
from tests.faults.hostile import JPEG, ROOT, read_all, tar
from tests.test_main import TINY, environment

HOSTILE = [
    name
    for i in range(13)
    for name in (
        *(f"../{i}.jpg", f"/{i}.jpg", f"a/../../{i}.jpg", f"../../../../../../tmp/escaped{i}.jpg"),
        *(f"./../{i}.jpg", f"//{i}.jpg", f"line\nforged line {i}.jpg", f"\x1b]0;title{i}\x07.jpg"),
        *(f"\x1b[2J\x1b[1;1H{i}.jpg", f"\r{i}\x08\x08.jpg", f"\u202egpj.{i}.jpg"),
        *(f"a\\..\\..\\{i}.jpg", f"C:\\{i}.jpg", f"~/{i}.jpg", f"$HOME/{i}.jpg"),
        f"{'d/' * 100}{i}.jpg",
    )
]


def everything_below(folder: pathlib.Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.mark.fast
@pytest.mark.row("F2", "C7")
def test_no_name_of_an_archive_leads_out_or_commands_a_terminal(
    trials, tmp_path: pathlib.Path, monkeypatch, capsys, caplog
) -> None:
    """Reading, converting and reporting write nothing but the shards of the conversion."""
    monkeypatch.chdir(tmp_path)
    shard = tar(
        tmp_path / "in" / "0.tar",
        [(name, JPEG if i % 2 else b"broken") for i, name in enumerate(HOSTILE)],
    )
    with tarfile.open(shard, "a", format=tarfile.GNU_FORMAT) as out:
        for number, kind in enumerate(
            (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE)
        ):
            member = tarfile.TarInfo(f"{number}.jpg")
            member.type, member.linkname = kind, "/etc/passwd"
            out.addfile(member)
    before, above = everything_below(tmp_path), sorted(os.listdir(tmp_path.parent))
    with caplog.at_level(logging.WARNING):
        source = TarSource(str(tmp_path / "in"))
    outside = sum(name.startswith("/") or ".." in name.split("/") for name in HOSTILE)
    assert (
        source.ignored["names that lead outside"] == outside
        and source.ignored["links"] == 2
        and source.ignored["special members"] == 3
    )
    assert all("0.tar" in message for message in caplog.messages) and len(caplog.messages) == 3
    assert len(source) == len(HOSTILE) - outside
    read_all(source)
    assert everything_below(tmp_path) == before
    arguments = [
        "--config",
        f"{ROOT}/configs/tars.py:path={tmp_path}/in",
        *TINY,
        "--workdir",
        str(tmp_path / "run"),
    ]
    monkeypatch.setattr(data_mode.dataset_scan.measure_speed, "__kwdefaults__", {"seconds": 0.02})
    assert command.main([*arguments, "--mode=data", "--config.data.holdout=0"]) == 0
    out, err = capsys.readouterr()
    output = out + err
    for name in HOSTILE:
        assert trials.add(not (tmp_path / name).exists() or str(name).startswith("a/")), name
    assert (
        not any(c in output for c in "\x1b\x07\x08\r\u202e")
        and "\nforged" not in output
        and "\\x1b" in output
    )
    written = {
        name: (tmp_path / "run" / name).read_bytes().decode() for name in ("data.html", "data.json")
    }
    for name, text in written.items():
        assert (
            text == privacy.escape_control(text)
            and ("\\x1b[2J" if name == "data.html" else "\\u001b[2J") in text
        ), name
    examples = {
        key for row in json.loads(written["data.json"])["bad"] for key, _ in row["examples"]
    }
    # JSON gives the names back as they were
    assert examples <= {source.key(i) for i in range(len(source))}
    assert sorted(os.listdir(tmp_path.parent)) == above and not list(
        pathlib.Path("/tmp").glob("escaped*.jpg")
    )
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
    source = FolderSource(str(folder))
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
        "signature of a URL": (
            f"https://store.example/x.tar?X-Amz-Signature={s['signature of a URL']}&part=1"
        ),
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
def test_no_secret_is_in_a_message_a_log_or_a_traceback(
    trials, planted, monkeypatch, capsys, caplog, tmp_path: pathlib.Path
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(
        remote,
        "retry_network",
        lambda path, act: (_ for _ in ()).throw(UserError(f"{path!r} cannot be read")),
    )
    pytest.importorskip("fsspec")
    for name, path in planted.items():
        kind = "tars" if "://" in path else "folder"
        arguments = [
            "--config",
            f"configs/{kind}.py",
            f"--config.data.path={path}",
            "--workdir",
            str(tmp_path / "run"),
        ]
        assert command.main(arguments) == 2
        out, err = capsys.readouterr()
        with privacy.redact_logs():
            logging.getLogger("m3i_jax.anything").warning("cannot read %s", path)
            try:
                raise OSError(path)
            except OSError:
                sys.excepthook(*sys.exc_info())
            writers.log_line(f"reading {path}")
        logged = "".join(capsys.readouterr()) + caplog.messages[-1]
        assert "***" in err and logged.count("***") >= 3, (name, err, logged)
        assert trials.add(not found(out + err + logged)), (
            name,
            found(out + err + logged),
            err,
            logged,
        )
    trials.figure = f"0 of {len(planted)} secrets in messages, logs and tracebacks"


@pytest.mark.fast
@pytest.mark.row("F4")
def test_no_secret_is_in_a_file_of_a_run(
    trials, planted, monkeypatch, capsys, tmp_path: pathlib.Path
) -> None:
    """The address of a source has one secret, captions and names the others: none is in any file of
    --mode=data or of the start of a run."""
    fsspec = pytest.importorskip("fsspec")
    monkeypatch.chdir(ROOT)
    url, path = planted["password of a URL"], tmp_path / "0.tar"
    texts = list(planted.values())
    members = [
        (f"{i}.{kind}", JPEG if kind == "jpg" else texts[i % 10].encode())
        for i in range(30)
        for kind in ("jpg", "txt")
    ]
    tar(path, [*members, (f"{SECRETS['access key']}.jpg", b"broken")])
    fsspec.filesystem("memory").pipe(f"{url.removeprefix('memory:/')}/0.tar", path.read_bytes())
    monkeypatch.setattr(data_mode.dataset_scan.measure_speed, "__kwdefaults__", {"seconds": 0.02})
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
    quick_show.leave_out_estimates(monkeypatch)
    assert command.main([*arguments, "--mode=show"]) == 0
    started(arguments, monkeypatch)
    printed = "".join(capsys.readouterr())
    written = {
        file.relative_to(run).as_posix(): file.read_bytes().decode("latin-1")
        for file in run.rglob("*")
        if file.is_file()
    }
    # The vocabulary and the index have words of the data, and only this program reads them.
    own = ("tokenizer.json", "tar_index")
    written = {k: text for k, text in written.items() if not any(name in k for name in own)}
    assert {"config.txt", "data.txt", "data.json", "data.html"} <= written.keys()
    for name in SECRETS:
        where = [file for file, text in written.items() if SECRETS[name] in text]
        assert trials.add(not where and SECRETS[name] not in printed), (name, where)
    assert "memory://***@store" in written["config.txt"] and "memory://***@store" in printed
    trials.figure = f"0 of {len(SECRETS)} secrets in {len(written)} files"


def started(arguments: list[str], monkeypatch) -> None:
    """The files that --mode=train writes before the first step: settings and data of the run, and
    again with new credentials."""
    from m3i_jax.modes import setup as jobs
    from m3i_jax.modes import train

    def settings(swap: tuple[str, str] = ("", "")) -> schema.Config:
        made = configuration.load_config("configs/tars.py")
        configuration.apply_overrides(
            made,
            [a.replace(*swap)[len("--config.") :] for a in arguments if a.startswith("--config.")],
        )
        return configuration.resolve(made)

    for swap in (("", ""), (SECRETS["password of a URL"], SECRETS["password of a URL"])):
        job = jobs.open_setup(settings(swap), arguments[-1])
        train.check_same_run(job, {"samples_seen": 8, "fingerprint": job.fingerprint}, False)
        train.write_settings(job)


@pytest.mark.slow
@pytest.mark.row("F4", "F5")
def test_a_whole_run_shows_no_secret_and_is_its_owners(
    trials, planted, tmp_path: pathlib.Path
) -> None:
    """Training in its own process, with worker processes, in a directory whose name has secrets;
    then a refusal and a crash of it."""
    folder, run = (
        tmp_path
        / f"api_key={SECRETS['assignment']}-{SECRETS['token of a hub']}"
        / SECRETS["key of the environment"],
        tmp_path / "run",
    )
    folder.mkdir(parents=True)
    broken.fill(folder, good=40, kinds=3)
    small = [
        "train.batch_size=8",
        "train.steps=4",
        "train.panel_every=2",
        "data.size=0",
        "data.max_bad_share=1.0",
        "data.workers=1",
    ]
    small += ["evaluate.knn=False", "report.tensorboard=True"]
    flags = [
        "--config",
        "configs/folder.py",
        f"--config.data.path={folder}",
        *TINY,
        *(f"--config.{s}" for s in small),
        "--workdir",
        str(run),
    ]

    def start(*more: str, before: str = "") -> subprocess.CompletedProcess[str]:
        command = f"import sys; {before}\nfrom m3i_jax import main\nsys.exit(main.main())"
        environ = {**environment(), "HF_TOKEN": SECRETS["key of the environment"]}
        return subprocess.run(
            [sys.executable, "-c", command, *flags, *more],
            cwd=ROOT,
            env=environ,
            umask=0o022,
            capture_output=True,
            text=True,
            check=False,
        )

    whole = start()
    assert whole.returncode == 0 and "done: 4 steps" in whole.stdout, whole.stderr
    refused = start("--config.seed=7")
    assert refused.returncode == 2 and "seed: 0 -> 7" in refused.stderr
    crash = start(
        before="from m3i_jax.modes import setup; setup.lock_workdir = lambda place: {}[sys.argv[3]]"
    )
    assert crash.returncode == 1 and "KeyError" in crash.stderr and "***" in crash.stderr
    printed = "".join(done.stdout + done.stderr for done in (whole, refused, crash))
    written = {
        path: path.read_bytes().decode("latin-1") for path in run.rglob("*") if path.is_file()
    }
    names = {path.name for path in written}
    assert {"config.txt", "data.txt", "metrics.jsonl"} <= names and any(
        name.startswith("events.") for name in names
    )
    for name, secret in SECRETS.items():
        where = [str(path) for path, text in written.items() if secret in text]
        assert trials.add(not where and secret not in printed), (name, where, printed)
    for path in [run, *run.rglob("*")]:
        mode = stat.S_IMODE(path.stat().st_mode)
        assert trials.add(not mode & 0o077), (path, oct(mode))
    trials.figure = (
        f"a whole run: 0 of {len(SECRETS)} secrets in {len(written)} files and its output, none"
        " open to others"
    )


@pytest.mark.fast
@pytest.mark.row("F4")
def test_no_secret_goes_to_a_service_or_into_a_converted_data_set(
    planted, monkeypatch, tmp_path: pathlib.Path
) -> None:
    sent: dict[str, Any] = {}
    wandb = types.SimpleNamespace(
        init=lambda **what: sent.update(what) or types.SimpleNamespace(finish=lambda: None),
        Settings=dict,
    )
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    config = schema.Config(
        data=schema.Data(mixture=tuple(planted.values())), report=schema.Report(wandb="project")
    )
    writers.open_writers(config, tmp_path, resume_at=0, total=1).close()
    assert (
        len(sent["config"]["data"]["mixture"]) == 10
        and not found(str(sent))
        and str(sent).count("***") >= 10
    )
    pytest.importorskip("array_record.python.array_record_module")
    array_record.write_shard(str(tmp_path / "x.array_record"), [base.Record("1", JPEG)])
    array_record.write_shard_index(str(tmp_path), name=" ".join(planted.values()))
    assert not found((tmp_path / "dataset.json").read_text())


@pytest.mark.fast
@pytest.mark.row("F4")
def test_new_credentials_are_no_other_configuration(tmp_path: pathlib.Path) -> None:
    """A signed address changes every hour, and a run resumes with it; with another file it does
    not."""
    old, new, other = (
        privacy.redact(
            configuration.config_to_text(
                schema.Config(
                    data=schema.Data(path=f"https://me:{key}@host/{name}.tar?X-Amz-Signature={key}")
                )
            )
        )
        for key, name in (("one-11111", "a"), ("two-22222", "a"), ("two-22222", "b"))
    )
    assert (
        configuration.config_difference(old, new) == []
        and len(configuration.config_difference(old, other)) == 1
    )


@pytest.mark.fast
@pytest.mark.row("F4")
def test_what_is_no_secret_stays() -> None:
    for text in (
        "config.data.tokenizer: 'trained-by-others' is not one of train, clip",
        "12 tokens: 1234567 of them, secretary: nobody, a basic understanding of it",
        "gs://bucket/x-??.tar, host:8080/path, abfs://container@account.dfs.core.windows.net/x",
        "data.path = '/data/2024-01-01/pictures'",
        configuration.help_table(),
        configuration.config_to_text(schema.Config()),
    ):
        assert (
            privacy.redact(
                text,
                environment={"PATH": "/data/2024-01-01", "AUTHOR": "pictures", "TOKEN": "short"},
            )
            == text
        )


@pytest.mark.fast
@pytest.mark.row("F5")
@pytest.mark.parametrize("private", [True, False])
def test_files_are_their_owners(
    private: bool, trials, monkeypatch, tmp_path: pathlib.Path, capsys
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(data_mode.dataset_scan.measure_speed, "__kwdefaults__", {"seconds": 0.02})
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
        wanted = (
            (0o700 if path.is_dir() else 0o600) if private else (0o755 if path.is_dir() else 0o644)
        )
        assert trials.add(mode == wanted or (path == run and mode == 0o700)), (path, oct(mode))


@pytest.mark.fast
@pytest.mark.row("F2")
def test_text_of_the_data_does_nothing_on_the_page() -> None:
    """Captions, class names and keys are plain text in data.html, whatever their content."""
    attacks = [
        *("<script>fired()</script>", '"><img src=x onerror=fired()>', "' onload='fired()"),
        "</title><svg onload=fired()>",
        '" style="background:url(javascript:fired())',
        "<a href=javascript:fired()>",
        "&lt;script&gt;fired()&lt;/script&gt;",
    ]
    image = [{"jpeg": JPEG, "key": a, "size": "1 x 1", "label": a, "caption": a} for a in attacks]
    page = data_page._image_list(image) + html_page.html_table(attacks, [attacks], 1)
    seen: list[tuple[str, dict[str, str | None]]] = []
    reader = html.parser.HTMLParser()
    reader.handle_starttag = lambda name, attributes: seen.append((name, dict(attributes)))
    reader.feed(page)
    assert {name for name, _ in seen} == {
        "div",
        "figure",
        "img",
        "figcaption",
        "b",
        "br",
        "span",
        "table",
        "tr",
        "th",
        "td",
    }
    assert {key for _, attributes in seen for key in attributes} == {"alt", "src", "class"}
    assert all(
        a["alt"] in attacks and a["src"].startswith("data:image/jpeg;base64,")
        for name, a in seen
        if name == "img"
    )
