"""Traffic by part of the model: a program by hand, and the scopes of real steps."""

import jax

from m3i_jax import parallel
from m3i_jax.profiling import hbm_traffic, hlo, traffic_parts
from m3i_jax.training import trainer
from tests import toy

TEXT = """HloModule m
%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %s = f32[] add(%a, %b), metadata={op_name="jit(train_step)/optimizer/reduce_sum"}
}
%body (p: (s32[], f32[100])) -> (s32[], f32[100]) {
  %p = (s32[], f32[100]{0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = f32[100]{0} get-tuple-element(%p), index=1
  %c = f32[100]{0} copy(%x)
  %y = f32[100]{0} negate(%c), metadata={op_name="STAGE/flops=0/neg"}
  ROOT %t = (s32[], f32[100]{0}) tuple(%i, %y)
}
%cond (p: (s32[], f32[100])) -> pred[] {
  %p = (s32[], f32[100]{0}) parameter(0)
  ROOT %r = pred[] constant(true)
}
ENTRY %main (x: f32[100]) -> f32[100] {
  %x = f32[100]{0} parameter(0)
  %k = s32[] constant(0)
  %n = f32[100]{0} negate(%x)
  %unused = f32[50]{0} slice(%x), slice={[0:50]}
  %t = (s32[], f32[100]{0}) tuple(%k, %n)
  %w = (s32[], f32[100]{0}) while(%t), condition=%cond, body=%body, NOTES
  ROOT %o = f32[100]{0} get-tuple-element(%w), index=1
}
""".replace(
    "NOTES", 'metadata={op_name="STAGE"}, backend_config={"known_trip_count":{"n":"3"}}'
).replace("STAGE", "jit(train_step)/jvp(encoder)/stage1/while")


def test_a_part_has_what_its_loops_move_and_parts_sum_to_all() -> None:
    program = hlo.parse_hlo(TEXT)
    found = traffic_parts.traffic_by_part(program)
    # without a name: a copy counts to what reads it, and what enters a loop to the loop
    assert found == {
        "encoder/stage1/sampling": 3 * 1600.0,
        "encoder/stage1": 800.0,
        "other": 400.0,
    }
    assert sum(found.values()) == hbm_traffic.hbm_traffic(program)


def test_the_step_names_its_parts() -> None:
    mesh = parallel.make_mesh((1, 1, 1), jax.devices()[:1])
    one = trainer.Trainer(toy.settings(), mesh, toy.VOCABULARY)
    closed = jax.make_jaxpr(one.trace)(one.template, trainer.abstract_batch(one.config))
    parts = {traffic_parts.part_of_operation(name) for name in _names(closed.jaxpr)}
    roots = {part.split("/")[0] for part in parts} - {""}
    assert {"views", "encoder", "target_encoder", "losses", "decoder", "optimizer"} <= roots
    assert {"encoder/attention", "target_encoder/mlp", "decoder/mlp"} <= parts


def _names(jaxpr, outer=""):
    for equation in jaxpr.eqns:
        name = f"{outer}/{equation.source_info.name_stack}"
        yield name
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=_is_jaxpr):
            if _is_jaxpr(value):
                yield from _names(getattr(value, "jaxpr", value), name)


def _is_jaxpr(value) -> bool:
    return hasattr(getattr(value, "jaxpr", value), "eqns")
