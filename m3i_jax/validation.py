"""What makes a configuration impossible, said before anything is compiled: the key, the value, the
reason and the way out."""

import dataclasses
import re

from m3i_jax import schema
from m3i_jax.errors import UserError


def _require(condition: bool, key: str, value: object, why: str) -> None:
    if not condition:
        raise UserError(f"config.{key}: {value!r} {why}")


def _ranges(c: schema.Config) -> None:
    a, d, o, t = c.data.augment, c.data, c.optim, c.train
    probabilities = {
        "data.augment.jitter_p": (a.jitter_p,),
        "data.augment.grayscale_p": (a.grayscale_p,),
        "data.augment.blur_p": a.blur_p,
        "data.augment.solarize_p": a.solarize_p,
        "data.augment.erase_p": (a.erase_p,),
        "data.augment.cutmix_switch": (a.cutmix_switch,),
        "data.augment.blend_p": (a.blend_p,),
        "data.rand_augment.p": (d.rand_augment.p,),
        "data.flip_p": (d.flip_p,),
        "data.max_bad_share": (d.max_bad_share,),
        "objective.label_smoothing": (c.objective.label_smoothing,),
        "optim.ema": (o.ema,),
        "optim.encoder_lr": (o.encoder_lr,),
        "optim.layer_decay": (o.layer_decay,),
        "optim.offset_lr": (o.offset_lr,),
        "optim.center_lr": (o.center_lr,),
    }
    for key, values in probabilities.items():
        for value in values:
            _require(0 <= value <= 1, key, value, "must lie in 0..1")
    for key, value in {
        "model.encoder.drop_path": c.model.encoder.drop_path,
        "objective.balance_decay": c.objective.balance_decay,
        "optim.b1": o.b1,
        "optim.b2": o.b2,
    }.items():
        _require(0 <= value < 1, key, value, "must lie in 0..1, 1 excluded")
    _require(0 <= c.seed < 2**63, "seed", c.seed, "must be at least 0 and below 2**63")
    for key, pair in {
        "data.augment.blur_p": a.blur_p,
        "data.augment.solarize_p": a.solarize_p,
    }.items():
        _require(len(pair) == 2, key, pair, "must be two numbers: input view, target view")
    intervals = {
        "data.crop_scale": d.crop_scale,
        "data.crop_ratio": d.crop_ratio,
        "data.augment.blur_sigma": a.blur_sigma,
    }
    for key, pair in intervals.items():
        _require(
            len(pair) == 2 and 0 < pair[0] <= pair[1],
            key,
            pair,
            "must be two positive numbers, the smaller first",
        )
    _require(
        d.crop_scale[1] <= 1,
        "data.crop_scale",
        d.crop_scale,
        "must not exceed 1, the whole picture",
    )
    limits = c.objective.balance_range
    _require(
        len(limits) == 2 and 0 <= limits[0] <= limits[1],
        "objective.balance_range",
        limits,
        "must be two numbers >= 0, the smaller first",
    )
    for key, triple in {"data.augment.mean": a.mean, "data.augment.std": a.std}.items():
        _require(len(triple) == 3, key, triple, "must be three numbers, for R, G and B")
    _require(min(a.std) > 0, "data.augment.std", a.std, "must be positive")
    _require(0 <= a.hue <= 0.5, "data.augment.hue", a.hue, "must lie in 0..0.5 turns")
    for key, value in {
        "brightness": a.brightness,
        "contrast": a.contrast,
        "saturation": a.saturation,
    }.items():
        _require(value >= 0, f"data.augment.{key}", value, "must not be negative")
    _require(
        0 <= d.holdout < 1,
        "data.holdout",
        d.holdout,
        "must lie in 0..1, 1 excluded: nothing would be left to train on",
    )
    _require(
        0 <= d.background <= 255, "data.background", d.background, "must be a gray level, 0..255"
    )
    _require(
        d.caption_length >= 4,
        "data.caption_length",
        d.caption_length,
        "must be at least 4: start, end and two words",
    )
    for key, value in {
        "optim.lr": o.lr,
        "optim.eps": o.eps,
        "objective.gamma": c.objective.gamma,
        "objective.temperature": c.objective.temperature,
        "evaluate.temperature": c.evaluate.temperature,
        "evaluate.probe_lr": c.evaluate.probe_lr,
        "evaluate.attentive_lr": c.evaluate.attentive_lr,
        "data.patience": d.patience,
        "model.encoder.norm_eps": c.model.encoder.norm_eps,
    }.items():
        _require(value > 0, key, value, "must be positive")
    for key, value in {
        "optim.min_lr": o.min_lr,
        "optim.weight_decay": o.weight_decay,
        "optim.clip": o.clip,
        "optim.fan_in_lr": o.fan_in_lr,
        "model.pool.std": c.model.pool.std,
        "optim.skip_spikes": o.skip_spikes,
        "optim.warmup_epochs": o.warmup_epochs,
        "objective.second_moment": c.objective.second_moment,
        "objective.text_chunk": c.objective.text_chunk,
        "train.steps": t.steps,
        "train.epochs": t.epochs,
        "train.panel_every": t.panel_every,
        "train.eval_every": t.eval_every,
        "train.watchdog": t.watchdog,
        "train.watchdog_first": t.watchdog_first,
        "train.watchdog_abort": t.watchdog_abort,
        "report.peak_tflops": c.report.peak_tflops,
        "data.threads": d.threads,
        "data.workers": d.workers,
        "data.size": d.size,
        "data.augment.mixup": a.mixup,
        "data.augment.cutmix": a.cutmix,
        "data.rand_augment.ops": d.rand_augment.ops,
        "data.rand_augment.deviation": d.rand_augment.deviation,
        "model.category_std": c.model.category_std,
        "model.encoder.position_grid": c.model.encoder.position_grid,
        "evaluate.probe_warmup": c.evaluate.probe_warmup,
        "parallel.heartbeat": c.parallel.heartbeat,
    }.items():
        _require(value >= 0, key, value, "must not be negative")
    for key, value in {
        "train.batch_size": t.batch_size,
        "train.microbatches": t.microbatches,
        "train.log_every": t.log_every,
        "train.save_every": t.save_every,
        "train.keep": t.keep,
        "evaluate.k": c.evaluate.k,
        "evaluate.batch_size": c.evaluate.batch_size,
        "data.image_size": d.image_size,
        "evaluate.train_limit": c.evaluate.train_limit,
        "evaluate.query_limit": c.evaluate.query_limit,
        "evaluate.shot_seeds": c.evaluate.shot_seeds,
        "evaluate.shots": min(c.evaluate.shots, default=0),
        "evaluate.probe_epochs": c.evaluate.probe_epochs,
        "evaluate.probe_batch": c.evaluate.probe_batch,
        "evaluate.attentive_epochs": c.evaluate.attentive_epochs,
        "evaluate.attentive_limit": c.evaluate.attentive_limit,
        "evaluate.neighbours": c.evaluate.neighbours,
        "report.panel_rows": c.report.panel_rows,
        "report.profile_steps": c.report.profile_steps,
        "compare.compare_seeds": c.compare.seeds,
    }.items():
        _require(value >= 1, key, value, "must be at least 1")
    _require(
        0 <= d.rand_augment.magnitude <= 10,
        "data.rand_augment.magnitude",
        d.rand_augment.magnitude,
        "must lie in 0..10",
    )
    _require(
        0 < c.evaluate.crop <= 1,
        "evaluate.crop",
        c.evaluate.crop,
        "must be a share of the short side, above 0 and at most 1",
    )
    _require(
        bool(c.evaluate.templates),
        "evaluate.templates",
        c.evaluate.templates,
        "must name a set of prompts: 7, 80 or a file",
    )
    _require(
        0 < c.report.mfu <= 1,
        "report.mfu",
        c.report.mfu,
        "must be a share of the peak, above 0 and at most 1",
    )
    _require(o.min_lr <= o.lr, "optim.min_lr", o.min_lr, f"must not exceed optim.lr, {o.lr!r}")
    _require(
        d.vocabulary_size >= 259,
        "data.vocabulary_size",
        d.vocabulary_size,
        "must be at least 259: all bytes, padding, start and end",
    )


def _towers(c: schema.Config) -> None:
    m = c.model
    for key, width, heads in (
        ("model.decoder.heads", m.decoder.width, m.decoder.heads),
        ("model.text.heads", m.text.width, m.text.heads),
        ("model.pool.heads", m.encoder.width, m.pool.heads),
    ):
        _require(
            heads >= 1 and width % max(heads, 1) == 0, key, heads, f"must divide the width {width}"
        )
    for tower in ("encoder", "decoder", "text"):
        settings = getattr(m, tower)
        _require(settings.depth >= 1, f"model.{tower}.depth", settings.depth, "must be at least 1")
        _require(
            settings.mlp_ratio > 0,
            f"model.{tower}.mlp_ratio",
            settings.mlp_ratio,
            "must be positive",
        )
    for key, value in {
        "model.encoder.width": m.encoder.width,
        "model.decoder.width": m.decoder.width,
    }.items():
        _require(
            value % 4 == 0,
            key,
            value,
            "must be a multiple of 4: a quarter each for the sine and cosine of rows and columns",
        )
    probing = m.pool.norm == "batch"
    _require(
        not probing or m.pool.kind == "mean",
        "model.pool.norm",
        m.pool.norm,
        "is of model.pool.kind=mean alone; use layer",
    )
    _require(
        not probing or not m.pool.projection,
        "model.pool.norm",
        m.pool.norm,
        "needs model.pool.projection=false: a linear probe is linear",
    )
    _require(m.pool.width >= 1, "model.pool.width", m.pool.width, "must be at least 1")
    _require(m.text.embed >= 1, "model.text.embed", m.text.embed, "must be at least 1")


def validate_settings(c: schema.Config) -> None:
    """Raise UserError for the first setting that cannot work, whatever the data and the devices
    are."""
    _ranges(c)
    _towers(c)
    _compared(c)
    _start(c)
    patch, image = c.model.encoder.patch_size, c.data.image_size
    _require(
        patch >= 1 and image % max(patch, 1) == 0,
        "data.image_size",
        image,
        f"must be a multiple of model.encoder.patch_size, {patch}",
    )
    _require(
        2 <= c.grid <= 64,
        "data.image_size",
        image,
        f"gives a grid of {c.grid} x {c.grid} patches of {patch}; 2 to 64 a side work",
    )
    cell = c.data.mask_cell
    _require(
        cell >= 0 and cell % patch == 0 and image % max(cell, 1) == 0,
        "data.mask_cell",
        cell,
        f"must be a multiple of model.encoder.patch_size, {patch}, that divides data.image_size,"
        f" {image}; 0 is a patch",
    )
    _require(
        0 < c.hidden < c.tokens,
        "data.mask_ratio",
        c.data.mask_ratio,
        f"must hide at least one and not all of the {c.tokens} cells",
    )
    _require(
        c.train.batch_size % 2 == 0,
        "train.batch_size",
        c.train.batch_size,
        "must be even: images are mixed in pairs",
    )
    mesh = c.parallel.mesh
    _require(
        len(mesh) == 3 and all(n >= 1 or n == -1 for n in mesh) and list(mesh).count(-1) <= 1,
        "parallel.mesh",
        mesh,
        "must be three numbers, the devices along (replica, fsdp, tensor), at most one of them -1",
    )
    steps, warm = c.train.steps, c.optim.warmup_steps
    _require(
        warm >= -1, "optim.warmup_steps", warm, "must be at least 0, or -1 for optim.warmup_epochs"
    )
    _require(
        not steps or warm <= steps,
        "optim.warmup_steps",
        warm,
        f"must not exceed train.steps, {steps}",
    )
    _require(
        bool(steps or c.train.epochs),
        "train.epochs",
        c.train.epochs,
        "gives no step to train; set train.epochs or train.steps",
    )


def _start(c: schema.Config) -> None:
    for pattern in c.init.only:
        try:
            re.compile(pattern)
        except re.error as error:
            raise UserError(
                f"config.init.only: {pattern!r} is no regular expression ({error}); use one such as"
                " ^encoder/"
            ) from error
    plain = schema.Init()
    for field in dataclasses.fields(plain):
        asked = getattr(c.init, field.name) != getattr(plain, field.name)
        why = (
            f"is empty, but config.init.{field.name} asks for something of it; name a run or a file"
            " of weights"
        )
        _require(bool(c.init_from) or not asked, "init_from", c.init_from, why)


def _compared(c: schema.Config) -> None:
    forms = c.compare.forms
    _require(
        bool(forms),
        "compare.forms",
        forms,
        "must name at least one objective, such as mim,mim+clip,m3i",
    )
    for form in forms:
        _require(
            all(form.split("+")),
            "compare.forms",
            form,
            "must be names joined by +, such as mim+clip",
        )
    twice = [form for form in forms if forms.count(form) > 1]
    _require(not twice, "compare.forms", forms, f"names {twice[0] if twice else ''} twice")


def validate_devices(c: schema.Config, shape: tuple[int, int, int]) -> None:
    """Raise UserError if the batch cannot be split over a mesh of this (replica, fsdp, tensor)
    shape."""
    unit, why = _unit(c, shape)
    below = c.train.batch_size // unit * unit
    _require(
        c.train.batch_size % unit == 0,
        "train.batch_size",
        c.train.batch_size,
        f"must be a multiple of {why}; nearest: {f'{below} or ' if below else ''}{below + unit}",
    )


def _unit(c: schema.Config, shape: tuple[int, int, int]) -> tuple[int, str]:
    shards, parts = shape[0] * shape[1], c.train.microbatches
    unit = 2 * shards * parts
    return unit, f"{unit}: 2 images mixed x {shards} data shards x {parts} microbatches"


def fit_batch_to_mesh(c: schema.Config, shape: tuple[int, int, int]) -> tuple[schema.Config, str]:
    """The configuration on a mesh of this (replica, fsdp, tensor) shape, and one line if its batch
    was rounded up for it, else "".

    Raises:
      UserError: a batch that cannot be split over the mesh, without `train.round_batch`.

    >>> config = schema.Config(train=schema.Train(batch_size=40_000, round_batch=True))
    >>> fit_batch_to_mesh(config, (8, 8, 1))[0].train.batch_size, fit_batch_to_mesh(config, (256, 1, 1))[0].train.batch_size
    (40064, 40448)
    """
    asked, (unit, why) = c.train.batch_size, _unit(c, shape)
    told = ""
    if c.train.round_batch and asked % unit:
        c = dataclasses.replace(
            c, train=dataclasses.replace(c.train, batch_size=-(-asked // unit) * unit)
        )
        told = (
            f"train.batch_size: {asked:,} rounded up to {c.train.batch_size:,}, a multiple of {why}"
        )
    validate_devices(c, shape)
    return c, told
