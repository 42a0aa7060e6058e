"""The door of the configuration: what it refuses, in which words, and what it lets through
unchanged."""

import dataclasses

import pytest

from m3i_jax import config, schema, validation
from m3i_jax.errors import UserError

BAD = {
    # a key that does not exist, and the nearest one that does
    "optimm.lr=1": "config.optim.lr",
    "optim.lrr=1": "config.optim.lr",
    "lr=1": "config.optim.lr",
    "train.batchsize=8": "config.train.batch_size",
    "model.encoder.width_=8": "config.model.encoder.width",
    "data.imagesize=8": "config.data.image_size",
    "zzz=1": "--help",
    "optim=1": "config.optim",
    # another type
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
    # none of the choices
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
    "model.encoder.heads=7": "must divide the width 768",
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
    "data.class_names=/nope": "does nothing",  # of the built-in shapes
    "data.vocabulary=/nope": "does nothing",  # without data.tokenizer=clip
    "data.path=~nosuchuser/x": "the home directory of an unknown user, ~nosuchuser",
    "model.text.width=0": "at least 1",
    "model.decoder.width=0": "at least 1",
    "model.head.hidden=0": "at least 1",
    "model.encoder.mlp_ratio=0.001": "at least 0.01",
    f"optim.lr={'1' * 5000}": "is not a number",
    f"parallel.mesh={'(' * 5000}": "is not a list of numbers",
    f"train.steps={'-' * 20000}1": "is not a whole number",
    "evaluate.shots=5,5": "names 5 twice",
    "init.only=x(": "is no regular expression",
    "report.licence=a\nb": "one line without control characters",
}


@pytest.mark.parametrize("assignment", BAD)
def test_bad_settings_are_refused_with_key_and_way_out(assignment: str) -> None:
    made = config.default_config()
    with pytest.raises(UserError) as refusal:
        config.apply_overrides(made, [assignment])
        config.resolve(made)
    text = str(refusal.value)
    assert BAD[assignment] in text and "\n" not in text and len(text) < 400
    assert assignment.partition("=")[0].split(".")[-1] in text  # the key is named


def test_there_are_sixty_of_them() -> None:
    assert len(BAD) >= 60


def test_every_leaf_survives_the_round_trip() -> None:
    assert config.resolve(config.default_config()) == schema.Config()


def test_overrides_change_one_leaf_and_keep_its_type() -> None:
    made = config.default_config()
    config.apply_overrides(
        made,
        [
            "optim.lr=1",
            "train.batch_size=64",
            "data.path=a=b,c",
            "data.crop_scale=0.2,1",
            "model.scan=true",
        ],
    )
    done = config.resolve(made)
    assert (done.optim.lr, done.train.batch_size, done.model.scan) == (1.0, 64, True)
    assert (done.data.path, done.data.crop_scale) == ("a=b,c", (0.2, 1.0))
    assert isinstance(done.optim.lr, float)
    untouched = dataclasses.replace(
        done,
        optim=schema.Optim(),
        train=schema.Train(),
        data=schema.Data(),
        model=schema.Model(),
    )
    assert untouched == schema.Config()


def test_a_config_file_that_misspells_a_key_is_refused(tmp_path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "from m3i_jax.config import default_config\n"
        "def get_config():\n    c = default_config()\n    c.optim.lrr = 1\n    return c\n"
    )
    with pytest.raises(UserError, match="lrr"):
        config.load_config(str(file))


@pytest.mark.parametrize(
    ("spec", "wanted"),
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
    spec: str, wanted: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    monkeypatch.chdir(request.config.rootpath)
    with pytest.raises(UserError) as refusal:
        config.load_config(spec)
    assert wanted in str(refusal.value)


def test_an_argument_may_be_an_address(request: pytest.FixtureRequest) -> None:
    assert (
        config.load_config(
            f"{request.config.rootpath}/configs/tars.py:path=gs://bucket/*.tar"
        ).data.path
        == "gs://bucket/*.tar"
    )


OWN = """from m3i_jax.config import default_config
def get_config(path, steps: int, rate=None, names=("a", "b")):
    c = default_config()
    c.data.path, c.train.steps, c.objective.forms = path, steps, names
    return c
"""


@pytest.mark.parametrize(
    ("text", "arguments", "wanted"),
    [
        (OWN, "", "the argument path is missing; write --config FILE:path=VALUE"),
        (OWN, ":path=p,steps=2.5", "--config FILE:steps: 2.5 is not a whole number"),
        (
            "import sys\nsys.exit(0)\n" + OWN,
            ":path=p,steps=2",
            "--config FILE, line 2: SystemExit: 0; a configuration must return its settings",
        ),
        (
            OWN.replace("    return", "    raise SystemExit\n    return"),
            ":path=p,steps=2",
            "--config FILE, line 5: SystemExit",
        ),
        (
            OWN,
            ":pth=p,steps=2",
            "--config FILE:pth: there is no such argument; did you mean path=?",
        ),
        ("def get_config(", "", "SyntaxError: '(' was never closed (mine.py, line 1)"),
        (
            "x = 1\nimport there_is_none",
            "",
            "--config FILE, line 2: ModuleNotFoundError: No module named 'there_is_none'",
        ),
        ("x = 1", "", "--config FILE: has no function get_config; define one"),
        (
            OWN.replace("    return", "    c.model.encoder.widht = 3\n    return"),
            ":path=p,steps=2",
            "line 5: there is no such key 'widht'; ",
        ),
        (
            OWN.replace("    return", "    c.model.encoder.widht = 3\n    return"),
            ":path=p,steps=2",
            "did you mean width?",
        ),
        (
            OWN.replace("    return", "    c.data.mean = 3\n    return"),
            ":path=p,steps=2",
            "did you mean config.data.augment.mean?",
        ),
    ],
)
def test_a_mistake_in_ones_own_config_file_is_told_with_its_line(
    text: str, arguments: str, wanted: str, tmp_path
) -> None:
    (file := tmp_path / "mine.py").write_text(text)
    with pytest.raises(UserError) as refusal:
        config.load_config(f"{file}{arguments}")
    told = str(refusal.value).replace(str(file), "FILE")
    assert wanted in told and len(told) < 170


def test_what_is_data_is_known_by_the_setting_not_by_a_value_that_is_a_path(
    tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A directory that holds the configuration is data if data.path or the like says so, and no
    other setting does."""
    (folder := tmp_path / "configs").mkdir()
    (file := folder / "mine.py").write_text(
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


def test_arguments_of_ones_own_config_file_have_the_type_of_default_or_annotation(tmp_path) -> None:
    (file := tmp_path / "mine.py").write_text(OWN)
    made = config.load_config(f"{file}:path=3,steps=2,rate=1,names=mim,clip")
    assert (made.data.path, made.train.steps, made.objective.forms) == ("3", 2, ("mim", "clip"))


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


def test_a_batch_is_rounded_up_only_where_asked() -> None:
    c = schema.Config(train=schema.Train(batch_size=1000, microbatches=3, round_batch=True))
    done, told = validation.fit_batch_to_mesh(c, (4, 2, 8))
    assert (
        done.train.batch_size == 1008
        and "1,000 rounded up to 1,008, a multiple of 48: 2 images mixed x 8 data shards x 3"
        in told
    )
    assert validation.fit_batch_to_mesh(done, (4, 2, 8)) == (done, "")
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


def test_help_names_every_key() -> None:
    table = config.help_table()
    assert all(f"--config.{key} " in table for key in config.setting_table())
    assert all(text for _, _, text, _ in config.setting_table().values())
