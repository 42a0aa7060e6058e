"""--mode=compile for forced CPU devices: output, refusals and exit codes; for a TPU if libtpu is
installed."""

import dataclasses
import importlib.util
import json
import math
import pathlib
import re
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache

from m3i_jax import main as command
from m3i_jax import parallel
from m3i_jax.errors import UserError
from m3i_jax.modes import compile as mode
from m3i_jax.objective import registry
from m3i_jax.profiling import compile_report, libtpu_dump
from m3i_jax.training import trainer
from tests import toy
from tests.test_main import TINY, environment

ROOT = pathlib.Path(__file__).parents[2]
TEXTLESS = ["--config.data.captions=no", "--config.train.batch_size=16"]
COLORLESS = [
    f"--config.data.augment.{k}"
    for k in ("jitter_p=0", "grayscale_p=0", "blur_p=(0.0,0.0)", "solarize_p=(0.0,0.0)")
]
ARGUMENTS = ["--config", "configs/quickstart.py", *TINY, *TEXTLESS, *COLORLESS, "--mode=compile"]


@pytest.fixture(autouse=True)
def here(monkeypatch) -> None:
    monkeypatch.chdir(ROOT)


def test_the_parts_of_the_state_sum_to_its_bytes() -> None:
    """On a mesh of 2 replicas and 4 fsdp shards, compared with the arrays of one device."""
    config = toy.settings(model__encoder__width=128)  # wide enough that kernels are worth splitting
    made = trainer.Trainer(config, parallel.make_mesh((2, 4, 1), jax.devices()[:8]), toy.VOCABULARY)
    parts = mode.state_bytes(made)
    held = jax.tree.map(
        lambda leaf, sharding: math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize,
        made.template,
        made.shardings,
    )
    assert sum(parts.values()) == sum(jax.tree.leaves(held)) and set(parts) == set(
        compile_report.STATE
    )
    assert parts["params"] == sum(jax.tree.leaves(held.params)) and parts["target"] == sum(
        jax.tree.leaves(held.opt["target"])
    )
    assert parts["moments"] == 2 * parts["params"] and 0 < parts["other"] < 100
    whole = sum(leaf.size * 4 for leaf in jax.tree.leaves(made.template.params))
    assert whole / 4 < parts["params"] < whole / 2


@pytest.mark.slow
def test_residual_bytes_of_groups_that_span_devices() -> None:
    """A quarter of dinov2's 192 images are 48 rows, and KoLeo compares 64."""

    def kept(images: int, shards: int, **changes: Any) -> float:
        config = toy.settings(
            **changes,
            objective__forms="dinov2",
            train__batch_size=images,
            data__size=256,
            model__encoder__depth=1,
            model__head__prototypes=8,
            model__head__hidden=16,
            model__head__width=8,
        )
        return mode._residual_bytes(config, shards, toy.VOCABULARY, 0.0)

    assert kept(256, 4) < kept(192, 2)
    assert kept(192, 4) == pytest.approx(kept(192, 1) / 4, rel=0.02)
    # 96 rows of a device, in two parts whose groups are of 64 rows of all devices
    parts = {"objective__entropy_rows": "microbatch", "train__microbatches": 2}
    assert 0 < kept(256, 2, **parts) < kept(256, 2)


def test_residual_bytes_follow_from_shapes() -> None:
    """`names` keeps two tensors more than `half`: the output of attention, [B, T, D], and the input
    of the GELU, [B, T, 4 D]."""

    def kept(remat: str) -> float:
        config = toy.settings(model__remat=remat, model__scan=True, data__captions="no")
        one = trainer.Trainer(config, parallel.make_mesh((1, 1, 1), jax.devices()[:1]), 0)
        return one.residual_bytes(trainer.abstract_batch(config))

    images, width, cells = 16, 32, 16
    # rows: two blocks; one that gives two images' wanted rows
    encoder, decoder = 2 * images * (cells + 1), 2 * images * cells
    # of the decoder's block outside the scan: a slice of the parameters that `half` reads again
    bias = 4 * width
    assert kept("names") - kept("half") == 4 * (5 * width * (encoder + decoder) - bias)
    assert kept("half") > kept("full") > 0


def test_views_and_targets_of_all_microbatches_are_counted() -> None:
    """For both views of 16 images: 16 patches of 8 x 8 x 3 values, and 16 features of 32."""
    config = toy.settings(data__captions="no")
    one = trainer.Trainer(config, parallel.make_mesh((1, 1, 1), jax.devices()[:1]), 0)
    assert one.waiting_bytes(trainer.abstract_batch(config)) == 4 * 2 * 16 * 16 * (8 * 8 * 3 + 32)


def test_a_cached_program_is_compiled_again(tmp_path) -> None:
    """Also in a process that has used its cache before: JAX reads the setting once."""
    settings = {
        "jax_compilation_cache_dir": str(tmp_path),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
    }
    before = {name: jax.config.values[name] for name in settings}

    def entries(factor: float) -> int:
        jax.jit(lambda x: x * factor).lower(1.0).compile()
        return len(list(tmp_path.glob("*-cache")))

    try:
        for name, value in settings.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        assert entries(2.0) == 1
        with mode._uncached():
            assert entries(3.0) == 1
        assert entries(4.0) == 2
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()


def test_a_step_for_eight_devices_is_compiled_and_reported(tmp_path, capsys) -> None:
    """Half a MiB is too little: all output is written, then one line gives the
    excess, and the exit code is 3. The batch is rounded up as in a run."""
    rounded = ["--config.train.batch_size=12", "--config.train.round_batch=true"]
    # replicas compute all products of Muon each, which one device does once
    rounded += ["--config.objective.forms=mim", "--config.optim.rule=muon"]
    assert (
        command.main(
            [
                *ARGUMENTS,
                *rounded,
                "--workdir",
                str(tmp_path),
                "--topology=cpu:8",
                "--memory=0.0005",
            ]
        )
        == 3
    )
    out, err = capsys.readouterr()
    assert "12 rounded up to 16" in out
    report = json.loads((tmp_path / "compile.json").read_text())
    assert report["devices"] == 8 and report["mesh"] == {"replica": 8, "fsdp": 1, "tensor": 1}
    assert (report["batch_size"], report["batch_per_device"], report["limit_bytes"]) == (
        16,
        2,
        0.0005 * 2**30,
    )
    assert (
        not report["fits"]
        and report["over_bytes"] == report["peak_bytes"] - report["limit_bytes"] > 0
    )
    assert (
        sum(report["memory"].values()) == pytest.approx(report["peak_bytes"])
        and min(report["memory"].values()) > 0
    )
    held = sum(report["memory"][part] for part in (*compile_report.STATE, "batch"))
    assert (
        report["peak_ratio"]
        == pytest.approx(report["peak_bytes"] / (held + report["residual_bytes"]))
        and report["residual_bytes"] > 0
    )
    assert "wait for the backward pass" in out
    # eight programs do what one model needs, and little of it twice
    assert 1 <= report["flops"]["ratio"] < 1.1
    reduced = report["collectives"]["all-reduce"]["received_bytes"]
    # the gradient of every trained parameter
    assert reduced >= 2 * 7 / 8 * report["memory"]["params"] * 0.8
    parts = report["traffic_parts"]
    assert sum(parts.values()) == pytest.approx(report["traffic_bytes"])
    named = {part.split("/")[0] for part in parts}
    assert {"encoder", "target_encoder", "decoder", "losses", "optimizer"} <= named
    assert parts.get("other", 0) < report["traffic_bytes"] / 2 and "memory traffic of" in out
    assert (
        "does not fit: " in out
        and "temporaries" in out
        and "all-reduce" in out
        and str(tmp_path / "compile.json") in out
    )
    assert err.count("\n") == 1 and "too much" in err and "--config." in err
    assert compile_report.__doc__ and not set(report) - set(
        re.findall(r"\w+", compile_report.__doc__)
    ), "a key that is not documented"


@pytest.mark.parametrize(
    ("flags", "wanted"),
    [
        (["--topology=v5q:4x4"], "did you mean"),
        ([], "--topology: is missing"),
        (["--topology=cpu:8", "--memory=much"], "--memory much"),
        (["--topology=cpu:8", "--memory=0"], "--memory 0"),
        (["--topology=cpu:8", "--memory=1e-9"], "--memory 1e-9"),
        (["--topology=cpu:8", "--suggest", "--largest-batch"], "--suggest"),
        (["--topology=cpu:8", "--config.parallel.mesh=(3,1,1)"], "config.parallel.mesh"),
        (["--topology=cpu:8", "--config.train.batch_size=12"], "nearest: 16"),
        (["--topology=cpu:8", "--mode=show"], "--topology: does not belong to --mode=show"),
    ],
)
def test_a_mistake_gives_one_line_and_exit_code_2(flags, wanted, tmp_path, capsys) -> None:
    arguments = ARGUMENTS[:-1] if "--mode=show" in flags else ARGUMENTS
    assert command.main([*arguments, "--workdir", str(tmp_path), *flags]) == 2
    out, err = capsys.readouterr()
    assert wanted in err and err.count("\n") == 1 and "Traceback" not in out + err


@pytest.mark.parametrize("search", [[], ["--suggest"], ["--largest-batch"]])
def test_a_mesh_that_a_run_refuses_is_refused(search, tmp_path, capsys, monkeypatch) -> None:
    """All CPU devices are of one host, so the check for several hosts is replaced by a fake."""

    def refuse(mesh: jax.sharding.Mesh) -> None:
        raise UserError(f"config.parallel.mesh: hosts of {mesh.size} devices share rows")

    monkeypatch.setattr(parallel, "check_host_rows", refuse)
    assert command.main([*ARGUMENTS, *search, "--workdir", str(tmp_path), "--topology=cpu:8"]) == 2
    assert "hosts of 8 devices share rows" in capsys.readouterr().err


def test_the_process_that_compiles_knows_what_the_configuration_registers(
    tmp_path, monkeypatch, capsys
) -> None:
    """It is another one, in which the file of --config was not run."""
    file = tmp_path / "own.py"
    file.write_text(
        "from m3i_jax import register_form\n"
        "from m3i_jax.config import default_config\n"
        "from m3i_jax.objective import terms\n"
        "register_form('compiled_form', (terms.token_term(terms.FULL, 1, weight=2.0),))\n"
        "def get_config(size: int = 3):\n"
        "    print('printed by the file')\n"
        "    config = default_config()\n"
        "    config.data.size = size\n"
        "    return config\n"
    )
    sent: list[Any] = []

    def run_here(function, *arguments):
        sent.extend([function, *arguments])
        raise UserError("another process")

    target = mode.compile_target("cpu:8", "")
    monkeypatch.setattr(
        mode,
        "compile_target",
        lambda *_, file="", **__: dataclasses.replace(target, code=False, file=file),
    )
    monkeypatch.setattr(libtpu_dump, "run_in_subprocess", run_here)
    flags = ["--config", f"{file}:size=512", *TINY, *TEXTLESS, *COLORLESS, "--mode=compile"]
    flags += ["--workdir", str(tmp_path), "--topology=cpu:8"]
    with registry._FORMS.temporary():
        assert command.main([*flags, "--config.objective.forms=compiled_form"]) == 2
    assert "compiled_form" not in registry.forms()  # as in a new process
    capsys.readouterr()
    monkeypatch.setattr(mode, "_report", lambda *_: {"known": "compiled_form" in registry.forms()})
    function, *arguments = sent
    with registry._FORMS.temporary():
        assert function(tmp_path, *arguments) == {"known": True}
    assert not capsys.readouterr().out


def fake(limit_units: int):
    """A fake report: up to so many images a data shard fit."""

    def report(config, site, words):
        images, parts = config.train.batch_size // 8, config.train.microbatches
        peak = 1e6 + 1e6 * images / parts
        fits = peak <= 1e6 + 1e6 * limit_units
        return {
            "fits": fits, "peak_bytes": peak, "limit_bytes": site.limit,
            "over_bytes": 0.0 if fits else 1.0, "compile_seconds": 0.0,
            "memory": {"params": 1e6}, "flops": {"compiled": 1.5, "model": 1.0, "ratio": 1.0},
            "topology": "cpu:8", "devices": 8, "microbatches": parts,
            "mesh": {"replica": 8, "fsdp": 1, "tensor": 1}, "batch_size": config.train.batch_size,
            "batch_per_device": images,
        }  # fmt: skip

    return report


def test_the_largest_batch_and_suggestions_are_printed(tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(mode, "report_program", fake(22))
    monkeypatch.setattr(compile_report, "_costs", lambda report: "")
    base = [*ARGUMENTS, "--workdir", str(tmp_path), "--topology=cpu:8", "--memory=1"]
    assert command.main([*base, "--largest-batch"]) == 0
    report = json.loads((tmp_path / "compile.json").read_text())
    assert (
        report["largest_batch"] == 22
        and len(report["tried"]) >= 2
        and "22 images a data shard" in capsys.readouterr().out
    )
    monkeypatch.setattr(mode, "report_program", fake(4))
    assert command.main([*base, "--suggest", "--config.train.batch_size=64"]) == 3
    err = capsys.readouterr().err
    assert "add --config.train.microbatches=2" in err or "add --config.model.remat" in err
    rows = json.loads((tmp_path / "compile.json").read_text())["tried"]
    assert rows[0]["tried"] == "as configured" and len(rows) >= 2
    assert {row["flops_ratio"] for row in rows} == {1.5}  # microbatches count too


@pytest.mark.parametrize(("images", "parts"), [(2, ""), (4, "2"), (6, ""), (32, "16")])
def test_advised_microbatches_divide_the_batch(
    images: int, parts: str, tmp_path, capsys, monkeypatch
) -> None:
    """Two megabytes: the state needs one, and every image of a data shard another one."""
    monkeypatch.setattr(mode, "report_program", fake(1))
    monkeypatch.setattr(compile_report, "_costs", lambda report: "")
    size = [
        f"--config.train.batch_size={8 * images}",
        "--config.data.size=512",
        "--workdir",
        str(tmp_path),
    ]
    assert command.main([*ARGUMENTS, *size, "--topology=cpu:8", f"--memory={2e6 / 2**30}"]) == 3
    assert "".join(re.findall(r"microbatches=(\d+)", capsys.readouterr().err)) == parts


@pytest.mark.parametrize(("gib", "printed"), [(55, False), (62, True)])
def test_a_need_beyond_the_default_gpu_pool_is_printed(
    gib: int, printed: bool, tmp_path, capsys, monkeypatch
) -> None:
    """Three quarters of an H100 are 59 GiB."""
    target = mode.CompileTarget(
        topology=mode.topologies.parse_topology("h100:8"), devices=jax.devices(), limit=64 * 2**30
    )
    monkeypatch.setattr(mode, "compile_target", lambda *_, **__: target)
    monkeypatch.setattr(
        mode, "report_program", lambda *given: fake(10**6)(*given) | {"peak_bytes": gib * 2**30}
    )
    monkeypatch.setattr(compile_report, "_costs", lambda report: "")
    assert (
        command.main([*ARGUMENTS, "--workdir", str(tmp_path), "--topology=h100:8", "--memory=64"])
        == 0
    )
    assert ("XLA_CLIENT_MEM_FRACTION=0.9" in capsys.readouterr().out) == printed


@pytest.mark.slow
def test_the_command_creates_its_devices(tmp_path) -> None:
    """A new process with one device compiles for twelve."""
    arguments = [
        sys.executable,
        "-m",
        "m3i_jax.main",
        *ARGUMENTS,
        "--workdir",
        str(tmp_path),
        "--topology=cpu:12",
    ]
    done = subprocess.run(
        [*arguments, "--config.train.batch_size=24"],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "compile.json").read_text())["devices"] == 12


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
def test_a_tpu_step_without_a_tpu(tmp_path, capsys) -> None:
    small = ["--config.train.batch_size=32", "--config.model.scan=true"]
    assert command.main([*ARGUMENTS, *small, "--workdir", str(tmp_path), "--topology=v5e:2x2"]) == 0
    report = json.loads((tmp_path / "compile.json").read_text())
    assert report["fits"] and report["roofline"]["step_seconds"] > 0
    assert 1 <= report["flops"]["ratio"] < 1.2 and report["collectives"]["all-reduce"]["count"] > 0
    assert (
        command.main(
            [*ARGUMENTS, *small, "--workdir", str(tmp_path), "--topology=v5e:2x2", "--code"]
        )
        == 0
    )
    whole = json.loads((tmp_path / "compile.json").read_text())
    differ = {key for key in report if report[key] != whole[key]}
    assert differ <= {"compile_seconds", "compiler_seconds", "peak_bytes", "peak_ratio", "memory"}
    # what the compiler holds against the limit has gaps
    assert 0 <= report["peak_bytes"] - whole["peak_bytes"] < 2**20
    assert (
        whole["compiler_seconds"] > 0 and report["compile_seconds"] < whole["compile_seconds"] / 2
    )
    huge = ["--config.train.batch_size=400000", "--config.data.size=800000"]
    assert command.main([*ARGUMENTS, *huge, "--workdir", str(tmp_path), "--topology=v5e:2x2"]) == 3
    assert "of 15.75 GiB a device" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
def test_the_peak_equals_that_of_the_tpu_compiler() -> None:
    """Three towers in scans, at three batch sizes: the memory of the largest, as given by the
    refusal, lies on the line through the peaks of the others; the second fits although the sum of
    its statistics exceeds the memory of a chip."""
    where = mode.compile_target("v5e:1x1", "")
    one = jax.sharding.SingleDeviceSharding(where.devices[0])

    def shape(*size: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(size, jnp.bfloat16, sharding=one)

    def tower(weights: tuple[jax.Array, jax.Array], x_BxD: jax.Array) -> jax.Array:
        block = jax.checkpoint(
            lambda x, w: x + jax.nn.gelu(x @ w[0]) @ w[1],
            policy=jax.checkpoint_policies.dots_saveable,
        )
        return jax.lax.scan(lambda x, w: (block(x, w), None), x_BxD, weights)[0]

    def loss(weights: list[tuple[jax.Array, jax.Array]], x_BxD: jax.Array) -> jax.Array:
        first = tower(weights[0], x_BxD)
        ends = tower(weights[1], first), tower(weights[2], 2 * first)
        return sum(jnp.square(end.astype(jnp.float32)).sum() for end in ends)  # type: ignore[return-value]

    weights = [(shape(depth, 768, 3072), shape(depth, 3072, 768)) for depth in (12, 4, 4)]
    peaks = []
    for rows in (65_536, 98_304):
        found = jax.jit(jax.grad(loss)).lower(weights, shape(rows, 768)).compile().memory_analysis()
        peaks.append(found.peak_memory_in_bytes)
    assert (
        compile_report.program_memory(found, {}, 0.0).peak
        > where.limit
        > compile_report.program_memory(found, {}, 0.0, own=True).peak
        == peaks[1]
    )
    with pytest.raises(jax.errors.JaxRuntimeError) as refused:
        jax.jit(jax.grad(loss)).lower(weights, shape(131_072, 768)).compile()
    wanted = compile_report.parse_out_of_memory(str(refused.value))
    assert wanted is not None and wanted[0] == pytest.approx(2 * peaks[1] - peaks[0], rel=0.01)
