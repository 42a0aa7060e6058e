"""Kernels are compared with the plain form before a program with them is compiled: a toy call
without a kernel's cost, and the kernels of the package in their interpreter."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m3i_jax import parallel
from m3i_jax.errors import UserError
from m3i_jax.models import attention_tpu, initializers, layers, sampled_sums
from m3i_jax.models.dcnv3 import dcnv3
from m3i_jax.parallel import barriers, kernel_calls, kernel_checks


@pytest.fixture(autouse=True)
def a_device_with_kernels(monkeypatch, tmp_path):
    """A machine that JAX takes for a TPU where kernels are chosen, with an empty cache."""
    monkeypatch.setattr(parallel.mesh, "platform", lambda: "tpu")
    monkeypatch.setattr(kernel_checks, "needed", lambda: True)
    before = jax.config.values["jax_compilation_cache_dir"]
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    kernel_calls.forget_all()
    yield
    kernel_calls.forget_all()
    jax.config.update("jax_compilation_cache_dir", before)


@pytest.fixture
def checks(monkeypatch):
    """The calls that were checked, not found in the cache."""
    made, check = [], kernel_checks.check_call
    monkeypatch.setattr(kernel_checks, "check_call", lambda call: made.append(call) or check(call))
    return made


def plain(factor, x):
    return factor * x


def wrong(factor, x):  # in the last element of a row, where only a mask is forgotten
    return factor * x.at[:, -1].set(7.0)


def wrong_backward(factor, x):
    return factor * x + jnp.sin(x) - jax.lax.stop_gradient(jnp.sin(x))


def on_its_own(factor, x):  # not in the mesh of the program
    assert jax.sharding.get_abstract_mesh().empty
    return x * factor


def crash(factor, x):
    raise NotImplementedError("Mosaic: unsupported\nshape cast")


def start(kernel):
    """What a new process makes of a program with a call: (output, whether it used the kernel, lines
    and metrics)."""
    kernel_calls.forget_all()
    said, used = [], []

    def run(x):
        call = parallel.KernelCall("toy", 2.0, kernel, plain, (x,), ((-1.0, 1.0),))
        used.append(parallel.trusted(call))
        return plain(2.0, x)

    program = parallel.Program(run)
    mesh = parallel.make_mesh((1, 1, 1), jax.devices()[:1])
    with parallel.reported_checks(lambda *line: said.append(line)), jax.set_mesh(mesh):
        for _ in range(2):
            out = program(jnp.ones((3, 4)))
    assert len(used) == 2 - used[-1]  # traced once, and once more without the kernel
    return out, used[-1], said


def test_a_right_kernel_is_used_and_checked_once(checks):
    for again in (False, True):
        out, used, [(line, values)] = start(on_its_own)
        assert used and out.tolist() == [[2.0] * 4] * 3
        assert values == {"kernels/used": 1, "kernels/refused": 0, "kernels/error": 0}
        assert line.startswith("1 kernel call(s) equal the plain form on cpu") and len(checks) == 1
        assert again or checks[0].shapes == "3x4 float32"


@pytest.mark.parametrize(
    ("kernel", "reason"),
    [
        (wrong, "its outputs are wrong (errors "),
        (wrong_backward, "its gradients are wrong (errors "),
        (crash, "fails (Mosaic: unsupported shape cast)"),
    ],
)
def test_a_wrong_kernel_is_replaced_with_one_warning(checks, kernel, reason):
    for again in (False, True):
        out, used, [(line, values)] = start(kernel)
        assert not used and out.tolist() == [[2.0] * 4] * 3
        assert line.startswith("warning: kernel toy of 3x4 float32 on cpu: ") and "\n" not in line
        assert reason in line and "please report" in line and len(checks) == 1
        assert ("found before" in line) == again
        assert (values["kernels/used"], values["kernels/refused"]) == (0, 1)
        assert values["kernels/error"] > 0.3


def test_all_hosts_refuse_what_one_refuses(monkeypatch, checks):
    def exchange(name, text, limit):
        assert name == "kernels" and json.loads(text) == {}  # right on this host
        return [text, json.dumps({checks[0].key: "fails (out of luck)"})]

    monkeypatch.setattr(barriers, "exchange_values", exchange)
    monkeypatch.setattr(barriers, "barrier", lambda *_, **__: None)
    monkeypatch.setattr(barriers, "host_names", lambda: 2)
    _, used, [(line, values)] = start(plain)
    assert not used and "host 1: fails (out of luck)" in line and values["kernels/refused"] == 1


def on_its_own_program(kernel):
    """What a caller's own jitted function does: (output, whether it used the kernel)."""
    kernel_calls.forget_all()
    used = []

    def run(x):
        call = parallel.KernelCall(kernel.__name__, 2.0, kernel, plain, (x,), ((-1.0, 1.0),))
        used.append(parallel.kernels(len(x), ("tpu",)) and parallel.trusted(call))
        return plain(2.0, x)

    function = jax.jit(run)
    with jax.set_mesh(parallel.make_mesh((1, 1, 1), jax.devices()[:1])):
        out = [function(jnp.ones((3, 4))) for _ in range(2)][-1]
        # in a trace of the caller's, too
        assert jax.eval_shape(lambda x: function(x) + 1, jnp.ones((3, 4))).shape == (3, 4)
    assert not kernel_calls.take_pending()
    return out.tolist() == [[2.0] * 4] * 3, used


def test_outside_a_program_a_kernel_is_checked_while_it_is_traced(monkeypatch, checks, caplog):
    assert on_its_own_program(on_its_own) == (True, [True]) and len(checks) == 1
    assert not caplog.text
    assert on_its_own_program(wrong) == (True, [False]) and len(checks) == 2
    assert "warning: kernel wrong of 3x4 float32 on cpu: its outputs are wrong" in caplog.text
    with kernel_calls.without_kernels():
        assert on_its_own_program(on_its_own) == (True, [False])
    # several hosts cannot agree there, and one of them may trace what the others do not
    monkeypatch.setattr(barriers, "host_names", lambda: 2)
    assert on_its_own_program(on_its_own) == (True, [False]) and len(checks) == 2
    monkeypatch.setenv("M3I_JAX_KERNELS", "1")
    assert on_its_own_program(wrong) == (True, [True]) and len(checks) == 2


def test_settings(monkeypatch, checks):
    monkeypatch.setenv("M3I_JAX_KERNELS", "1")
    assert start(plain)[1:] == (True, []) and not checks
    monkeypatch.setenv("M3I_JAX_KERNELS", "0")
    assert not parallel.kernels(4)
    monkeypatch.setenv("M3I_JAX_KERNELS", "yes")
    with pytest.raises(UserError, match="M3I_JAX_KERNELS=yes: is not one of check, 0, 1"):
        start(plain)


def test_a_check_that_ends_the_process_is_not_repeated_for_ever(checks, tmp_path):
    start(plain)
    [file] = (tmp_path / "kernel_checks").glob("*.json")
    file.rename(file.with_suffix(".started0"))  # three bytes or more: so many starts
    out, used, [(line, _)] = start(plain)
    assert not used and len(checks) == 1 and "earlier checks of it never ended" in line
    assert out.tolist() == [[2.0] * 4] * 3


def calls_of_the_package():
    """Attention with a mask, and DCNv3, in bfloat16."""
    one = layers.block(128, 4, 1.0, "bfloat16")
    shapes = initializers.shapes_of(one, jnp.zeros((1, 1, 128)))
    row = lambda *shape, dtype="bfloat16": jax.ShapeDtypeStruct(shape, dtype)
    mesh = parallel.make_mesh((2, 1, 1), jax.devices()[:2])
    with jax.set_mesh(mesh), kernel_calls.noted_calls():
        jax.eval_shape(
            lambda p, x, where: one.apply({"params": p}, x, None, where),
            *(shapes, row(4, 9, 128), row(4, 9, dtype=bool)),
        )
        jax.eval_shape(
            lambda *arrays: dcnv3(*arrays, groups=2),
            *(row(4, 4, 4, 8), row(4, 4, 4, 36), row(4, 4, 4, 18)),
        )
    return kernel_calls.take_pending()


def test_the_kernels_of_the_package_are_found_and_right(monkeypatch):
    attention, sampled = calls_of_the_package()
    assert (attention.name, attention.shapes) == ("attention", "2x9x384 bfloat16, 2x9 bool")
    assert sampled.shapes == "2x16x8 bfloat16, 2x16x2x9x2 bfloat16, 2x16x2x9 bfloat16"
    monkeypatch.setattr(sampled_sums, "_PART", 6)
    for call in (attention, sampled):
        result = kernel_checks.check_call(call)
        assert not result.reason and 1e-4 < result.error < 0.02, call.name


@pytest.mark.slow  # toy kernels that are wrong are above
def test_attention_with_a_wrong_sign_is_seen(monkeypatch):
    attention, _ = calls_of_the_package()
    forward = attention_tpu.forward
    monkeypatch.setattr(attention_tpu, "forward", lambda *a, **k: -forward(*a, **k))
    assert "outputs are wrong" in kernel_checks.check_call(attention).reason


def test_first_and_last_row_are_compared():
    call = parallel.KernelCall(
        "toy",
        2.0,
        lambda f, x: f * x.at[-1].add(1),
        plain,
        (np.zeros((5, 2), np.float32),),
        ((0, 1),),
    )
    assert kernel_checks.check_call(call).reason
