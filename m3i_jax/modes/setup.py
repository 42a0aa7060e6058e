"""What the modes that read data share: the source, its splits and tokenizer, the completed
configuration and the working directory."""

import contextlib
import dataclasses
import fcntl
import os
import pathlib
import re
import stat
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax

from m3i_jax import config as configuration
from m3i_jax import parallel, schema, validation
from m3i_jax.data import pipeline, splits, tokenizer
from m3i_jax.data.sources import base
from m3i_jax.errors import UserError
from m3i_jax.models import backbones
from m3i_jax.training import plan, scaling


def complete_config(
    config: schema.Config, *, classes: int, captions: bool, size: int
) -> schema.Config:
    """The configuration with what only the data knows: its categories, whether captions are used,
    its training images, and the settings that follow from their number where they are left open
    (`scaling.fill_open_settings`)."""
    data = dataclasses.replace(
        config.data, classes=classes, captions="yes" if captions else "no", size=size
    )
    return scaling.fill_open_settings(dataclasses.replace(config, data=data))


@dataclasses.dataclass(kw_only=True)
class Setup:
    """A completed run: settings, devices and data; `asked` is `data.size` before it was
    completed."""

    config: schema.Config
    mesh: jax.sharding.Mesh
    train: Any
    held_out: Any
    classes: tuple[str, ...]
    tokenizer: tokenizer.Tokenizer | None
    workdir: pathlib.Path
    asked: int = 0

    @property
    def text(self) -> str:
        """The configuration as `config.txt` keeps it: completed, but `data.size` as it was asked
        for, if it was. Of shapes it says how many to render, held-out ones too; who opens the run
        again must get the same ones."""
        data = dataclasses.replace(self.config.data, size=self.asked or self.config.data.size)
        return configuration.config_to_text(dataclasses.replace(self.config, data=data))

    @property
    def fingerprint(self) -> str:
        return pipeline.stream_fingerprint(self.config, self.train)

    @property
    def identity(self) -> str:
        """What the fingerprint is made of, a line each; then what is held out."""
        held = enumerate(base.source_identity(self.held_out), 1)
        return pipeline.stream_identity(self.config, self.train) + "".join(
            f"held out {i} = {line}\n" for i, line in held
        )

    def batches(self, start: int, views: tuple[int, ...] = ()) -> Any:
        """Host batches from sample `start` on, with these views or those that the objective
        reads."""
        views, host, hosts = (
            views or plan.build_plan(self.config).crops,
            jax.process_index(),
            jax.process_count(),
        )
        return pipeline.iterate_batches(
            self.config,
            self.train,
            self.tokenizer,
            start=start,
            host=host,
            hosts=hosts,
            views=views,
        )


def _begun(config: schema.Config, workdir: pathlib.Path) -> schema.Config:
    """With the batch that the run in a directory began with, if that was rounded up from this one:
    on another slice it would be rounded to another number, and the run be another one."""
    if not config.train.round_batch or not (workdir / "config.txt").is_file():
        return config
    there = configuration.load_from_workdir(str(workdir), "--workdir").train
    asked = config.train.batch_size
    if not there.round_batch or not asked < there.batch_size < 1.1 * asked:
        return config
    if not jax.process_index():
        print(
            f"train.batch_size: {there.batch_size:,}, with which the run in {workdir} began;"
            f" {asked:,} were asked for",
            flush=True,
        )
    return dataclasses.replace(
        config, train=dataclasses.replace(config.train, batch_size=there.batch_size)
    )


def restore_or_init(
    config: schema.Config, devices: Sequence[jax.Device] | None = None
) -> tuple[schema.Config, jax.sharding.Mesh]:
    """The configuration, its batch rounded if so configured, and its mesh on these devices or on
    those that are here; refuses a mesh whose hosts would share rows, and a batch that cannot be
    split over it."""
    mesh = parallel.make_mesh(config.parallel.mesh, devices)
    parallel.check_host_rows(mesh)
    config, told = validation.fit_batch_to_mesh(config, tuple(mesh.shape[a] for a in parallel.AXES))  # type: ignore[arg-type]
    if told and not jax.process_index():
        print(told, flush=True)
    return config, mesh


def with_objective(config: schema.Config, forms: tuple[str, ...]) -> schema.Config:
    """The same configuration with another objective."""
    return dataclasses.replace(config, objective=dataclasses.replace(config.objective, forms=forms))


def open_setup(
    config: schema.Config, workdir: str, *, trains: Iterable[tuple[str, ...]] = ()
) -> Setup:
    """Open the data of a configuration and complete it.

    Args: config: settings. workdir: where the index of the data and the vocabulary are kept.
      trains: the objectives (names of forms) that will be trained on it. If none of them reads
      captions, there is no vocabulary to learn and no token to carry, unless `data.captions` is
      "yes". Empty: whoever opens the data looks at all of it.
    """
    backbones.validate_backbone(config)  # before data are opened, which may take minutes
    place = pathlib.Path(workdir)
    config, devices = restore_or_init(_begun(config, place))
    make(place)
    # the first host reads the headers of all files, the others read what it kept
    with parallel.host0_first("index"):
        train, held_out = splits.open_splits(config.data, cache=str(place / "index"))
    count, captions = (
        pipeline.count_classes(config.data, train),
        pipeline.uses_captions(config.data, train),
    )
    done = complete_config(config, classes=count, captions=captions, size=len(train))
    # refused here, before a vocabulary is learnt
    plans = [plan.build_plan(with_objective(done, forms)) for forms in trains]
    if (
        captions
        and config.data.captions == "auto"
        and plans
        and not any(each.where("text") for each in plans)
    ):
        captions = False
        done = complete_config(config, classes=count, captions=False, size=len(train))
    with parallel.host0_first("tokenizer"):
        words = (
            tokenizer.open_tokenizer(done.data, train, str(place / "tokenizer.json"))
            if captions
            else None
        )
    names = tuple(train.classes[:count])
    return Setup(
        config=done,
        mesh=devices,
        train=train,
        held_out=held_out,
        classes=names,
        tokenizer=words,
        workdir=place,
        asked=config.data.size,
    )


def make(workdir: pathlib.Path) -> None:
    """Make a working directory if it is not there. Raises UserError if it cannot be made."""
    try:
        workdir.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"--workdir {workdir}: cannot be made ({error.strerror or error}); choose another"
            " directory"
        ) from error


@contextlib.contextmanager
def lock_workdir(workdir: pathlib.Path) -> Iterator[None]:
    """One run a working directory. The lock is the kernel's and ends with the process that holds
    it, so it is never stale. Of several hosts, the first holds it for all."""
    if jax.process_index():
        yield
        return
    file, holder = _open_lock(workdir / "run.lock")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(file)
        raise UserError(
            f"--workdir {workdir}: another run (process {holder or 'unknown'}) is working there;"
            " stop it or choose another directory"
        ) from None
    except OSError as error:
        print(
            f"warning: {workdir} has no locks ({error.strerror}): see to it that no other run works"
            " there",
            flush=True,
        )
    with contextlib.suppress(OSError):  # a full disk: the number is only for a message
        os.ftruncate(file, 0)
        os.pwrite(file, str(os.getpid()).encode(), 0)
    try:
        yield
    finally:
        os.close(file)


def _open_lock(path: pathlib.Path) -> tuple[int, str]:
    """The lock as a file that may be written to, and the process number in it. Nothing that is not
    a lock is opened for writing: neither what a link leads to, nor a file with another content.

    Raises:
      UserError: it is something else, or cannot be opened.
    """
    try:
        file = os.open(
            path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600
        )
    except OSError as error:
        if path.is_symlink() or path.is_dir():
            raise UserError(
                f"{path}: is {'a link' if path.is_symlink() else 'a directory'} and no lock of a"
                " run; delete it"
            ) from None
        raise UserError(
            f"{path}: no run can work there ({error.strerror or error}); choose another --workdir"
        ) from error
    if stat.S_ISREG(os.fstat(file).st_mode) and (
        holder := re.fullmatch(rb"\s*(\d*)\s*", os.read(file, 33))
    ):
        return file, holder[1].decode()
    os.close(file)
    raise UserError(f"{path}: holds something else than the process number of a run; move it away")
