"""Hypothesis strategies for the fuzzer: settings by their declared types and limits, command lines,
configuration files, and runs and data with a damaged file.

Settings, modes and flags come from the schema, `MODES` and the parser, so that a new one is fuzzed
as soon as it exists."""

import dataclasses
import pathlib
from typing import Any

from hypothesis import strategies as st

from m3i_jax import config, main
from m3i_jax.config import files as config_files
from m3i_jax.modes import MODES
from m3i_jax.schema import limits as schema_limits
from tests.faults import fuzz_damage, fuzz_scripts
from tests.test_main import TINY
from tests.test_setting_limits import SETTINGS

ROOT = pathlib.Path(__file__).parent.parent.parent
# not fuzzed: they need a network or other hosts, or compile for minutes
LEFT_OUT_FLAGS = {
    "--help",
    "-h",
    "--version",
    "--config",
    "--workdir",
    "--mode",
    "--config.KEY=VALUE",
    "--coordinator",
    "--suggest",
    "--largest-batch",
    "--code",
    "--topology",
}
LEFT_OUT_KEYS = {"report.wandb", "parallel.heartbeat"}
KEYS = tuple(key for key in SETTINGS if key not in LEFT_OUT_KEYS)
QUICK_MODES = ("show", "preview", "data", "report")
# they compile a step
STEP_MODES = ("train", "compare", "profile", "compile")
SLOW_MODES = tuple(mode for mode in MODES if mode not in (*QUICK_MODES, *STEP_MODES))
NASTY = (
    "",
    " ",
    "-",
    "--",
    "~",
    "~nosuchuser/x",
    "/",
    ".",
    "..",
    "/dev/null",
    "/dev/zero",
    "/dev/full",
    "/proc/self/mem",
    "a" * 300,
    "a/" * 2500,
    "\N{SNOWMAN}",
    "\x1b]0;x\x07",
    "a\nb",
    "\udcff",
    "None",
    "nan",
    "-inf",
    "1e400",
    "0x10",
    "1_000",
    "9" * 5000,
    "-" * 30000 + "1",
    "(" * 5000,
    "[" * 150 + "]" * 150,
    "{}",
    "()",
    "(1,)",
    "'",
    '"a',
    "\\",
    "lambda: 1",
    "__import__('os').abort()",
    "*",
    "[!-]",
    "@",
    "=",
    "a@b|c=d",
    "folder:",
    "tars:x=1e999",
    "folder:/=0",
    "shapes:99999999999",
    "gs:",
    "x://y",
    "file:///etc/passwd",
    "$(true)",
    "%s",
    "{0}",
    "*" * 50,
)


@dataclasses.dataclass(frozen=True)
class Case:
    """One command in its own directory.

    Attributes:
      arguments: of the command; {W} is the working directory, {D} the data, {C} the configuration
        file.
      room: content of {W} before the command: "empty" or "run".
      script: text of {C}, if that is used.
      target, damage: a file, by its number among all of {W} or {D}, and how it is damaged.
      judged: whether the result must be equal, or the output must name the damage.
      shown: the case has only settings, which can be checked without a process.
      environment: variables of the command, which then starts Python anew.
    """

    arguments: tuple[str, ...]
    room: str = "empty"
    script: bytes = b""
    target: tuple[str, int] = ("", 0)
    damage: fuzz_damage.Damage | None = None
    judged: bool = False
    shown: bool = False
    environment: tuple[tuple[str, str], ...] = ()


def inside(limits: Any, whole: bool) -> st.SearchStrategy[Any]:
    """Numbers within limits, often the limits themselves."""
    low, high = limits.least, limits.most
    if whole:
        some = [
            st.integers(int(low), int(high)),
            st.integers(int(low), min(int(high), int(low) + 16)),
        ]
    else:
        wide = st.floats(
            low, high, exclude_min=limits.above, exclude_max=limits.below, allow_nan=False
        )
        some = [wide, st.floats(low, min(high, low + 2), allow_nan=False)]
    return st.one_of(st.sampled_from([low, high]), *some)


@st.composite
def value(draw: Any, key: str) -> str:
    """The text of a setting's value: valid, at or beyond a limit, of another type, or arbitrary."""
    default, metadata = SETTINGS[key]
    kind = draw(st.integers(0, 9))
    if kind == 0:
        return draw(st.sampled_from(NASTY))
    if kind == 1:
        return draw(
            st.one_of(
                st.text(max_size=30), st.floats().map(str), st.integers(-(2**70), 2**70).map(str)
            )
        )
    entries = default if isinstance(default, tuple) else (default,)
    limits = metadata["limits"]
    if metadata["choices"]:
        return str(draw(st.sampled_from(list(metadata["choices"]))))
    if isinstance(default, bool):
        return draw(st.sampled_from(["true", "false", "True", "FALSE"]))
    if isinstance(limits, schema_limits.NumberLimit):
        whole = all(isinstance(entry, int) for entry in entries)
        beyond = st.sampled_from(
            [limits.least - 1, limits.most + 1, -limits.most, limits.most * 2, 2**31, 2**63, 0, -1]
        )
        one = inside(limits, whole) if kind < 8 else beyond
        if not isinstance(default, tuple):
            return repr(draw(one))
        fewest, most = limits.count.fewest, min(limits.count.most, 6)
        many = draw(
            st.lists(one, min_size=fewest, max_size=most) if kind < 8 else st.lists(one, max_size=7)
        )
        return repr(tuple(sorted(many) if limits.count.rising and kind < 7 else many))
    known = (
        "m3i",
        "mim",
        "sim",
        "clip",
        "k",
        "category",
        "text",
        "7",
        "80",
        "configs",
        "README.md",
        "tests",
        "{D}/folder",
        "{D}",
        "{W}",
    )
    lines = st.one_of(
        st.sampled_from(known), st.sampled_from(NASTY), st.text("abc/.*~@:=|", max_size=12)
    )
    if isinstance(default, tuple):
        return ",".join(draw(st.lists(lines, max_size=4)))
    return draw(lines)


@st.composite
def overrides(draw: Any, most: int = 4) -> tuple[str, ...]:
    keys = draw(st.lists(st.sampled_from(KEYS), min_size=1, max_size=most, unique=True))
    return tuple(f"{key}={draw(value(key))}" for key in keys)


def flags() -> list[str]:
    return sorted(
        name
        for action in main.parser()._actions
        for name in action.option_strings
        if name.startswith("--") and name not in LEFT_OUT_FLAGS
    )


CONFIGS = tuple(
    sorted(
        path.relative_to(ROOT / "configs").as_posix() for path in (ROOT / "configs").rglob("*.py")
    )
)


# plausible arguments of configuration files, by their names
ARGUMENTS = {
    "path": ("{D}/folder", "{D}/tars/*.tar", "{D}", "{D}/nothing"),
    "source": ("folder", "tars", "shapes"),
    "sources": (
        "folder:{D}/folder;tars:{D}/tars/*.tar",
        "folder:{D}/folder=1;shapes:100=2",
        "folder:{D}/folder@0|1",
    ),
    "model": ("vit_tiny", "internimage_pico", "vit_s16"),
    "form": ("m3i", "mim", "sim+clip", "k", "finetune"),
    "from": ("{W}", "{D}/weights/w.npz", "{D}/tensors/w.safetensors", "{D}"),
    "epochs": ("1", "0.5", "0", "-1", "1e300"),
    "batch_size": ("2", "8", "64", "0", "-2", "7"),
}
NUMBERS = ("0", "1", "3", "32", "-5", "1e300", "0.5")


@st.composite
def commands(draw: Any) -> Case:
    """A plausible command with any configuration file and mode, and up to two mistakes in it."""
    name = draw(st.sampled_from(CONFIGS))
    taken = sorted(config_files._argument_names(f"{ROOT}/configs/{name}") or ())
    given = draw(st.lists(st.sampled_from(taken), max_size=3, unique=True))
    given += [key for key in ("path", "source", "sources") if key in taken and key not in given]
    given = {key: draw(st.sampled_from(ARGUMENTS.get(key, NUMBERS))) for key in given}
    mode = draw(st.sampled_from([*QUICK_MODES, *QUICK_MODES, *MODES]))
    mode = "show" if mode in STEP_MODES else mode
    room = draw(st.sampled_from(["empty", "run"]))
    workdir, more = (
        "{W}",
        ([f"--config.{text}" for text in draw(overrides(2))] if draw(st.booleans()) else []),
    )
    tail, extra = "", []
    for _ in range(draw(st.integers(0, 2))):
        nasty, kind = draw(st.sampled_from(NASTY)), draw(st.integers(0, 7))
        if kind == 0:
            given |= {draw(st.sampled_from([*taken, "pth"])): nasty}
        elif kind == 1:
            tail = nasty
        elif kind == 2:
            mode = draw(st.sampled_from(["", "trian", "../../evil", nasty]))
        elif kind == 3:
            workdir = draw(
                st.sampled_from(
                    [
                        "{D}/folder/0/0.png",
                        "/proc/none/x",
                        "/dev/null/x",
                        "gs://b/x",
                        "{W}/" + "a" * 300,
                        nasty,
                    ]
                )
            )
        elif kind in (4, 5):
            flag = draw(st.sampled_from(flags()))
            extra += draw(
                st.sampled_from(
                    [[flag], [f"{flag}=3"], [flag, "x"], [f"{flag}=", flag], [f"{flag}={nasty}"]]
                )
            )
        elif kind == 6:
            extra.append(nasty)
        else:
            room = "empty"
    spec = f"{ROOT}/configs/{name}" + "".join(
        f"{',' if i else ':'}{key}={text}" for i, (key, text) in enumerate(given.items())
    )
    own = bool(MODES[mode].of_run) if mode in MODES else False
    out = (
        []
        if own and draw(st.booleans())
        else [f"--config={spec}{tail}", *(TINY if name != "m3i.py" or draw(st.booleans()) else ())]
    )
    return Case((*out, f"--mode={mode}", f"--workdir={workdir}", *more, *extra), room=room)


@st.composite
def settings(draw: Any) -> Case:
    """One to four settings of the quickstart, in mode show."""
    some = draw(overrides())
    return Case(
        (
            f"--config={ROOT}/configs/quickstart.py",
            "--mode=show",
            *TINY,
            *(f"--config.{text}" for text in some),
        ),
        shown=True,
    )


@st.composite
def scripts(draw: Any) -> Case:
    """A user's configuration file with a mistake in it."""
    tail = draw(
        st.sampled_from(
            ["", "", ":path=x", ":n=x", ":n=2,m=3", ":", ":,,", ":=", ":n", ":path={D},n=3"]
        )
    )
    script = draw(st.one_of(st.sampled_from(fuzz_scripts.SCRIPTS), st.binary(max_size=40)))
    return Case(("--config={C}" + tail, "--mode=show", "--workdir={W}", *TINY), script=script)


@st.composite
def of_a_run(draw: Any) -> Case:
    """A finished run with one file damaged, then read by a mode."""
    mode = draw(
        st.sampled_from(
            ["report"] * 6 + ["preview"] * 2 + ["train", "train", "eval", "export", "replay"]
        )
    )
    words = {"report": (), "eval": (), "replay": (), "export": ("--format=npz",)}
    rest = words.get(mode, (f"--config={ROOT}/configs/quickstart.py", *TINY, *RUN))
    return Case(
        ("--workdir={W}", f"--mode={mode}", *rest),
        "run",
        target=("{W}", draw(st.integers(0, 10**6))),
        damage=draw(fuzz_damage.damages()),
        judged=True,
    )


RUN = (
    "--config.train.steps=2",
    "--config.train.save_every=1",
    "--config.evaluate.knn=false",
    "--config.evaluate.retrieval=false",
    "--config.evaluate.direct=false",
    "--config.evaluate.zero_shot=false",
)


TOPOLOGIES = ("cpu:1", "cpu:1", "cpu:2", "cpu:0", "cpu", "v5e:4x4", "h100:8", "v5e:3", "tpu")
FORMS = ("mim", "mim,clip", "mim,mim", "m3i", "k", "mim+clip", "+", "nothing", "")


@st.composite
def steps(draw: Any) -> Case:
    """A command that compiles a step of a toy run, and takes two if nothing is wrong: a new run or
    one that is there, with up to two other settings or flags."""
    mode = draw(st.sampled_from(STEP_MODES))
    words: list[str] = []
    if mode == "compare":
        words += [f"--config.compare.forms={draw(st.sampled_from(FORMS))}"]
    if mode == "compile":
        words += [
            f"--topology={draw(st.one_of(st.sampled_from(TOPOLOGIES), st.sampled_from(NASTY)))}"
        ]
    for _ in range(draw(st.integers(0, 2))):
        kind = draw(st.integers(0, 5))
        if kind == 0:
            words.append(f"--memory={draw(st.sampled_from(('1', '0', '-1', '1e-9', 'x', *NASTY)))}")
        elif kind == 1:
            words.append("--allow-changes")
        elif kind == 2:
            source = draw(st.sampled_from(("folder", "tars", "tfds", "mixture", "array_record")))
            path = draw(
                st.sampled_from(("{D}/folder", "{D}/tars/*.tar", "{D}", "{W}", "/dev/null"))
            )
            words += [f"--config.data.source={source}", f"--config.data.path={path}"]
        elif kind == 3:
            path = draw(st.sampled_from(("{W}", "{D}/weights/w.npz", "{D}/tensors/w.safetensors")))
            words.append(f"--config.init_from={path}")
        else:
            words += [f"--config.{text}" for text in draw(overrides(2))]
    return Case(
        (
            f"--config={ROOT}/configs/quickstart.py",
            f"--mode={mode}",
            "--workdir={W}",
            *TINY,
            *RUN,
            *dict.fromkeys(words),
        ),
        room=draw(st.sampled_from(["empty", "empty", "run"])),
    )


@st.composite
def of_data(draw: Any) -> Case:
    """A damaged file of the data: images, captions, tars, class names, a vocabulary, weights."""
    kinds = {
        "folder": (f"--config={ROOT}/configs/folder.py:path={{D}}/folder,model=vit_tiny",),
        "tars": (f"--config={ROOT}/configs/tars.py:path={{D}}/tars/*.tar,model=vit_tiny",),
        "names": (
            f"--config={ROOT}/configs/folder.py:path={{D}}/folder,model=vit_tiny",
            "--config.data.class_names={D}/names/names.json",
        ),
        "vocabulary": (
            f"--config={ROOT}/configs/quickstart.py",
            "--config.data.tokenizer=clip",
            "--config.data.vocabulary={D}/vocabulary/v.gz",
        ),
        "weights": (
            f"--config={ROOT}/configs/transfer/finetune.py:path={{D}}/folder,from={{D}}/weights/w.npz",
        ),
        "tensors": (
            f"--config={ROOT}/configs/transfer/finetune.py:path={{D}}/folder,from={{D}}/tensors/w.safetensors",
        ),
        "mixture": (
            f"--config={ROOT}/configs/mixture.py:sources=folder:{{D}}/folder=1;tars:{{D}}/tars/*.tar=1,model=vit_tiny",
        ),
    }
    name = draw(st.sampled_from(sorted(kinds)))
    mode = draw(st.sampled_from(["data", "data", "preview"]))
    room = {"mixture": draw(st.sampled_from(["folder", "tars"]))}.get(name, name)
    small = [text for text in TINY if ".data.size=" not in text or name == "vocabulary"]
    return Case(
        (*kinds[name], "--workdir={W}", f"--mode={mode}", *small),
        target=("{D}/" + room, draw(st.integers(0, 10**6))),
        damage=draw(fuzz_damage.damages()),
    )


# variables that are read before or while modules are imported, and places that are not there
ENVIRONMENT = {
    "JAX_PLATFORMS": ("foo", "", "tpu", "cpu,cpu", "\x1b]0;x\x07"),
    "JAX_COMPILATION_CACHE_DIR": ("{D}/folder/0/0.png", "/proc/none", "", "{W}"),
    "JAX_DEFAULT_MATMUL_PRECISION": ("nonsense", "highest"),
    "JAX_ENABLE_X64": ("1", "perhaps"),
    "JAX_NUM_CPU_DEVICES": ("0", "-1", "x", "3"),
    "XLA_FLAGS": ("--xla_force_host_platform_device_count=2", ""),
    "OMP_NUM_THREADS": ("0", "x"),
    "HOME": ("/nonexistent", "", "{D}/folder/0/0.png"),
    "TMPDIR": ("/nonexistent", "{D}/folder/0/0.png"),
    "XDG_CACHE_HOME": ("/proc/none", "relative", "{D}/folder/0/0.png"),
    "LC_ALL": ("C", "nonsense", "POSIX"),
    "PYTHONUTF8": ("0", "1"),
    "PYTHONIOENCODING": ("ascii", "latin-1"),
    "COLUMNS": ("0", "-1", "x", "1000000"),
    "TERM": ("", "dumb"),
    "SLURM_JOB_ID": ("x", "3"),
    "SLURM_NTASKS": ("0", "x", "1"),
    "TPU_WORKER_HOSTNAMES": ("", "nohost"),
}


@st.composite
def surroundings(draw: Any) -> Case:
    """A plausible command where one or two variables of the environment are unusual."""
    case = draw(st.one_of(settings(), of_a_run()))
    names = draw(
        st.lists(st.sampled_from(sorted(ENVIRONMENT)), min_size=1, max_size=2, unique=True)
    )
    some = tuple((name, draw(st.sampled_from(ENVIRONMENT[name]))) for name in names)
    return dataclasses.replace(case, shown=False, judged=False, damage=None, environment=some)


KINDS: dict[str, st.SearchStrategy[Case]] = {
    "settings": settings(),
    "commands": commands(),
    "scripts": scripts(),
    "steps": steps(),
    "of_data": of_data(),
    "of_a_run": of_a_run(),
    "surroundings": surroundings(),
}
# commands of a round: few of those that take seconds
OF_A_ROUND = {
    "settings": 10,
    "commands": 20,
    "scripts": 15,
    "steps": 4,
    "of_data": 15,
    "of_a_run": 20,
    "surroundings": 6,
}


def text_of(arguments: tuple[str, ...]) -> list[str]:
    """The overrides of a command line, for a check in this process."""
    return [a.removeprefix("--config.") for a in arguments if a.startswith("--config.")]


def resolves(case: Case) -> None:
    """Resolve the settings of a case in this process. Raises only UserError."""
    loaded = config.load_config(f"{ROOT}/configs/quickstart.py")
    config.apply_overrides(loaded, text_of(case.arguments))
    config.resolve(loaded)
