"""HBM traffic of a compiled program, estimated from its text (`profiling/hlo.py`)."""

import re

from m3i_jax.profiling.hlo import HloArray, HloInstruction, HloProgram, executed_counts

_FREE = {
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "while",
    "conditional",
    "call",
    "after-all",
    "iota",
    "partition-id",
}
_FREE |= {
    "copy-done",
    "slice-done",
    "async-start",  # the computation that it starts is counted itself
    "async-done",
    "async-update",
    "all-gather-done",
    "all-reduce-done",
    "collective-permute-done",
    "opt-barrier",
}
_SLICES = {"dynamic-slice", "slice", "gather"}
# what such an instruction returns begins with its operands
_ALIASED = {"all-gather-start", "collective-permute-start"}


def hbm_traffic(program: HloProgram) -> float:
    """Bytes that a device reads from and writes to HBM per step: operands and results of all
    instructions outside fusions, without those in the scratchpad. Of an operand that a fusion only
    slices, the slices count; of a buffer that is updated in place, the update."""
    return sum(
        times * instruction_traffic(program, each)
        for times, each, fused in executed_counts(program)
        if not fused
    )


def instruction_traffic(program: HloProgram, each: HloInstruction) -> float:
    """Bytes that one run of an instruction outside fusions moves, without those of the computations
    that it calls."""
    return 0.0 if each.opcode in _FREE else _moved(program, each)


def _hbm_bytes(items: tuple[HloArray, ...] | list[HloArray]) -> float:
    return sum(array.bytes for array in items if not array.fast)


def _moved(program: HloProgram, each: HloInstruction) -> float:
    computation = program.computations[each.inside]
    operands = [computation[name].arrays for name in each.operands if name in computation]
    if each.opcode in _SLICES or each.opcode.removesuffix("-start") in ("slice", "dynamic-slice"):
        return (_hbm_bytes(operands[0]) > 0) * sum(a.bytes for a in each.arrays[-1:]) + _hbm_bytes(
            each.arrays[-1:]
        )
    if each.opcode == "dynamic-update-slice":
        return _hbm_bytes(operands[1]) + (_hbm_bytes(each.arrays) > 0) * sum(
            a.bytes for a in operands[1]
        )
    if each.opcode == "copy-start":
        return _hbm_bytes(operands[0]) + _hbm_bytes(each.arrays[:1])
    if each.opcode in _ALIASED:  # (operands, results, contexts of four bytes)
        given = sum(map(len, operands))
        results = [array for array in each.arrays[given:] if array.bytes > 4]
        return sum(map(_hbm_bytes, operands)) + _hbm_bytes(results)
    if 'custom_call_target="AllocateBuffer"' in each.text:
        return 0.0
    if each.opcode != "fusion":
        whole = sum(map(_hbm_bytes, operands)) + _hbm_bytes(each.arrays)
        return whole + _read_again(each, [*operands, each.arrays])
    body = program.computations.get(next(iter(each.called("calls")), ""), {})
    inputs = _parameters(body)
    total = sum(
        _hbm_bytes(a) and _read(program, body, inputs[i], sum(x.bytes for x in a))
        if i in inputs
        else _hbm_bytes(a)
        for i, a in enumerate(operands)
    )
    return total + _written(body, each)


def _read_again(each: HloInstruction, arrays: list[tuple[HloArray, ...]]) -> float:
    """Bytes that a TPU kernel says it moves beyond its arguments and results once: windows of an
    argument overlap."""
    stated = re.search(r'"cost_estimate":\{[^}]*"bytes_accessed":"(\d+)"', each.text)
    if not stated or 'custom_call_target="tpu_custom_call"' not in each.text:
        return 0.0
    return max(0.0, int(stated[1]) - sum(a.bytes for group in arrays for a in group))


def _read(
    program: HloProgram,
    body: dict[str, HloInstruction],
    parameter: HloInstruction,
    size: float,
) -> float:
    """Bytes of a fusion's operand that it reads, itself or in fusions inside it."""
    names, total = {parameter.name}, 0.0
    for user in body.values():
        if not names & set(user.operands):
            continue
        if user.opcode in ("bitcast", "reshape"):
            names.add(user.name)
        elif user.opcode in _SLICES and user.operands[0] in names:
            total += sum(a.bytes for a in user.arrays)
        elif user.opcode == "fusion":
            inner = program.computations.get(next(iter(user.called("calls")), ""), {})
            total += sum(
                _read(program, inner, each, size)
                for place, each in _parameters(inner).items()
                if user.operands[place] in names
            )
        elif user.opcode != "dynamic-update-slice" or user.operands[0] not in names:
            return size
    return min(total, size)


def _parameters(body: dict[str, HloInstruction]) -> dict[int, HloInstruction]:
    return {int(i.text[1:].split(")")[0]): i for i in body.values() if i.opcode == "parameter"}


def _written(body: dict[str, HloInstruction], each: HloInstruction) -> float:
    """Bytes of a fusion's results that it writes: of an in-place update, the update."""
    root = next((i for i in body.values() if i.root), None)
    ends = [body.get(name) for name in root.operands] if root and root.opcode == "tuple" else [root]
    total = 0.0
    for array, end in zip(each.arrays, ends, strict=False):
        while end and end.opcode == "bitcast" and end.operands:
            end = body.get(end.operands[0])
        update = body.get(end.operands[1]) if end and end.opcode == "dynamic-update-slice" else None
        total += _hbm_bytes((array,)) and (
            sum(a.bytes for a in update.arrays) if update else array.bytes
        )
    return total
