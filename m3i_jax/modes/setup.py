"""Setup of the modes that read data: source, splits, tokenizer, completed configuration; the lock
of the working directory, and a check that it can be written to."""

import contextlib
import dataclasses
import fcntl
import functools
import glob
import os
import pathlib
import re
import secrets
import stat
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax

from m3i_jax import config as configuration
from m3i_jax import parallel, schema, validation
from m3i_jax.data import pipeline, sampler, splits, tokenizer
from m3i_jax.data.sources import base
from m3i_jax.errors import UserError
from m3i_jax.models import backbones
from m3i_jax.objective.caption_posterior import CAPTIONS
from m3i_jax.parallel import distributed
from m3i_jax.training import checkpoint_dir, saved_arrays, scaling
from m3i_jax.training.plan import Plan, build_plan
from m3i_jax.training.pretrain_task import Pretrain
from m3i_jax.training.task import Task, make_task, task_kind
from m3i_jax.training.trainer import Trainer

# parameters with a row or column for each id
_OF_TOKENS = ("text/token_table", "captioner/token_table", "captioner/logits/kernel")


def complete_config(
    config: schema.Config, *, classes: int, captions: bool, size: int
) -> schema.Config:
    """Returns the configuration completed from the data: number of categories, whether captions are
    used, samples of an epoch of the training images, and the open settings that follow from it
    (`scaling.fill_open_settings`)."""
    data = dataclasses.replace(
        config.data, classes=classes, captions="yes" if captions else "no", size=size
    )
    return scaling.fill_open_settings(dataclasses.replace(config, data=data))


@dataclasses.dataclass(kw_only=True)
class Setup:
    """A run with completed settings, its devices and its data; `configured_size` is `data.size`
    before it was completed."""

    config: schema.Config
    mesh: jax.sharding.Mesh
    train: Any
    held_out: Any
    classes: tuple[str, ...]
    tokenizer: tokenizer.Tokenizer | None
    workdir: pathlib.Path
    configured_size: int = 0

    @property
    def text(self) -> str:
        """The configuration for `config.txt`: completed, except for `data.size`, which stays as
        configured. For the shapes source it is the number of images to render, held-out ones
        included, and must be the same when the run is opened again."""
        size = self.configured_size or self.config.data.size
        data = dataclasses.replace(self.config.data, size=size)
        return configuration.config_to_text(dataclasses.replace(self.config, data=data))

    @property
    def fingerprint(self) -> str:
        return pipeline.stream_fingerprint(self.config, self.train)

    @property
    def earlier_fingerprints(self) -> tuple[str, ...]:
        """Fingerprints that earlier versions saved for the same stream."""
        return pipeline.earlier_fingerprints(self.config, self.train)

    @property
    def identity(self) -> str:
        """The lines that the fingerprint is computed from, and those of the held-out data."""
        held = enumerate(base.source_identity(self.held_out), 1)
        return pipeline.stream_identity(self.config, self.train) + "".join(
            f"held out {i} = {line}\n" for i, line in held
        )

    @functools.cached_property
    def task(self) -> Task:
        """The task of the run on these data, built once."""
        counts = task_kind(self.config.task).count_categories(self.config, self.train)
        return make_task(self.config, self.vocabulary, counts)

    @property
    def plan(self) -> Plan:
        """The plan of the objective of a pre-training run."""
        assert isinstance(self.task, Pretrain)
        return self.task.plan

    @property
    def vocabulary(self) -> int:
        """Entries of the tokenizer, 0 without captions."""
        return self.tokenizer.vocabulary if self.tokenizer else 0

    def make_trainer(self) -> Trainer:
        """Returns the trainer of the run."""
        return Trainer(self.config, self.mesh, self.vocabulary, self.task)

    def batches(self, start: int, views: tuple[int, ...] = ()) -> Any:
        """Host batches from sample `start` on, with these views or those that the task reads."""
        return self.task.batches(
            self.train,
            self.tokenizer,
            start=start,
            host=jax.process_index(),
            hosts=jax.process_count(),
            views=views,
        )


def _with_rounded_batch(config: schema.Config, workdir: pathlib.Path) -> schema.Config:
    """The configuration with the batch size of the run in a directory, if that was rounded up from
    this one: other devices would round it to another number, which would be another run."""
    if not config.train.round_batch:
        return config
    configured, size = config.train.batch_size, 0
    # the first host reads it for all: they must have one size
    with parallel.fail_together("config.txt, batch size"):
        if not jax.process_index() and (workdir / "config.txt").is_file():
            saved = configuration.load_from_workdir(str(workdir), "--workdir").train
            if saved.round_batch and configured < saved.batch_size < 1.1 * configured:
                size = saved.batch_size
    if not (size := int(parallel.exchange_values("batch size", str(size))[0])):
        return config
    if not jax.process_index():
        print(
            f"train.batch_size: {size:,}, as in the run in {workdir}, instead of {configured:,}",
            flush=True,
        )
    return dataclasses.replace(config, train=dataclasses.replace(config.train, batch_size=size))


def fit_to_devices(
    config: schema.Config, devices: Sequence[jax.Device] | None = None
) -> tuple[schema.Config, jax.sharding.Mesh]:
    """Returns the configuration, with a rounded batch if so configured, and its mesh on the given
    devices or on all present ones. Refuses a mesh whose hosts would share rows, and a batch that
    cannot be split over it."""
    mesh = parallel.make_mesh(config.parallel.mesh, devices)
    parallel.check_host_rows(mesh)
    config, note = validation.fit_batch_to_mesh(config, tuple(mesh.shape[a] for a in parallel.AXES))  # type: ignore[arg-type]
    if note and not jax.process_index():
        print(note, flush=True)
    return config, mesh


def with_objective(config: schema.Config, forms: tuple[str, ...]) -> schema.Config:
    """Returns the same configuration with another objective."""
    return dataclasses.replace(config, objective=dataclasses.replace(config.objective, forms=forms))


def open_setup(
    config: schema.Config,
    workdir: str,
    *,
    trains: Iterable[tuple[str, ...]] = (),
    draws_batches: bool = True,
    hold_out_all: bool = False,
    alone: bool = False,
) -> Setup:
    """Open the data of a configuration and complete it.

    Args:
      config: settings.
      workdir: directory of the data index and the tokenizer.
      trains: objectives (tuples of forms) that will be trained. If none of them reads captions,
        captions are not tokenized, unless `data.captions` is "yes". Empty: all data are opened.
      draws_batches: batches of training will be drawn, so the data need what these read; data to
        evaluate on may lack it.
      hold_out_all: if a task without views is to hold nothing out of these data, all of them are
        held out: it is only evaluated on them.
      alone: one device is enough, as no step is taken: the mesh of the configuration may be larger
        than this machine, and the batch need not divide.
    """
    backbones.validate_backbone(config)  # before data are opened, which may take minutes
    path = pathlib.Path(workdir)
    config = _with_rounded_batch(config, path)
    if alone:
        devices = parallel.make_mesh((1, 1, 1), jax.devices()[:1])
    else:
        config, devices = fit_to_devices(config)
    with parallel.fail_together("--workdir"):
        make_workdir(path)
    index = index_directory(config.data, path)
    # the first host reads the headers of all files, the others its index
    with parallel.host0_first("index", written=_new_files(os.path.join(index, "*.npz"))):
        train, held_out = splits.open_splits(config.data, cache=index)
    # of a share that was asked for, no image may be left
    if hold_out_all and not (config.traits.views or config.data.holdout or len(held_out)):
        held_out = train
    kind = task_kind(config.task)
    train, held_out = kind.with_annotations(train), kind.with_annotations(held_out)
    train, names = kind.training_records(train), kind.class_names(train)
    count = len(names) if config.data.classes < 0 else config.data.classes
    captions = pipeline.uses_captions(config.data, train)
    if draws_batches:
        pipeline.require_regions(config.data, train)
    size = sampler.epoch_size(train)
    done = complete_config(config, classes=count, captions=captions, size=size)
    # refused here, before a vocabulary is learnt
    plans = [build_plan(with_objective(done, forms)) for forms in trains]
    if (
        captions
        and config.data.captions == "auto"
        and plans
        and not any(each.where("text", *CAPTIONS) for each in plans)
    ):
        captions = False
        done = complete_config(config, classes=count, captions=False, size=size)
    vocabulary = str(path / "tokenizer.json")
    with parallel.host0_first("tokenizer", written=_new_files(vocabulary)):
        # the first host makes it, the others have to use that one
        fixed = bool(jax.process_index()) or uses_tokenizer(path)
        kept = fixed and os.path.exists(vocabulary)  # whatever became of init_from
        opened = (
            tokenizer.open_tokenizer(
                done.data,
                train,
                vocabulary,
                fixed=fixed,
                start=None if kept else starting_tokenizer(done),
            )
            if captions or done.data.regions
            else None
        )
    if opened and tokenizer.TAKEN in opened.origin and not jax.process_index():
        print(f"{vocabulary}: the tokenizer of the run that this one starts from", flush=True)
    if opened and parallel.host_names() > 1:
        # a network disk may still show another host the one before
        digest = base.stable_digest(opened.core.to_str())
        distributed.assert_same_on_all_hosts("tokenizer", {"tokenizer.json": digest})
    return Setup(
        config=done,
        mesh=devices,
        train=train,
        held_out=held_out,
        classes=_predicted_names(done, names, count),
        tokenizer=opened,
        workdir=path,
        configured_size=config.data.size,
    )


def starting_tokenizer(config: schema.Config) -> tokenizer.Tokenizer | None:
    """Returns the tokenizer of the run in `init_from`, if this one takes arrays that have a row for
    each of its ids: of another vocabulary of this size they would have the same shape. None if that
    run trained none of these (--mode=data writes a tokenizer whatever is trained), or if these
    settings make a tokenizer of another kind or size, whose arrays differ in shape."""
    file, only = pathlib.Path(config.init_from) / "tokenizer.json", config.init.only
    selected = [
        path for path in _OF_TOKENS if not only or any(re.search(each, path) for each in only)
    ]
    # a Hugging Face directory may have a file of this name
    run = bool(config.init_from) and checkpoint_dir.is_run(config.init_from)
    if not (run and selected and file.is_file()):
        return None
    if not checkpoint_dir.complete_steps(file.parent / "checkpoints"):
        return None
    shapes = saved_arrays.saved_shapes(config.init_from, "config.init_from")
    if not any(f"params/{path}" in shapes for path in selected):
        return None
    found = tokenizer.Tokenizer.load(str(file), config.data.caption_length)
    kind = found.origin.get("data.tokenizer", config.data.tokenizer)
    size = found.origin.get("data.vocabulary_size", config.data.vocabulary_size)
    same = kind == config.data.tokenizer == "train" and size == config.data.vocabulary_size
    return found if same else None


def has_checkpoints(workdir: pathlib.Path) -> bool:
    """Returns whether a directory has a checkpoint of a run, or of one of its --mode=compare.

    >>> has_checkpoints(pathlib.Path("/no/such/run"))
    False
    """
    runs = [workdir, *workdir.glob("compare/*")]
    return any(checkpoint_dir.complete_steps(run / "checkpoints") for run in runs)


def uses_tokenizer(workdir: pathlib.Path) -> bool:
    """Returns whether a run needs the tokenizer of a directory: it has a checkpoint, or trains now.

    >>> uses_tokenizer(pathlib.Path("/no/such/run"))
    False
    """
    if has_checkpoints(workdir):
        return True
    try:
        with open(workdir / "run.lock", "rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def _new_files(path: str) -> Callable[[], list[str]]:
    """Returns a function that lists the files of a directory that are new since now, on the first
    host; the last part of the path may be a pattern."""
    pattern = os.path.join(glob.escape(os.path.dirname(path)), os.path.basename(path))
    if jax.process_index():  # a network disk would keep for this host that they are absent
        return lambda: []
    before = set(glob.glob(pattern))
    return lambda: sorted(set(glob.glob(pattern)) - before)


def _predicted_names(config: schema.Config, names: tuple[str, ...], count: int) -> tuple[str, ...]:
    """Names of `count` classes. The head of a dense task predicts all of them, whether the data
    have as many or not; those that they lack are named by their numbers."""
    extra = range(len(names), count) if not config.traits.views else ()
    return (*names[:count], *map(str, extra))


def require_views(config: schema.Config, mode: str, why: str) -> None:
    """Refuse a mode that needs features of whole images for a task that has none."""
    if not config.traits.views:
        raise UserError(f"config.task: {config.task!r} has no --mode={mode}: {why}")


def index_directory(data: schema.Data, workdir: pathlib.Path) -> str:
    """The directory of the indices of the data: data.index, or one in the working directory.

    >>> index_directory(schema.Data(), pathlib.Path("run"))
    'run/index'
    """
    return os.path.expanduser(data.index) or str(workdir / "index")


def make_workdir(workdir: pathlib.Path) -> None:
    """Create a working directory if it does not exist. Raises UserError if that fails, or if the
    first host cannot write to it."""
    try:
        workdir.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"--workdir {workdir}: cannot be created ({error.strerror or error}); choose another"
            " directory"
        ) from error
    check_writable(workdir, f"--workdir {workdir}", "choose another directory")


def require_shared(workdir: pathlib.Path) -> None:
    """Refuse a working directory that is another one on each host, as on local disks: checkpoints
    would be scattered over them. Creates it if it does not exist; all hosts call this.

    Raises:
      UserError: on every host; names those that do not see a file of the first host.

    >>> require_shared(pathlib.Path("/tmp"))
    """
    if parallel.host_names() == 1:
        return
    main = not jax.process_index()
    word = parallel.exchange_values("shared", secrets.token_hex(8) if main else "")[0]
    file = workdir / f".shared-{word}"
    with parallel.fail_together("shared, written"):
        make_workdir(workdir)
        if main:
            file.write_text(word, encoding="utf-8")
    for _ in range(10):
        if seen := file.is_file():
            break
        time.sleep(0.5)  # a network file system may be late
    answers = parallel.exchange_values("shared, seen", "" if seen else "no")
    if main:
        with contextlib.suppress(OSError):
            file.unlink()
    if blind := [parallel.host_label(number) for number, answer in enumerate(answers) if answer]:
        more = f" and {len(blind) - 3} more" if len(blind) > 3 else ""
        raise UserError(
            f"--workdir {workdir}: is another directory on {', '.join(blind[:3])}{more} than on"
            f" {parallel.host_label(0)}; give one that all hosts see, of a network file system or a"
            " mounted bucket"
        )


@contextlib.contextmanager
def lock_workdir(
    workdir: pathlib.Path, *, name: str = "run.lock", shared: bool = False
) -> Iterator[None]:
    """Lock a working directory for one run, or with `shared` for several that write different
    files. It is a kernel lock, which ends with its process and is never stale. The first host holds
    it for all."""
    if jax.process_index():
        yield
        return
    file, holder = _open_lock(workdir / name)
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(file)
        raise UserError(
            f"--workdir {workdir}: is used by another run (process {holder or 'unknown'}); stop it"
            " or choose another directory"
        ) from None
    except OSError as error:
        print(
            f"warning: {workdir} does not support locks ({error.strerror}): make sure that no other"
            " run uses it",
            flush=True,
        )
    with contextlib.suppress(OSError):  # on a full disk: the process id is only for a message
        os.ftruncate(file, 0)
        os.pwrite(file, str(os.getpid()).encode(), 0)
    try:
        yield
    finally:
        os.close(file)


@contextlib.contextmanager
def lock_on_all_hosts(workdir: pathlib.Path) -> Iterator[None]:
    """`lock_workdir`, of a run on several hosts: all are refused where the first is."""
    with contextlib.ExitStack() as locks:
        with parallel.fail_together("run.lock"):
            locks.enter_context(lock_workdir(workdir))
        yield


def _open_lock(path: pathlib.Path) -> tuple[int, str]:
    """The lock file, opened for writing, and the process id in it. Links, and files with any other
    content, are not opened.

    Raises:
      UserError: the path is not a lock file, or cannot be opened.
    """
    try:
        file = os.open(
            path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600
        )
    except OSError as error:
        if path.is_symlink() or path.is_dir():
            raise UserError(
                f"{path}: is {'a link' if path.is_symlink() else 'a directory'}, not the lock of a"
                " run; delete it"
            ) from None
        raise UserError(
            f"{path}: cannot be opened ({error.strerror or error}); choose another --workdir"
        ) from error
    if stat.S_ISREG(os.fstat(file).st_mode) and (
        holder := re.fullmatch(rb"\s*(\d*)\s*", os.read(file, 33))
    ):
        return file, holder[1].decode()
    os.close(file)
    raise UserError(f"{path}: does not contain the process id of a run; move it away")


def check_writable(path: str | os.PathLike[str], flag: str, remedy: str) -> pathlib.Path:
    """Create a directory and try a temporary file in it, on the first host.

    Args:
      path: the directory.
      flag: the flag that names it, with its value, for the message.
      remedy: what the user can do about it.

    Raises:
      UserError: it cannot be written to.

    >>> check_writable("/proc/here", "--out=/proc/here/x.npz", "choose another directory")
    Traceback (most recent call last):
    m3i_jax.errors.UserError: --out=/proc/here/x.npz: cannot write to '/proc/here' (No such ...
    """
    directory = pathlib.Path(path)
    if jax.process_index():
        return directory
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise UserError(
            f"{flag}: cannot write to {str(directory)!r} ({error.strerror or error}); {remedy}"
        ) from error
    return directory
