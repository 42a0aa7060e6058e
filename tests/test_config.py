"""Configuration: refused values with their messages, and accepted values, which stay unchanged."""

import contextlib
import dataclasses
import operator
import os

import pytest

from m3i_jax import config, modes, schema, validation
from m3i_jax.errors import UserError

BAD = {
    # unknown keys, with the closest known key
    "optimm.lr=1": "config.optim.lr",
    "optim.lrr=1": "config.optim.lr",
    "lr=1": "config.optim.lr",
    "train.batchsize=8": "config.train.batch_size",
    "model.encoder.width_=8": "config.model.encoder.width",
    "data.imagesize=8": "config.data.image_size",
    "zzz=1": "--help",
    "optim=1": "config.optim",
    # wrong types
    "optim.lr=fast": "is not a number",
    "optim.lr=1e-3j": "is not a number",
    "optim.lr=nan": "is not a number",
    "optim.lr=1e999": "is not finite",
    "optim.lr=__import__('os')": "is not a number",
    "train.steps=1.5": "is not a whole number",
    "train.batch_size=many": "is not a whole number",
    "train.batch_size=True": "is not a whole number",
    "model.scan=1": "is not true or false",
    "evaluate.knn=maybe": "is not true or false",
    "data.crop_scale=a": "is not a list of numbers",
    "data.crop_scale=(0.2,'x')": "is not a number",
    "parallel.mesh=1.5,1,1": "is not a whole number",
    "optim.lr": "has no value",
    "optim.lr=": "is not a number",
    # not among the choices
    "data.source=folders": "did you mean folder?",
    "data.mask=blockwide": "did you mean blockwise?",
    "data.captions=maybe": "auto, yes, no",
    "data.tokenizer=bpe": "train, clip",
    "model.dtype=float16": "did you mean bfloat16?",
    "model.remat=all": "none, dots, names, half, full",
    "model.encoder.drop_path_rule=cosine": "linear, uniform",
    "model.text.pool=eot": "first, last, mean",
    "objective.weighting=static": "dynamic, fixed",
    "objective.intra_positions=masked": "all, hidden",
    "objective.text_softmax=device": "batch, microbatch",
    # impossible values
    "objective.text_chunk=-2": "must not be negative",
    "data.image_size=225": "multiple of model.encoder.patch_size",
    "data.image_size=16": "2 to 64 a side",
    "data.image_size=0": "at least 1",
    "model.encoder.patch_size=0": "at least 1",
    "model.encoder.heads=0": "at least 1",
    "model.decoder.heads=5": "must divide the width 768",
    "model.text.heads=5": "must divide the width 768",
    "model.pool.heads=5": "must divide the width 768",
    "model.encoder.depth=0": "at least 1",
    "model.encoder.drop_path=1.5": "0..1",
    "model.encoder.mlp_ratio=0": "positive",
    "data.mask_ratio=0": "at least one and not all",
    "data.mask_ratio=1": "at least one and not all",
    "data.holdout=1": "0..1",
    "data.flip_p=2": "0..1",
    "data.crop_scale=(0.5,0.1)": "the smaller first",
    "data.crop_scale=(0.5,1.5)": "0..1, 0 excluded",
    "data.crop_scale=0.5": "two numbers",
    "data.augment.hue=0.7": "0..0.5",
    "data.augment.std=(0,1,1)": "must be positive",
    "data.augment.mean=(0,1)": "three numbers",
    "data.augment.blur_p=(1.0,)": "input view, target view",
    "data.caption_length=2": "at least 4",
    "data.vocabulary_size=100": "at least 259",
    "data.background=300": "0..255",
    "data.workers=-1": "must not be negative",
    "train.batch_size=5": "must be even",
    "train.batch_size=0": "at least 1",
    "train.microbatches=0": "at least 1",
    "train.log_every=0": "at least 1",
    "train.keep=0": "at least 1",
    "train.epochs=0": "no step to train",
    "train.steps=-3": "must not be negative",
    "optim.lr=-1": "must be positive",
    "optim.min_lr=1": "must not exceed optim.lr",
    "optim.b1=1": "0..1, 1 excluded",
    "optim.b2=1": "0..1, 1 excluded",
    "objective.balance_decay=1": "0..1, 1 excluded",
    "model.encoder.drop_path=1": "0..1, 1 excluded",
    "objective.temperature=0": "must be positive",
    "seed=-1": "must not be negative",
    "seed=9223372036854775808": "must be at most 9,223,372,036,854,775,807",
    "init.weights=ema": "config.init.weights needs it",
    "optim.ema=2": "0..1",
    "optim.warmup_steps=-2": "at least -1",
    "objective.gamma=0": "must be positive",
    "objective.balance_range=(2,1)": "the smaller first",
    "parallel.mesh=(2,2)": "(replica, fsdp, tensor)",
    "parallel.mesh=(-1,-1,1)": "at most one of them -1",
    "parallel.mesh=(0,1,1)": "three numbers",
    "evaluate.k=0": "at least 1",
    "data.classes=-5": "at least -1",
    "optim.lr=1e300": "at most 1e+06",
    "train.epochs=1e300": "at most 1e+06",
    "data.size=1000000000000000": "at most 1,099,511,627,776",
    "objective.forms=m3i,m3i": "names m3i twice",
    "objective.parallel_captions=-0.5": "0..1, or be -1",
    "data.vocabulary=/nope": "has no effect",  # without data.tokenizer=clip
    "data.path=~nosuchuser/x": "the home directory of an unknown user, ~nosuchuser",
    "model.text.width=0": "at least 1",
    "model.decoder.width=0": "at least 1",
    "model.head.hidden=0": "at least 1",
    "model.encoder.mlp_ratio=0.001": "at least 0.01",
    f"optim.lr={'1' * 5000}": "is not a number",
    f"parallel.mesh={'(' * 5000}": "is not a list of numbers",
    f"train.steps={'-' * 20000}1": "is not a whole number",
    "evaluate.shots=5,5": "names 5 twice",
    "init.only=x(": "is not a regular expression",
    "report.licence=a\nb": "one line without control characters",
}


@pytest.mark.parametrize("assignment", BAD)
def test_bad_settings_are_refused_with_key_and_fix(assignment: str) -> None:
    cfg = config.default_config()
    with pytest.raises(UserError) as refusal:
        config.apply_overrides(cfg, [assignment])
        config.resolve(cfg)
    text = str(refusal.value)
    assert BAD[assignment] in text and "\n" not in text and len(text) < 400
    assert assignment.partition("=")[0].split(".")[-1] in text  # the key is named


@pytest.mark.parametrize(
    ("stride", "whole", "fits"), [(64, 0, True), (65, 0, False), (65, 32, True)]
)
def test_windows_of_segmentation_leave_no_pixel_out(stride: int, whole: int, fits: bool) -> None:
    """Pixels that no window shows would all be of class 0."""
    cfg = config.default_config()
    settings = ["task=segment", "data.image_size=64", f"dense.segment.test_stride={stride}"]
    config.apply_overrides(cfg, [*settings, f"dense.segment.test_whole={whole}"])
    words = "config.dense.segment.test_stride: 65 leaves pixels .* use at most 64, or 0"
    with contextlib.nullcontext() if fits else pytest.raises(UserError, match=words):
        config.resolve(cfg)


@pytest.mark.parametrize("task", ["detect", "segment"])
def test_an_average_that_a_dense_run_does_not_keep_is_not_evaluated(task: str) -> None:
    cfg = config.default_config()
    config.apply_overrides(cfg, [f"task={task}", "evaluate.encoder=ema"])
    with pytest.raises(UserError, match="config.evaluate.encoder: 'ema' needs optim.ema_of=all"):
        modes.refuse_missing("eval", config.resolve(cfg), "")
    config.apply_overrides(cfg, ["optim.ema_of=all"])
    modes.refuse_missing("eval", config.resolve(cfg), "")


@pytest.mark.parametrize("task", ["pretrain", "detect"])
def test_an_average_that_never_moves_is_not_evaluated(task: str) -> None:
    """With a momentum of 1 it is what the run started from."""
    cfg = config.default_config()
    config.apply_overrides(cfg, [f"task={task}", "optim.ema_of=all", "optim.ema=1"])
    modes.refuse_missing("eval", config.resolve(cfg), "")
    cfg.evaluate.encoder = "ema"
    for mode in ("train", "compare"):
        with pytest.raises(UserError, match="optim.ema=1 the run has no momentum average"):
            modes.refuse_missing(mode, config.resolve(cfg), "")
    cfg.optim.ema = -1.0  # open: follows from batch and length
    modes.refuse_missing("train", config.resolve(cfg), "")


def test_a_watchdog_that_is_off_ends_no_run() -> None:
    for off in ("watchdog", "watchdog_first"):
        cfg = config.default_config()
        config.apply_overrides(cfg, [f"train.{off}=0", "train.watchdog_abort=1"])
        with pytest.raises(UserError, match="watchdog_abort: 1 counts reports of the watchdog"):
            config.resolve(cfg)


def test_steps_of_the_learning_rate_need_their_places() -> None:
    cfg = config.default_config()
    config.apply_overrides(cfg, ["optim.schedule=steps"])
    with pytest.raises(UserError, match="milestones: .* leaves the learning rate .* constant"):
        config.resolve(cfg)
    config.apply_overrides(cfg, ["optim.milestones=0.8,0.9"])
    assert config.resolve(cfg).optim.milestones == (0.8, 0.9)


def test_at_least_sixty_bad_settings() -> None:
    assert len(BAD) >= 60


def test_defaults_survive_the_round_trip() -> None:
    assert config.resolve(config.default_config()) == schema.Config()


def test_overrides_change_single_settings_and_keep_their_types() -> None:
    cfg = config.default_config()
    config.apply_overrides(
        cfg,
        [
            "optim.lr=1",
            "train.batch_size=64",
            "data.path=a=b,c",
            "data.crop_scale=0.2,1",
            "model.scan=true",
        ],
    )
    resolved = config.resolve(cfg)
    assert (resolved.optim.lr, resolved.train.batch_size, resolved.model.scan) == (1.0, 64, True)
    assert (resolved.data.path, resolved.data.crop_scale) == ("a=b,c", (0.2, 1.0))
    assert isinstance(resolved.optim.lr, float)
    untouched = dataclasses.replace(
        resolved,
        optim=schema.Optim(),
        train=schema.Train(),
        data=schema.Data(),
        model=schema.Model(),
    )
    assert untouched == schema.Config()


def test_the_tilde_of_every_path_is_the_home_directory() -> None:
    """`--config.init_from=~/vit.npz` reaches the program as it is typed."""
    home = os.path.expanduser("~")
    cfg = config.default_config()
    paths = ("init_from", "objective.target_checkpoint", "data.path")
    lists = ("objective.teachers", "report.beside")
    config.apply_overrides(
        cfg, [*(f"{key}=~/a" for key in paths), *(f"{key}=~/a,/b" for key in lists)]
    )
    settings = config.resolve(cfg)
    for key in paths:
        assert operator.attrgetter(key)(settings) == f"{home}/a", key
    for key in lists:
        assert operator.attrgetter(key)(settings) == (f"{home}/a", "/b"), key


def test_unknown_key_in_a_config_file_is_refused(tmp_path) -> None:
    file = tmp_path / "user.py"
    file.write_text(
        "from m3i_jax.config import default_config\n"
        "def get_config():\n    c = default_config()\n    c.optim.lrr = 1\n    return c\n"
    )
    with pytest.raises(UserError, match="lrr"):
        config.load_config(str(file))


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("configs/quickstrat.py", "did you mean configs/quickstart.py?"),
        ("configs/quickstart.py:stepz=3", "did you mean steps=?"),
        ("configs/quickstart.py:steps=many", "is not a whole number"),
        ("configs/folder.py:model=vit_b17", "vit_b16"),
        ("configs/quickstart.py:steps=many", "--config configs/quickstart.py:steps: 'many'"),
        ("https://example.org/config.py", "local Python file"),
        ("configs", "local Python file"),
    ],
)
def test_bad_config_files(
    spec: str, expected: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    monkeypatch.chdir(request.config.rootpath)
    with pytest.raises(UserError) as refusal:
        config.load_config(spec)
    assert expected in str(refusal.value)


def test_an_argument_may_be_a_url(request: pytest.FixtureRequest) -> None:
    assert (
        config.load_config(
            f"{request.config.rootpath}/configs/tars.py:path=gs://bucket/*.tar"
        ).data.path
        == "gs://bucket/*.tar"
    )


USER_FILE = """from m3i_jax.config import default_config
def get_config(path, steps: int, rate=None, names=("a", "b")):
    c = default_config()
    c.data.path, c.train.steps, c.objective.forms = path, steps, names
    return c
"""


@pytest.mark.parametrize(
    ("text", "arguments", "expected"),
    [
        (USER_FILE, "", "the argument path is missing; write --config FILE:path=VALUE"),
        (USER_FILE, ":path=p,steps=2.5", "--config FILE:steps: 2.5 is not a whole number"),
        (
            "import sys\nsys.exit(0)\n" + USER_FILE,
            ":path=p,steps=2",
            "--config FILE, line 2: SystemExit: 0; a configuration must return its settings",
        ),
        (
            USER_FILE.replace("    return", "    raise SystemExit\n    return"),
            ":path=p,steps=2",
            "--config FILE, line 5: SystemExit",
        ),
        (USER_FILE, ":path=p,steps=2,path=q", "--config FILE:path: is given twice; remove one"),
        (
            USER_FILE,
            ":pth=p,steps=2",
            "--config FILE:pth: there is no such argument; did you mean path=?",
        ),
        ("def get_config(", "", "SyntaxError: '(' was never closed (user.py, line 1)"),
        (
            "x = 1\nimport no_such_module",
            "",
            "--config FILE, line 2: ModuleNotFoundError: No module named 'no_such_module'",
        ),
        ("x = 1", "", "--config FILE: has no function get_config; define one"),
        (
            USER_FILE.replace("    return", "    c.model.encoder.widht = 3\n    return"),
            ":path=p,steps=2",
            "line 5: there is no such key 'widht'; ",
        ),
        (
            USER_FILE.replace("    return", "    c.model.encoder.widht = 3\n    return"),
            ":path=p,steps=2",
            "did you mean width?",
        ),
        (
            USER_FILE.replace("    return", "    c.data.mean = 3\n    return"),
            ":path=p,steps=2",
            "did you mean config.data.augment.mean?",
        ),
    ],
)
def test_error_in_a_users_config_file_names_its_line(
    text: str, arguments: str, expected: str, tmp_path
) -> None:
    (file := tmp_path / "user.py").write_text(text)
    with pytest.raises(UserError) as refusal:
        config.load_config(f"{file}{arguments}")
    message = str(refusal.value).replace(str(file), "FILE")
    assert expected in message and len(message) < 170


def test_data_directories_are_known_by_key_and_not_by_value(
    tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A directory counts as data only if data.path or another data setting names it."""
    (folder := tmp_path / "configs").mkdir()
    (file := folder / "user.py").write_text(
        "from m3i_jax.config import default_config\n"
        "def get_config(path=''):\n    return default_config()\n"
    )
    monkeypatch.chdir(tmp_path)
    for overrides in (
        ["report.wandb=configs"],
        ["evaluate.templates=configs"],
        ["report.licence=" + "m3i," * 200],
        ["data.path=~nosuchuser"],
    ):
        config.load_config(str(file), overrides)
    for overrides in (
        ["data.path=configs"],
        ["data.mixture=folder:configs=3"],
        ["data.mixture=('folder:a', 'folder:configs@x')"],
        ["data.directory=configs"],
    ):
        with pytest.raises(UserError, match="lies in the data, 'configs'"):
            config.load_config(str(file), overrides)
    with pytest.raises(UserError, match="lies in the data"):
        config.load_config(f"{file}:path={tmp_path}")
    config.load_config(f"{file}:path={tmp_path}/elsewhere")
    data = dataclasses.replace(schema.Data(), source="folder", path=str(tmp_path))
    with pytest.raises(UserError, match="lies in the data"):
        config.reject_config_in_data(str(file), data)
    config.reject_config_in_data(str(file), dataclasses.replace(data, path=str(tmp_path / "x*")))
    config.reject_config_in_data(str(file), dataclasses.replace(data, source="shapes"))
    # beside the files of a glob, and in a directory whose name has what separates a split
    (other := tmp_path / "a@b").mkdir()
    for source, path, beside in (
        ("tars", f"{folder}/shard-*.tar", file),
        ("tars", f"{folder}/shard-?.tar", file),
        ("tars", f"{tmp_path}/con*/0.tar", file),
        ("folder", str(other), other / "user.py"),
    ):
        for given in (
            dataclasses.replace(data, source=source, path=path),
            dataclasses.replace(data, source="mixture", mixture=(f"{source}:{path}=4",)),
        ):
            with pytest.raises(UserError, match="lies in the data"):
                config.reject_config_in_data(str(beside), given)


def test_arguments_have_the_type_of_default_or_annotation(tmp_path) -> None:
    (file := tmp_path / "user.py").write_text(USER_FILE)
    cfg = config.load_config(f"{file}:path=3,steps=2,rate=1,names=mim,clip")
    assert (cfg.data.path, cfg.train.steps, cfg.objective.forms) == ("3", 2, ("mim", "clip"))


@pytest.mark.parametrize("name", ["quickstart", "folder", "tars", "toy"])
def test_shipped_configs_resolve(name: str, request: pytest.FixtureRequest) -> None:
    config.resolve(config.load_config(str(request.config.rootpath / "configs" / f"{name}.py")))


@pytest.mark.parametrize(
    ("batch", "parts", "shape", "fits"),
    [(16, 1, (8, 1, 1), True), (16, 2, (8, 1, 1), False), (16, 2, (2, 2, 2), True)],
)
def test_batches_must_divide_over_devices_in_pairs(
    batch: int, parts: int, shape: tuple[int, int, int], fits: bool
) -> None:
    c = schema.Config(train=schema.Train(batch_size=batch, microbatches=parts))
    if fits:
        validation.validate_devices(c, shape)
    else:
        with pytest.raises(UserError, match="multiple of 32: .*; nearest: 32$"):
            validation.validate_devices(c, shape)


def test_batch_is_rounded_up_only_with_round_batch() -> None:
    c = schema.Config(train=schema.Train(batch_size=1000, microbatches=3, round_batch=True))
    resolved, message = validation.fit_batch_to_mesh(c, (4, 2, 8))
    assert (
        resolved.train.batch_size == 1008
        and "1,000 rounded up to 1,008, a multiple of 48: 2 images mixed x 8 data shards x 3"
        in message
    )
    assert validation.fit_batch_to_mesh(resolved, (4, 2, 8)) == (resolved, "")
    with pytest.raises(UserError, match="multiple of 48"):
        validation.fit_batch_to_mesh(
            schema.Config(train=schema.Train(batch_size=1000, microbatches=3)), (4, 2, 8)
        )


def test_text_and_difference() -> None:
    old = config.config_to_text(schema.Config())
    new = config.config_to_text(
        schema.Config(seed=3, report=schema.Report(panel_rows=9), optim=schema.Optim(lr=0.1))
    )
    assert config.config_difference(old, new) == ["seed: 0 -> 3", "optim.lr: 0.001 -> 0.1"]
    assert len(old.splitlines()) == len(config.setting_table())
    # what only other modes read, and where an index lies, changes no training
    other = schema.Config(
        compare=schema.Compare(seeds=2),
        curate=schema.Curate(min_side=128),
        data=schema.Data(index="/shared/index"),
    )
    assert config.config_difference(old, config.config_to_text(other)) == []


def test_help_names_every_key() -> None:
    table = config.help_table()
    assert all(f"--config.{key} " in table for key in config.setting_table())
    assert all(text for _, _, text, _ in config.setting_table().values())
