"""What the modes that read data share: the source, its splits and tokenizer, the completed configuration and the working directory."""

import contextlib
import dataclasses
import fcntl
import functools
import os
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any

import jax

from m3i_jax import checks, parallel, schema
from m3i_jax.data import central, parts, pipeline, tokenizer
from m3i_jax.errors import UserError
from m3i_jax.training import plan


def complete(config: schema.Config, *, classes: int, captions: bool, size: int) -> schema.Config:
    """The configuration with what only the data knows: its categories, whether captions are used, its training pictures."""
    data = dataclasses.replace(config.data, classes=classes, captions="yes" if captions else "no", size=size)
    return dataclasses.replace(config, data=data)


@dataclasses.dataclass(kw_only=True)
class Job:
    """A completed run: settings, devices and data."""

    config: schema.Config
    mesh: jax.sharding.Mesh
    train: Any
    held_out: Any
    classes: tuple[str, ...]
    tokenizer: tokenizer.Tokenizer | None
    workdir: pathlib.Path

    @property
    def fingerprint(self) -> str:
        return pipeline.fingerprint(self.config, self.train)

    @property
    def identity(self) -> str:
        """What the fingerprint is made of, a line each."""
        return pipeline.identity(self.config, self.train)

    def batches(self, start: int) -> Any:
        """Host batches from sample `start` on."""
        return pipeline.iterate(self.config, self.train, self.tokenizer, start=start, host=jax.process_index(), hosts=jax.process_count())


def placed(config: schema.Config) -> tuple[schema.Config, jax.sharding.Mesh]:
    """The configuration, its batch rounded if so configured, and its mesh on the devices that are here; refuses a batch that cannot be
    split over it."""
    mesh = parallel.make_mesh(config.parallel.mesh)
    config, told = checks.fitted(config, tuple(mesh.shape[a] for a in parallel.AXES))  # type: ignore[arg-type]
    if told and not jax.process_index():
        print(told, flush=True)
    return config, mesh


def with_forms(config: schema.Config, forms: tuple[str, ...]) -> schema.Config:
    """The same configuration with another objective."""
    return dataclasses.replace(config, objective=dataclasses.replace(config.objective, forms=forms))


def open_job(config: schema.Config, workdir: str, *, trains: Iterable[tuple[str, ...]] = ()) -> Job:
    """Open the data of a configuration and complete it.

    Args:
      config: settings.
      workdir: where the index of the data and the vocabulary are kept.
      trains: the objectives (names of forms) that will be trained on it. If none of them reads captions, there is no vocabulary to learn
        and no token to carry, unless `data.captions` is "yes". Empty: whoever opens the data looks at all of it.
    """
    config, devices = placed(config)
    place = pathlib.Path(workdir)
    place.mkdir(mode=0o700, parents=True, exist_ok=True)
    with parallel.first("index"):  # the first host reads the headers of all files, the others read what it kept
        train, held_out = parts.open_parts(config.data, cache=str(place / "index"))
    count, captions = pipeline.classes(config.data, train), pipeline.uses_captions(config.data, train)
    done = complete(config, classes=count, captions=captions, size=len(train))
    plans = [plan.read(with_forms(done, forms)) for forms in trains]  # refused here, before a vocabulary is learnt
    if captions and config.data.captions == "auto" and plans and not any(each.where("text") for each in plans):
        captions = False
        done = complete(config, classes=count, captions=False, size=len(train))
    with parallel.first("tokenizer"):
        words = tokenizer.open_tokenizer(done.data, train, str(place / "tokenizer.json")) if captions else None
    names = tuple(train.classes[:count])
    return Job(config=done, mesh=devices, train=train, held_out=held_out, classes=names, tokenizer=words, workdir=place)


@contextlib.contextmanager
def lock(workdir: pathlib.Path) -> Iterator[None]:
    """One run a working directory. The lock is the kernel's and ends with the process that holds it, so it is never stale. Of several
    hosts, the first holds it for all."""
    if jax.process_index():
        yield
        return
    file = os.open(workdir / "run.lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        holder = os.read(file, 32).decode(errors="replace").strip()
        os.close(file)
        raise UserError(
            f"--workdir {workdir}: another run (process {holder or 'unknown'}) is working there; stop it or choose another directory"
        ) from None
    os.ftruncate(file, 0)
    os.write(file, str(os.getpid()).encode())
    try:
        yield
    finally:
        os.close(file)


def _evaluation_rows(job: Job) -> int:
    """Rows of a device step of evaluation: at least what is asked for, and a multiple of the devices."""
    shards = job.mesh.shape["replica"] * job.mesh.shape["fsdp"]
    return -(-job.config.evaluate.batch_size // shards) * shards


def evaluation_batches(job: Job, source: Any, limit: int) -> Iterator[dict[str, Any]]:
    """Clean views of at most `limit` pictures, spread evenly over the source, in batches that divide over the devices."""
    count = min(limit, len(source))
    indices = [i * len(source) // count for i in range(count)]
    return central.evaluation_batches(
        source, indices, job.config.data.image_size, _evaluation_rows(job), background=job.config.data.background
    )


def evaluators(job: Job, say: Any) -> list[Any]:
    """The evaluators that this data and this objective can feed; one line for each asked for that they cannot."""
    from m3i_jax.evaluation import features, knn, linear, retrieval

    config, ask, terms = job.config, job.config.evaluate, plan.read(job.config)
    trained = bool(terms.where("category", "text"))
    if ask.features == "attention" and not trained:
        raise UserError(
            "config.evaluate.features: 'attention' needs an objective that trains the pooling: category or text; use 'auto' or 'mean'"
        )
    pool = ask.features == "attention" or (ask.features == "auto" and trained)
    measures: list[features.Measure] = []
    by_label = [name for name, wanted in (("kNN", ask.knn), ("linear", ask.linear)) if wanted]
    by_text = ask.retrieval and bool(terms.where("text")) and job.tokenizer is not None
    if by_label and not job.classes:
        say(f"no {' and '.join(by_label)} evaluation: the source has no categories")
        by_label = []
    if (by_label or by_text) and not len(job.held_out):
        say("no evaluation: no pictures are held out; set config.data.holdout")
        return []
    if "kNN" in by_label:
        measures.append(knn.measure(config))
    if "linear" in by_label:
        measures.append(linear.measure())
    if by_text:
        assert job.tokenizer is not None
        size = _evaluation_rows(job)
        pictures = "queries" if pool else "pooled queries"
        measures.append(retrieval.measure(config, job.mesh, job.held_out, job.tokenizer, pictures=pictures, batch=size))
    if not measures:
        return []
    extract = features.Extractor(config, job.mesh, attention=pool)
    index = functools.partial(evaluation_batches, job, job.train, ask.train_limit)
    queries = functools.partial(evaluation_batches, job, job.held_out, ask.query_limit)
    sets = {"index": features.pictures(extract, index), "queries": features.pictures(extract, queries)}
    if by_text and not pool:
        sets["pooled queries"] = features.pictures(features.Extractor(config, job.mesh, attention=True), queries)
    return [features.evaluator(config, sets, measures)]
