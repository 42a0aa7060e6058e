"""Validation of settings and devices before anything is compiled. Every error names the key, the
value, the reason and the fix."""

import dataclasses

from m3i_jax import schema
from m3i_jax.errors import UserError, shorten
from m3i_jax.objective import masks, registry, terms
from m3i_jax.schema.limits import check_limits


def _require(condition: bool, key: str, value: object, why: str) -> None:
    if not condition:
        raise UserError(f"config.{key}: {shorten(value)} {why}")


def _validate_combinations(c: schema.Config) -> None:
    """Constraints between settings. The limits of single settings are in the schema."""
    d, o, m = c.data, c.optim, c.model
    _require(
        o.min_lr <= o.lr or not o.lr,
        "optim.min_lr",
        o.min_lr,
        f"must not exceed optim.lr, {o.lr!r}",
    )
    if o.rule == "schedule_free":
        _require(
            o.schedule == "constant",
            "optim.schedule",
            o.schedule,
            "lowers the learning rate, and optim.rule=schedule_free averages instead; use constant",
        )
        _require(o.b1 > 0, "optim.b1", o.b1, "must be positive with optim.rule=schedule_free")
    _require(
        o.schedule != "steps" or bool(o.milestones),
        "optim.milestones",
        o.milestones,
        "leaves the learning rate of optim.schedule=steps constant; give the shares of the run"
        " after which it is a tenth, such as (0.8,0.9), or use optim.schedule=constant",
    )
    _require(
        bool(c.train.watchdog and c.train.watchdog_first) or not c.train.watchdog_abort,
        "train.watchdog_abort",
        c.train.watchdog_abort,
        "counts reports of the watchdog, which is off; set train.watchdog and watchdog_first",
    )
    _require(
        not d.vocabulary or d.tokenizer == "clip",
        "data.vocabulary",
        d.vocabulary,
        f"has no effect: it applies to data.tokenizer=clip, and the tokenizer is {d.tokenizer};"
        " leave it empty",
    )
    for field in dataclasses.fields(m):
        section = getattr(m, field.name)
        if not hasattr(section, "mlp_ratio"):
            continue
        width, ratio = section.width, section.mlp_ratio
        _require(
            width * ratio >= 1,
            f"model.{field.name}.mlp_ratio",
            ratio,
            f"makes the MLP narrower than one unit at width {width}",
        )


def _validate_networks(c: schema.Config) -> None:
    m = c.model
    towers = (
        ("model.decoder.heads", m.decoder.width, m.decoder.heads),
        ("model.text.heads", m.text.width, m.text.heads),
        ("model.captioner.heads", m.captioner.width, m.captioner.heads),
        ("model.pool.heads", m.encoder.width, m.pool.heads),
    )
    for key, width, heads in towers if c.traits.views else ():
        _require(width % heads == 0, key, heads, f"must divide the width {width}")
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
        "applies to model.pool.kind=mean only; use layer",
    )
    _require(
        not probing or not m.pool.projection,
        "model.pool.norm",
        m.pool.norm,
        "needs model.pool.projection=false: a linear probe is linear",
    )


def validate_settings(c: schema.Config) -> None:
    """Check settings as far as they do not depend on data and devices.

    Raises:
      UserError: the first impossible setting.
    """
    check_limits(c.train, "train.")  # first, since recipes derive rates from the batch size
    check_limits(c)
    _validate_combinations(c)
    _validate_networks(c)
    _validate_compare(c)
    _validate_init(c)
    patch, image = c.model.encoder.patch_size, c.data.image_size
    _require(
        image % patch == 0,
        "data.image_size",
        image,
        f"must be a multiple of model.encoder.patch_size, {patch}",
    )
    for group in c.small_views:
        _require(
            group.size % patch == 0,
            "data.small_views",
            str(group),
            f"is smaller than a patch of {patch} pixels; use at least {patch}"
            if group.size < patch
            else f"must have a size that is a multiple of model.encoder.patch_size, {patch}",
        )
    if c.traits.pairs:
        _validate_masks(c)
    if c.task == "segment":
        stride = c.dense.segment.test_stride
        _require(
            stride <= image or c.dense.segment.test_whole > 0,
            "dense.segment.test_stride",
            stride,
            f"leaves pixels between windows of data.image_size, {image}, that no window shows; use"
            f" at most {image}, or 0 for half of it",
        )
    mesh = c.parallel.mesh
    _require(
        0 not in mesh and list(mesh).count(-1) <= 1,
        "parallel.mesh",
        mesh,
        "must be three numbers, the devices along (replica, fsdp, tensor), at most one of them -1",
    )
    steps, warm = c.train.steps, c.optim.warmup_steps
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


def _validate_masks(c: schema.Config) -> None:
    """Constraints of images that are masked and mixed in pairs."""
    patch, image = c.model.encoder.patch_size, c.data.image_size
    _require(
        2 <= c.grid <= 64,
        "data.image_size",
        image,
        f"gives a grid of {c.grid} x {c.grid} patches of {patch}; 2 to 64 a side work",
    )
    cell = c.data.mask_cell
    _require(
        cell % patch == 0 and image % max(cell, 1) == 0,
        "data.mask_cell",
        cell,
        f"must be a multiple of model.encoder.patch_size, {patch}, that divides data.image_size,"
        f" {image}; 0 means one patch",
    )
    if c.data.mask == "multi_block":
        one = masks.block_cells(c.grid, c.data.mask_block_share)
        _require(
            c.data.mask_blocks * one <= c.hidden and c.cell == 1,
            "data.mask_ratio",
            c.data.mask_ratio,
            f"hides {c.hidden} of {c.tokens} cells, and {c.data.mask_blocks} target blocks of"
            f" {one} need {c.data.mask_blocks * one}; raise it, or lower data.mask_block_share"
            if c.cell == 1
            else "is of single patches with data.mask=multi_block; leave data.mask_cell at 0",
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


def _validate_init(c: schema.Config) -> None:
    plain = schema.Init()
    for field in dataclasses.fields(plain):
        changed = getattr(c.init, field.name) != getattr(plain, field.name)
        why = f"is empty, but config.init.{field.name} needs it; name a run or a file of weights"
        _require(bool(c.init_from) or not changed, "init_from", c.init_from, why)


def _validate_compare(c: schema.Config) -> None:
    for form in c.compare.forms:
        _require(
            all(form.split("+")),
            "compare.forms",
            form,
            "must be names joined by +, such as mim+clip",
        )


# Of schema.Data, what cuts and masks square views.
_OF_VIEWS = ("crop_", "flip_p", "mask", "small_views")
# Of schema.Detect, what proposals and regions need, and schema.Segment, what pixel losses need.
_OF_REGIONS = (
    *("anchor_sizes", "anchor_ratios", "rpn_convs", "rpn_samples", "rpn_nms", "proposals"),
    *("test_proposals", "rois", "roi_foreground", "canonical", "box_convs", "box_hidden"),
    *("mask_convs", "candidates", "nms"),
)
_OF_UPERNET = ("pool_scales", "aux_width", "aux_weight", "norm_momentum")
# By section and head: what it does not read. Heads of other packages may read everything.
_UNREAD_BY_HEAD = {
    ("detect", "mask_rcnn"): ("dino.", "mask2former."),
    ("detect", "dino"): (*_OF_REGIONS, "mask2former."),
    ("detect", "mask2former"): (*_OF_REGIONS, "dino."),
    ("segment", "upernet"): ("mask2former.",),
    ("segment", "linear"): (*_OF_UPERNET, "strides", "width", "mask2former."),
    ("segment", "mask2former"): (*_OF_UPERNET, "dropout", "classifier_std", "divide_by"),
}


def unread_by_task(c: schema.Config) -> dict[str, str]:
    """Returns the settings that the task, its head and its rule of geometry do not read, and why:
    names of settings, or of sections with a dot at the end. Tasks and heads of other packages may
    read all settings of dense tasks.

    >>> list(unread_by_task(schema.Config()))  # `dense.maps` says what initial weights are of
    ['dense.geometry.', 'dense.segment.', 'dense.detect.']
    """
    if c.task == "pretrain":
        parts = ("dense.geometry.", "dense.segment.", "dense.detect.")
        return dict.fromkeys(parts, "config.task=pretrain trains no detector and no segmenter")
    found: dict[str, str] = {}
    if not c.traits.views:
        of_pixels = [f.name for f in dataclasses.fields(schema.Augment)]
        names = [f.name for f in dataclasses.fields(schema.Data) if f.name.startswith(_OF_VIEWS)]
        found = dict.fromkeys(
            [
                *("objective.", "data.rand_augment."),
                *(f"data.augment.{name}" for name in of_pixels if name not in ("mean", "std")),
                *(f"data.{name}" for name in names),
            ],
            f"config.task={c.task} does not read it; dense.geometry has crops and flips, and dense"
            " the losses",
        )
    if c.task not in ("detect", "segment"):
        return found
    detects, g = c.task == "detect", c.dense.geometry
    of_task, of_rule = f"config.task={c.task} does not read it", f"dense.geometry.rule={g.rule}"
    other = ("category_share",) if detects else ("max_objects", "mask_size", "repeat", "test_short")
    found |= {f"dense.geometry.{name}": of_task for name in other}
    found["dense.segment." if detects else "dense.detect."] = of_task
    by_rule = {
        "range": ("long", "short"),
        "buckets": ("buckets", "crop_p", "crop_short", "crop_sides"),
    }
    for rule, of_it in by_rule.items():
        if g.rule != rule:
            found |= {f"dense.geometry.{name}": f"{of_rule} does not read it" for name in of_it}
    if g.rule == "buckets":
        found["dense.geometry.scale"] = f"{of_rule} scales images to the canvas"
    head, part = (c.dense.detect if detects else c.dense.segment).head, f"dense.{c.task}"
    unread = _UNREAD_BY_HEAD.get((c.task, head), ())
    found |= {f"{part}.{name}": f"{part}.head={head} does not read it" for name in unread}
    if (detects, head) == (True, "dino"):
        found["dense.detect.nms"] += "; set dense.detect.dino.nms"
    if detects and unread and c.dense.detect.loss != "federated":
        found["dense.detect.federated_classes"] = "dense.detect.loss=softmax does not read it"
    return found


def validate_devices(c: schema.Config, shape: tuple[int, int, int]) -> None:
    """Check that the batch, and prototypes that are a target's, can be split over a mesh of this
    (replica, fsdp, tensor) shape.

    Raises:
      UserError: it cannot.
    """
    rows = [registry.forms().get(terms.LETTERS.get(name, name), ()) for name in c.objective.forms]
    if any(
        getattr(t.head, "prototypes", "") or getattr(t.head, "clusters", "")
        for row in rows
        for t in row
    ):
        _require(
            c.model.head.prototypes >= shape[1],
            "model.head.prototypes",
            c.model.head.prototypes,
            f"is fewer than the {shape[1]} devices of the axis fsdp, which share them; use at least"
            f" {shape[1]}",
        )
    unit, why = _batch_unit(c, shape)
    below = c.train.batch_size // unit * unit
    _require(
        c.train.batch_size % unit == 0,
        "train.batch_size",
        c.train.batch_size,
        f"must be a multiple of {why}; nearest: {f'{below} or ' if below else ''}{below + unit}",
    )


def _batch_unit(c: schema.Config, shape: tuple[int, int, int]) -> tuple[int, str]:
    shards, parts = shape[0] * shape[1], c.train.microbatches
    if not c.traits.pairs:
        return shards * parts, f"{shards * parts}: {shards} data shards x {parts} microbatches"
    unit = 2 * shards * parts
    return unit, f"{unit}: 2 images mixed x {shards} data shards x {parts} microbatches"


def fit_batch_to_mesh(c: schema.Config, shape: tuple[int, int, int]) -> tuple[schema.Config, str]:
    """Returns the configuration for a mesh of this (replica, fsdp, tensor) shape, with a log line
    if the batch was rounded up, else "".

    Raises:
      UserError: a batch that cannot be split over the mesh, without `train.round_batch`.

    >>> config = schema.Config(train=schema.Train(batch_size=40_000, round_batch=True))
    >>> shapes = (8, 8, 1), (256, 1, 1)
    >>> [fit_batch_to_mesh(config, shape)[0].train.batch_size for shape in shapes]
    [40064, 40448]
    """
    batch, (unit, why) = c.train.batch_size, _batch_unit(c, shape)
    message = ""
    if c.train.round_batch and batch % unit:
        rounded = -(-batch // unit) * unit
        c = dataclasses.replace(c, train=dataclasses.replace(c.train, batch_size=rounded))
        message = f"train.batch_size: {batch:,} rounded up to {rounded:,}, a multiple of {why}"
    validate_devices(c, shape)
    return c, message
