# ruff: noqa: E501 (lines as the compiler prints them)
"""Texts of compiled programs, written by hand after what the compilers print, and one compiled
here, against counts by hand."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from m3i_jax import parallel
from m3i_jax.profiling import hbm_traffic, hlo

# A scan of 12 turns whose counter starts at 2, as a peeled loop's does, and in it a reduced
# gradient and a gathered weight.
LOOP = """HloModule jit_f, is_scheduled=true, num_partitions=4
%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[]{:T(128)} parameter(0)
  %b = f32[]{:T(128)} parameter(1)
  ROOT %sum = f32[]{:T(128)} add(%a, %b)
}
%body (p: (s32[], f32[8,16], bf16[4,16])) -> (s32[], f32[8,16], bf16[4,16]) {
  %p = (s32[]{:T(128)}, f32[8,16]{1,0:T(8,128)}, bf16[4,16]{1,0:T(8,128)(2,1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %x = f32[8,16]{1,0:T(8,128)} get-tuple-element(%p), index=1
  %w = bf16[4,16]{1,0:T(8,128)(2,1)} get-tuple-element(%p), index=2
  %whole = bf16[16,16]{1,0:T(8,128)(2,1)} all-gather(%w), channel_id=1, replica_groups=[1,4]<=[4], dimensions={0}
  %y = f32[8,16]{1,0:T(8,128)} convolution(%x, %whole), dim_labels=bf_io->bf, metadata={op_name="jit(f)/while/body/dot_general"}
  %z = (f32[8,16]{1,0:T(8,128)}, /*index=1*/f32[]{:T(128)}) all-reduce(%y, %scale), replica_groups=mesh['a'=2,'b'=2] {'a','b'}
  %scale = f32[]{:T(128)} constant(0.5)
  %one = s32[]{:T(128)} constant(1)
  %next = s32[]{:T(128)} add(%i, %one)
  %first = f32[8,16]{1,0:T(8,128)} get-tuple-element(%z), index=0
  ROOT %out = (s32[]{:T(128)}, f32[8,16]{1,0:T(8,128)}, bf16[4,16]{1,0:T(8,128)(2,1)}) tuple(%next, %first, %w)
}
%condition (q: (s32[], f32[8,16], bf16[4,16])) -> pred[] {
  %q = (s32[]{:T(128)}, f32[8,16]{1,0:T(8,128)}, bf16[4,16]{1,0:T(8,128)(2,1)}) parameter(0)
  %j = s32[]{:T(128)} get-tuple-element(%q), index=0
  %limit = s32[]{:T(128)} constant(12)
  ROOT %lt = pred[]{:T(512)} compare(%j, %limit), direction=LT
}
ENTRY %main (x0: f32[8,16], w0: bf16[4,16]) -> f32[8,16] {
  %x0 = f32[8,16]{1,0:T(8,128)} parameter(0)
  %w0 = bf16[4,16]{1,0:T(8,128)(2,1)} parameter(1)
  %zero = s32[]{:T(128)} constant(2)
  %start = (s32[]{:T(128)}, f32[8,16]{1,0:T(8,128)}, bf16[4,16]{1,0:T(8,128)(2,1)}) tuple(%zero, %x0, %w0)
  %loop = (s32[]{:T(128)}, f32[8,16]{1,0:T(8,128)}, bf16[4,16]{1,0:T(8,128)(2,1)}) while(%start), condition=%condition, body=%body
  ROOT %end = f32[8,16]{1,0:T(8,128)} get-tuple-element(%loop), index=1
}
"""


def test_what_stands_in_a_loop_counts_as_often_as_it_turns() -> None:
    program = hlo.parse_hlo(LOOP)
    assert program.devices == 4 and program.entry == "main"
    assert hlo.trip_count(program, program.computations["main"]["loop"]) == 10
    assert hlo.hlo_flops(program) == 10 * 2 * 8 * 16 * 16
    found = hlo.collective_traffic(program)
    assert found["all-gather"] == hlo.Traffic(10, 10 * 3 * 4 * 16 * 2)
    assert found["all-reduce"] == hlo.Traffic(10, 10 * 2 * 3 / 4 * (8 * 16 + 1) * 4)


def test_a_noted_trip_count_is_believed() -> None:
    noted = LOOP.replace(
        "body=%body\n", 'body=%body, backend_config={"known_trip_count":{"n":"7"}}\n'
    )
    program = hlo.parse_hlo(noted)
    assert hlo.trip_count(program, program.computations["main"]["loop"]) == 7


SPREAD = """HloModule jit_g, num_partitions=8
%part.1 (a: bf16[8,64]) -> bf16[64,64] {
  %a = bf16[8,64]{1,0} parameter(0)
  ROOT %g1 = bf16[64,64]{1,0} all-gather(%a), replica_groups={}, dimensions={0}, backend_config={"chain_id":"3"}
}
%part.2 (b: bf16[8,64]) -> bf16[64,64] {
  %b = bf16[8,64]{1,0} parameter(0)
  ROOT %g2 = bf16[64,64]{1,0} all-gather(%b), replica_groups={}, dimensions={0}, backend_config={"chain_id":"3"}
}
%slice (c: f32[64,64], i: s32[]) -> f32[8,64] {
  %c = f32[64,64]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %o = s32[] constant(0)
  %sum = f32[64,64]{1,0} all-reduce(%c), replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add
  ROOT %mine = f32[8,64]{1,0} dynamic-slice(%sum, %i, %o), dynamic_slice_sizes={8,64}
}
ENTRY %main (x: bf16[8,64], y: f32[64,64], k: s32[]) -> f32[8,64] {
  %x = bf16[8,64]{1,0} parameter(0)
  %y = f32[64,64]{1,0} parameter(1)
  %k = s32[] parameter(2)
  %f1 = bf16[64,64]{1,0} fusion(%x), kind=kCustom, calls=%part.1
  %f2 = bf16[64,64]{1,0} fusion(%x), kind=kCustom, calls=%part.2
  %s = (f32[64,64]{1,0}, f32[64,64]{1,0}) collective-permute-start(%y), source_target_pairs={{0,1},{1,0}}
  %t = f32[64,64]{1,0} collective-permute-done(%s)
  ROOT %r = f32[8,64]{1,0} fusion(%t, %k), kind=kCustom, calls=%slice
}
"""


@pytest.mark.parametrize(
    ("line", "outside"),
    [
        # eight shares of the other host, through eight devices
        ("all-gather(%a), replica_groups=[1,16]<=[16]", 8 * 4096 / 8),
        ("reduce-scatter(%a), replica_groups=[1,16]<=[16]", 4096 / 2 / 8),
        # each device has its own, which no other could fetch
        ("all-to-all(%a), replica_groups=[1,16]<=[16]", 4096 / 2),
        ("collective-permute(%a), source_target_pairs={{0,1},{1,0}}", 0),
        ("collective-permute(%a), source_target_pairs={{0,1},{7,8}}", 4096),
    ],
)
def test_of_what_a_device_receives_a_part_comes_from_other_hosts(line: str, outside: float) -> None:
    text = (
        "HloModule m, num_partitions=16\nENTRY %e (a: f32[1024]) -> f32[1024] {\n  %a ="
        " f32[1024]{0} parameter(0)\n"
    )
    program = hlo.parse_hlo(f"{text}  ROOT %g = f32[1024]{{0}} {line}\n}}\n")
    assert [traffic.outside for traffic in hlo.collective_traffic(program, 8).values()] == [
        pytest.approx(outside)
    ]
    assert [traffic.outside for traffic in hlo.collective_traffic(program).values()] == [0.0]


def test_an_asynchronous_collective_reads_its_operand_and_writes_its_result() -> None:
    """Its result is a tuple that begins with the operand, and may end in contexts."""
    program = hlo.parse_hlo(SPREAD)
    permute = program.computations["main"]["s"]
    assert hbm_traffic.instruction_traffic(program, permute) == 2 * 64 * 64 * 4
    text = (
        "HloModule m\nENTRY %e (a: f32[8,64]) -> f32[64,64] {\n  %a = f32[8,64]{1,0} parameter(0)\n"
        "  %s = (f32[8,64]{1,0}, f32[64,64]{1,0}, u32[], u32[]) all-gather-start(%a),"
        " dimensions={0}\n"
        "  ROOT %d = f32[64,64]{1,0} all-gather-done(%s)\n}\n"
    )
    program = hlo.parse_hlo(text)
    moved = hbm_traffic.instruction_traffic(program, program.computations["e"]["s"])
    assert moved == (8 + 64) * 64 * 4


def test_what_is_spread_over_fusions_counts_once_and_a_kept_slice_is_a_scatter() -> None:
    found = hlo.collective_traffic(hlo.parse_hlo(SPREAD))
    assert found == {
        "all-gather": hlo.Traffic(1, 7 * 8 * 64 * 2),
        "collective-permute": hlo.Traffic(1, 64 * 64 * 4),
        "reduce-scatter": hlo.Traffic(1, 7 / 8 * 64 * 64 * 4),
    }


def entry(line: str, *parameters: str) -> hlo.HloProgram:
    """A program of one line and its parameters."""
    given = "".join(f"  %p{i} = {kind} parameter({i})\n" for i, kind in enumerate(parameters))
    return hlo.parse_hlo(
        f"HloModule m\nENTRY %main (p0: f32[]) -> f32[] {{\n{given}  ROOT %out = {line}\n}}\n"
    )


@pytest.mark.parametrize(
    ("line", "parameters", "wanted"),
    [
        ("f32[4,5] dot(%p0, %p1), lhs_contracting_dims={1}, rhs_contracting_dims={0}", ("f32[4,3]", "f32[3,5]"), 2 * 4 * 5 * 3),
        # batched product as a TPU prints it: the batch of 32 as a window, of whose 32 taps one is
        # real at each place
        (
            "f32[32,12,7,7] convolution(%p0, %p1), window={size=32x12 stride=31x11 lhs_dilate=32x12}, dim_labels=01bf_01oi->01bf",
            ("bf16[32,12,7,64]", "bf16[32,12,7,64]"),
            2 * 32 * 12 * 7 * 7 * 64,
        ),
        # 3 x 3 on 4 x 4 with padding 1: 2 + 3 + 3 + 2 real taps a side
        (
            "f32[2,4,4,8] convolution(%p0, %p1), window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_01io->b01f",
            ("f32[2,4,4,6]", "f32[3,3,6,8]"),
            2 * 2 * 8 * 6 * 10 * 10,
        ),
        # depthwise: a kernel of one input channel
        (
            "f32[2,4,6] convolution(%p0, %p1), window={size=1}, dim_labels=b0f_0io->b0f, feature_group_count=6",
            ("f32[2,4,6]", "f32[1,1,6]"),
            2 * 2 * 4 * 6,
        ),
        # cuDNN's, with a stride of two from 9 x 9 to 4 x 4: forward; from the output to the input;
        # from input and output to the kernel
        *(
            (
                f"({result}, u8[0]) custom-call(%p0, %p1), window={{size=3x3 stride=2x2}}, dim_labels=b01f_o01i->b01f, "
                f'custom_call_target="__cudnn$conv{which}"',
                given,
                2 * 2 * 8 * 6 * 12 * 12,
            )
            for which, result, given in (
                ("Forward", "f32[2,4,4,8]", ("f32[2,9,9,6]", "f32[8,3,3,6]")),
                ("BiasActivationForward", "f32[2,4,4,8]", ("f32[2,9,9,6]", "f32[8,3,3,6]")),
                ("BackwardInput", "f32[2,9,9,6]", ("f32[2,4,4,8]", "f32[8,3,3,6]")),
                ("BackwardFilter", "f32[8,3,3,6]", ("f32[2,9,9,6]", "f32[2,4,4,8]")),
            )
        ),
        (
            '(bf16[16,8], s8[64]) custom-call(%p0, %p1), custom_call_target="__cublas$lt$matmul", backend_config={"gemm_backend_config":'
            '{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"]}}}',
            ("bf16[16,32]", "bf16[32,8]"),
            2 * 16 * 8 * 32,
        ),
        (
            'bf16[16,8] custom-call(%p0), custom_call_target="tpu_custom_call", backend_config={"custom_call_config":{"body":"TUzv",'
            '"cost_estimate":{"flops":"4096","transcendentals":"0","bytes_accessed":"99"}}}',
            ("bf16[16,32]",),
            4096,
        ),
        (  # a kernel for Triton says it by the scopes of its call; the model's are fewer
            'bf16[16,8] custom-call(%p0), custom_call_target="__gpu$xla.gpu.triton", metadata={op_name='
            '"jit(f)/transpose(jvp(computed=700))/flops=400/pallas_call"}, backend_config={ir = "ML"}',
            ("bf16[16,32]",),
            700,
        ),
    ],
)  # fmt: skip
def test_products_and_convolutions(line: str, parameters: tuple[str, ...], wanted: int) -> None:
    assert hlo.hlo_flops(entry(line, *parameters)) == wanted


def test_a_compiled_program_on_eight_devices_has_the_collectives_it_must_have() -> None:
    """Gradients of a scan over six layers, data split over eight devices: each layer's gradient
    [16, 16] is reduced, in the loop."""
    mesh = parallel.make_mesh((8, 1, 1))

    def step(w_6xDxD, x_BxD):
        def loss(w):
            out, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x_BxD, w)
            return jnp.square(out).sum()

        return jax.grad(loss)(w_6xDxD)

    whole, rows = parallel.replicated(mesh), NamedSharding(mesh, PartitionSpec("replica"))
    jitted = jax.jit(step, in_shardings=(whole, rows), out_shardings=whole)
    given = jax.ShapeDtypeStruct((6, 16, 16), "float32"), jax.ShapeDtypeStruct((64, 16), "float32")
    program = hlo.parse_hlo(jitted.lower(*given).compile().as_text())
    found = hlo.collective_traffic(program)
    size = 6 * 16 * 16 * 4
    assert program.devices == 8 and set(found) == {"all-reduce"}
    assert found["all-reduce"].received == pytest.approx(2 * 7 / 8 * size) and found[
        "all-reduce"
    ].count in (1, 6)
    assert hlo.hlo_flops(program) == 6 * 3 * 2 * (64 / 8) * 16 * 16
