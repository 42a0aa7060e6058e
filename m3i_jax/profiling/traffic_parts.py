"""Memory traffic of a compiled train step by part of the model, from the scopes of its operations:
`jax.named_scope` puts the name of a part into the metadata of what is traced inside it.

The compiler adds operations without a scope, such as the copies by which a TPU fetches parameters
ahead. They count to the part that reads them, or else to that which made what they read, to that of
the loop or call around them, or to `other`."""

import collections
import functools
import re
from collections.abc import Callable, Sequence

from m3i_jax.profiling import hbm_traffic
from m3i_jax.profiling.hlo import HloInstruction, HloProgram, trip_count

# outermost first; of nested ones the inner counts, such as the decoder in the losses
PARTS = (
    "views",
    "encoder",
    "target_encoder",
    "text",
    "pyramid",
    "head",
    "losses",
    "decoder",
    "optimizer",
)
_INSIDE = re.compile(r"stem|stage\d+|down|attention|mlp|dino_encoder|dino_decoder|matching|flops=0")
_WORDS = {"flops=0": "sampling"}  # of maps at fractional places, which is no work of the model
_NEAR = 4  # operations between one without a scope and the one whose part it counts to
_NAME = re.compile(r'op_name="([^"]*)"')
OTHER = "other"


def part_of_operation(name: str) -> str:
    """The part of the model that an operation belongs to, "" if its name has no scope.

    >>> part_of_operation("jit(train_step)/transpose(jvp(encoder))/stage2/while/body/flops=0/mul")
    'encoder/stage2/sampling'
    >>> part_of_operation("jit(train_step)/losses/jvp(decoder)/Block/attention/qkv/dot_general")
    'decoder/attention'
    >>> part_of_operation("jit(train_step)/add")
    ''
    """
    words = re.split(r"[/()]+", name)
    at = max((i for i, word in enumerate(words) if word in PARTS), default=-1)
    if at < 0:
        return ""
    inside = [word for word in words[at + 1 :] if _INSIDE.fullmatch(word)]
    return "/".join(dict.fromkeys([words[at], *(_WORDS.get(word, word) for word in inside)]))


def traffic_by_part(program: HloProgram) -> dict[str, float]:
    """{part: bytes} whose sum is that of `hbm_traffic.hbm_traffic`, the largest first."""
    totals: dict[str, float] = collections.defaultdict(float)

    @functools.cache
    def parts(name: str) -> dict[str, str]:
        return _parts(program.computations.get(name, {}))

    def walk(name: str, times: int, outer: str) -> None:
        for each in program.computations.get(name, {}).values():
            part = parts(name)[each.name] or outer
            totals[part] += times * hbm_traffic.instruction_traffic(program, each)
            if each.opcode == "while":
                for body in each.called("body", "condition"):
                    walk(body, times * trip_count(program, each), part)
            elif each.opcode not in ("async-update", "async-done", "fusion"):
                kinds = ("calls", "branches", "true_computation", "false_computation")
                for body in each.called(*kinds, *(("to_apply",) if each.opcode == "call" else ())):
                    walk(body, times, part)

    walk(program.entry, 1, OTHER)
    largest = sorted(totals, key=lambda part: -totals[part])
    return {part: totals[part] for part in largest if totals[part]}


def _parts(computation: dict[str, HloInstruction]) -> dict[str, str]:
    """{instruction: its part}, "" where neither it nor one near it has a scope."""
    own: dict[str, str] = {}
    users: dict[str, list[str]] = collections.defaultdict(list)
    for each in computation.values():
        name = _NAME.search(each.text)
        own[each.name] = part_of_operation(name[1]) if name else ""
        for operand in each.operands:
            users[operand].append(each.name)

    def nearest(name: str, following: Callable[[str], Sequence[str]]) -> str:
        names: Sequence[str] = [name]
        for _ in range(_NEAR):
            names = [other for one in names for other in following(one) if other in own][:64]
            if found := next((own[one] for one in names if own[one]), ""):
                return found
        return ""

    operands = lambda name: computation[name].operands
    return {
        name: part or nearest(name, users.__getitem__) or nearest(name, operands)
        for name, part in own.items()
    }
