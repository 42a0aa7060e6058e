"""Texts of programs, written by hand after what the compilers print, against bytes counted by
hand."""

from m3i_jax.profiling import hbm_traffic, hlo


def test_traffic_leaves_out_the_scratchpad_and_what_a_fusion_does_not_read() -> None:
    text = """HloModule m
%inner (a: f32[100,8], b: f32[8]) -> f32[100,8] {
  %a = f32[100,8] parameter(0)
  %b = f32[8] parameter(1)
  %i = s32[] constant(3)
  %o = s32[] constant(0)
  %s = f32[1,8] dynamic-slice(%a, %i, %o), dynamic_slice_sizes={1,8}
  %r = f32[1,8] reshape(%b)
  %u = f32[1,8] add(%s, %r)
  ROOT %d = f32[100,8] dynamic-update-slice(%a, %u, %i, %o)
}
ENTRY %main (x: f32[100,8], y: f32[8]) -> f32[100,8] {
  %x = f32[100,8]{1,0} parameter(0)
  %y = f32[8]{0} parameter(1)
  %near = f32[8]{0:T(128)S(1)} copy(%y)
  ROOT %f = f32[100,8]{1,0} fusion(%x, %near), kind=kLoop, calls=%inner
}
"""
    # y into the scratchpad; a row of x, and the row that is written
    assert hbm_traffic.hbm_traffic(hlo.parse_hlo(text)) == 8 * 4 + (8 + 8) * 4


def test_what_a_fusion_inside_a_fusion_does_not_read_is_left_out() -> None:
    text = """HloModule m
%deep (p: f32[100,8], n: s32[]) -> f32[1,8] {
  %p = f32[100,8] parameter(0)
  %n = s32[] parameter(1)
  %o = s32[] constant(0)
  ROOT %s = f32[1,8] dynamic-slice(%p, %n, %o), dynamic_slice_sizes={1,8}
}
%inner (a: f32[100,8], i: s32[], b: f32[1,8]) -> f32[1,8] {
  %a = f32[100,8] parameter(0)
  %i = s32[] parameter(1)
  %b = f32[1,8] parameter(2)
  %row = f32[1,8] fusion(%a, %i), kind=kLoop, calls=%deep
  ROOT %u = f32[1,8] add(%row, %b)
}
ENTRY %main (x: f32[100,8], i: s32[], y: f32[1,8]) -> f32[1,8] {
  %x = f32[100,8]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %y = f32[1,8]{1,0} parameter(2)
  ROOT %f = f32[1,8]{1,0} fusion(%x, %i, %y), kind=kLoop, calls=%inner
}
"""
    # a row of x, the number of the row, y, and the sum
    assert hbm_traffic.hbm_traffic(hlo.parse_hlo(text)) == (8 + 1 + 8 + 8) * 4


def test_memory_that_is_only_taken_is_no_traffic() -> None:
    line = 'f32[100,8]{1,0} custom-call(), custom_call_target="AllocateBuffer"'
    text = f"HloModule m\nENTRY %main () -> f32[100,8] {{\n  ROOT %out = {line}\n}}\n"
    assert hbm_traffic.hbm_traffic(hlo.parse_hlo(text)) == 0


def test_traffic_of_a_slice_that_is_fetched_ahead_is_that_of_the_slice() -> None:
    text = """HloModule m
%fetch (p: f32[100,8]) -> f32[2,8] {
  %p = f32[100,8]{1,0} parameter(0)
  ROOT %s = f32[2,8]{1,0:T(128)S(1)} slice(%p), slice={[4:6], [0:8]}
}
ENTRY %main (x: f32[100,8]) -> f32[2,8] {
  %x = f32[100,8]{1,0} parameter(0)
  %begun = ((f32[100,8]{1,0}), f32[2,8]{1,0:T(128)S(1)}, s32[]{:S(2)}) async-start(%x), calls=%fetch
  ROOT %near = f32[2,8]{1,0:T(128)S(1)} async-done(%begun)
}
"""
    assert hbm_traffic.hbm_traffic(hlo.parse_hlo(text)) == 2 * 8 * 4


def test_traffic_of_a_kernel_that_reads_windows_of_its_argument_again_is_what_it_states() -> None:
    for stated, wanted in ((10_000, 10_000), (99, 2 * 100 * 8 * 4)):
        line = (
            'f32[100,8]{1,0} custom-call(%x), custom_call_target="tpu_custom_call", backend_config='
            '{"custom_call_config":{"cost_estimate":{"flops":"1","transcendentals":"0",'
            f'"bytes_accessed":"{stated}"}}}}}}'
        )
        text = (
            "HloModule m\nENTRY %main (x: f32[100,8]) -> f32[100,8] {\n"
            f"  %x = f32[100,8]{{1,0}} parameter(0)\n  ROOT %out = {line}\n}}\n"
        )
        assert hbm_traffic.hbm_traffic(hlo.parse_hlo(text)) == wanted
