"""Analysis of a compiled program's text (HLO): how often each instruction runs, FLOPs, collectives.

The text is that of one device. It has a loop's body once; here the body counts once per iteration.
It has a collective that is spread over several fusions once in each, with one chain id; here it
counts once. All functions are pure functions of the text."""

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Iterator

import numpy as np

WIDTH = {
    "pred": 1,
    "s4": 0.5,
    "u4": 0.5,
    "s8": 1,
    "u8": 1,
    "s16": 2,
    "u16": 2,
    "bf16": 2,
    "f16": 2,
    "s32": 4,
    "u32": 4,
    "f32": 4,
}
WIDTH |= {"s64": 8, "u64": 8, "f64": 8, "c64": 8, "c128": 16} | dict.fromkeys(
    ("f8e4m3fn", "f8e5m2", "f8e4m3", "f8e4m3b11fnuz"), 1
)
COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "ragged-all-to-all",
    "collective-broadcast",
)
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,<=]*)\](?:\{[^{}]*?(S\(\d+\))?\})?")
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_LINE = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_OPCODE = re.compile(r"\s*([\w\-]+)\(")
_REFERENCE = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(
    r"(calls|body|condition|to_apply|true_computation|false_computation)=%?([\w.\-]+)"
    r"|branch_computations=\{([^}]*)\}"
)


@dataclasses.dataclass(frozen=True)
class HloArray:
    """fast: whether it is in the chip's scratchpad and not in HBM (TPU: a layout with a memory
    space other than 0)."""

    dtype: str
    shape: tuple[int, ...]
    fast: bool = False

    @property
    def bytes(self) -> float:
        return WIDTH.get(self.dtype, 0) * math.prod(self.shape)


@dataclasses.dataclass(frozen=True)
class HloInstruction:
    """One line of the text.

    Attributes:
      arrays: the results.
      operands: names of instructions of the same computation.
      text: everything after the operands.
      inside: name of its computation.
      root: whether its result is that of the computation.
    """

    name: str
    opcode: str
    arrays: tuple[HloArray, ...]
    operands: tuple[str, ...]
    text: str
    inside: str
    root: bool = False

    def called(self, *kinds: str) -> list[str]:
        """Names of the computations that it calls as one of `kinds`."""
        return [name for kind, name, _ in _CALLED.findall(self.text) if kind in kinds] + [
            name.strip().lstrip("%")
            for _, _, many in _CALLED.findall(self.text)
            if many and "branches" in kinds
            for name in many.split(",")
        ]


@dataclasses.dataclass(frozen=True)
class HloProgram:
    """computations: {name: {instruction name: HloInstruction}}, in the order of the text; devices:
    number of devices that run it."""

    computations: dict[str, dict[str, HloInstruction]]
    entry: str
    devices: int

    def operands(self, instruction: HloInstruction) -> list[HloArray]:
        """The arrays that an instruction reads."""
        computation = self.computations[instruction.inside]
        known = [computation[name] for name in instruction.operands if name in computation]
        return [array for operand in known for array in operand.arrays]


def parse_arrays(text: str) -> tuple[HloArray, ...]:
    """The arrays of a type, tuples flattened.

    >>> parse_arrays("(bf16[2,3]{1,0:T(8,128)(2,1)S(1)}, f32[])")
    (HloArray(dtype='bf16', shape=(2, 3), fast=True), HloArray(dtype='f32', shape=(), fast=False))
    """
    return tuple(
        HloArray(
            dtype,
            tuple(int(n.strip("<=")) for n in dims.split(",") if n),
            space not in ("", "S(0)"),
        )
        for dtype, dims, space in _ARRAY.findall(text)
        if dtype in WIDTH
    )


def _closing(text: str, start: int) -> int:
    """Index of the bracket that closes the one at `start`."""
    depth = 0
    for index in range(start, len(text)):
        depth += (text[index] == "(") - (text[index] == ")")
        if not depth:
            return index
    raise ValueError(f"a bracket is not closed: {text[start : start + 80]}")


def parse_hlo(text: str) -> HloProgram:
    """The program of the text of `compiled.as_text()`.

    >>> head, entry = "HloModule m, num_partitions=2", "ENTRY %e (a: f32[4]) -> f32[4] {"
    >>> p = parse_hlo("\\n".join([head, entry, "  ROOT %a = f32[4]{0} parameter(0)", "}"]))
    >>> p.entry, p.devices, list(p.computations["e"])
    ('e', 2, ['a'])
    """
    computations: dict[str, dict[str, HloInstruction]] = {}
    head = text[: text.find("\n")]
    devices = math.prod(int(n) for n in re.findall(r"(?:replica_count|num_partitions)=(\d+)", head))
    inside, entry = "", ""
    for line in text.split("\n"):
        if line[:1] not in (" ", "") and (match := _HEAD.match(line)):
            inside = match[2]
            computations[inside], entry = {}, inside if match[1] else entry
        elif inside and (match := _LINE.match(line)):
            kind = re.sub(r"/\*.*?\*/", "", match[3])
            end = _closing(kind, 0) + 1 if kind.startswith("(") else kind.index(" ")
            opcode = _OPCODE.match(kind, end)
            if not opcode:
                continue
            close = _closing(kind, opcode.end() - 1)
            inner = kind[opcode.end() : close]
            operands = (
                ()
                if opcode[1] in ("constant", "parameter")
                else tuple(_REFERENCE.findall(inner) or re.findall(r"[\w.\-]+", inner))
            )
            rest = (
                f"({inner})" + kind[close + 1 :]
                if opcode[1] in ("constant", "parameter")
                else kind[close + 1 :]
            )
            arrays, root = parse_arrays(kind[:end]), bool(match[1])
            computations[inside][match[2]] = HloInstruction(
                match[2], opcode[1], arrays, operands, rest, inside, root
            )
    return HloProgram(computations, entry, devices)


def trip_count(program: HloProgram, loop: HloInstruction) -> int:
    """Iterations of a while loop: the compiler's note, or from a condition `counter < constant`
    with steps of one; 1 if neither is there."""
    if noted := re.search(r'known_trip_count":?\{"?n"?:"?(\d+)', loop.text):
        return int(noted[1])
    for name in loop.called("condition"):
        condition = program.computations.get(name, {})
        limits = [
            int(n)
            for each in _within(program, condition)
            if each.opcode == "constant" and (n := each.text[1:].split(")")[0]).isdigit()
        ]
        tests = [each for each in _within(program, condition) if each.opcode == "compare"]
        if limits and tests:
            return max(1, max(limits) - _start(program, loop, condition))
    return 1


def _within(
    program: HloProgram, computation: dict[str, HloInstruction]
) -> Iterator[HloInstruction]:
    for each in computation.values():
        yield each
        for name in each.called("calls"):
            yield from _within(program, program.computations.get(name, {}))


def _start(program: HloProgram, loop: HloInstruction, condition: dict[str, HloInstruction]) -> int:
    """The counter's first value: the element of the initial tuple that the condition reads."""
    read = [
        re.search(r"index=(\d+)", each.text)
        for each in condition.values()
        if each.opcode == "get-tuple-element"
    ]
    computation = program.computations[loop.inside]
    initial = computation.get(loop.operands[0]) if loop.operands else None
    for index in (int(match[1]) for match in read if match):
        if initial and initial.opcode == "tuple" and index < len(initial.operands):
            first = computation.get(initial.operands[index])
            while (
                first
                and first.opcode in ("copy", "bitcast", "copy-done", "copy-start")
                and first.operands
            ):
                first = computation.get(first.operands[0])
            if (
                first
                and first.opcode == "constant"
                and (value := first.text[1:].split(")")[0]).isdigit()
            ):
                return int(value)
    return 0


def executed_counts(program: HloProgram) -> Iterator[tuple[int, HloInstruction, bool]]:
    """(runs per step, instruction, whether it is inside a fusion) of all instructions that a step
    reaches, in all branches."""

    def walk(name: str, times: int, fused: bool) -> Iterator[tuple[int, HloInstruction, bool]]:
        for each in program.computations.get(name, {}).values():
            yield times, each, fused
            if each.opcode == "while":
                for body in each.called("body", "condition"):
                    yield from walk(body, times * trip_count(program, each), fused)
            elif each.opcode not in ("async-update", "async-done"):
                kinds = ("calls", "branches", "true_computation", "false_computation")
                for body in each.called(*kinds, *(("to_apply",) if each.opcode == "call" else ())):
                    yield from walk(body, times, fused or each.opcode == "fusion")

    yield from walk(program.entry, 1, False)


@dataclasses.dataclass(frozen=True)
class Traffic:
    """count: collectives per step; received: bytes that a device receives; outside: those from
    other hosts."""

    count: int = 0
    received: float = 0.0
    outside: float = 0.0


def collective_traffic(program: HloProgram, host: int = 0) -> dict[str, Traffic]:
    """Collectives by kind. host: devices of a host; 0: all.

    With n participating devices and S bytes of operands each, an all-gather receives (n - 1) S, a
    reduce-scatter or all-to-all (n - 1) / n S, an all-reduce 2 (n - 1) / n S (a reduce-scatter and
    an all-gather), a permute S. An all-reduce of which a device keeps only its slice, inside one
    fusion, runs as a reduce-scatter and counts as one."""
    out: dict[str, Traffic] = {}
    seen: set[tuple[str, str]] = set()
    for times, each, fused in executed_counts(program):
        kind = each.opcode.removesuffix("-start")
        if kind not in COLLECTIVES or each.opcode.endswith("-done"):
            continue
        if chain := re.search(r'"?chain_id"?[=:]"?(\w+)', each.text):
            if (chain[1], kind) in seen:
                continue
            seen.add((chain[1], kind))
        if kind == "all-reduce" and fused and _keeps_a_slice(program, each):
            kind = "reduce-scatter"
        size, members = (
            sum(array.bytes for array in program.operands(each)),
            group_members(each.text, program.devices),
        )
        n = len(members)
        share = {"all-gather": n - 1, "all-reduce": 2 * (n - 1) / n, "collective-permute": 1}.get(
            kind, (n - 1) / n
        )
        if n > 1:
            old = out.get(kind, Traffic())
            received = times * size * share
            outside = received * _outside(kind, each, members, host) if host else 0.0
            out[kind] = Traffic(old.count + times, old.received + received, old.outside + outside)
    return out


def _keeps_a_slice(program: HloProgram, each: HloInstruction) -> bool:
    users = [u for u in program.computations[each.inside].values() if each.name in u.operands]
    while len(users) == 1 and users[0].opcode in ("bitcast", "reshape", "copy", "transpose"):
        users = [
            u for u in program.computations[each.inside].values() if users[0].name in u.operands
        ]
    return bool(users) and all(u.opcode == "dynamic-slice" for u in users)


def group_members(text: str, devices: int) -> tuple[int, ...]:
    """Devices of the first group of a collective, from its attributes in any printed form.

    >>> forms = ("{{0,2},{1,3}}", "[2,2]<=[2,2]T(1,0)", "{}")
    >>> [group_members(f"replica_groups={form}", 4) for form in forms]
    [(0, 2), (0, 2), (0, 1, 2, 3)]
    >>> forms = ("mesh['a'=4,'b'=2] {'a'}", "mesh['a'=8] {'a':(1)4}")
    >>> [group_members(f"replica_groups={form}", 8) for form in forms]
    [(0, 2, 4, 6), (0, 2, 4, 6)]
    """
    if "source_target_pairs" in text:
        return tuple(range(devices))
    if match := re.search(r"replica_groups=\{\{([\d,]*)\}", text):
        return tuple(int(n) for n in match[1].split(",") if n)
    if match := re.search(r"replica_groups=\[\d+,(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        sides = [int(n) for n in match[2].split(",")]
        axes = [int(n) for n in match[3].split(",")] if match[3] else range(len(sides))
        return tuple(
            np.arange(math.prod(sides))
            .reshape(sides)
            .transpose(axes)
            .ravel()[: int(match[1])]
            .tolist()
        )
    if match := re.search(r"replica_groups=@?\w*\[([^\]]*)\]\s*\{([^}]*)\}", text):
        sizes = {axis: int(n) for axis, n in re.findall(r"'?([\w.]+)'?=(\d+)", match[1])}
        members = [0]
        for axis, before, part in re.findall(
            r"'?([A-Za-z_][\w.]*)'?(?::\((\d+)\)(\d+))?", match[2]
        ):
            if axis not in sizes:
                continue
            size = int(part or sizes[axis])
            behind = list(sizes.values())[list(sizes).index(axis) + 1 :]
            stride = math.prod(behind) * sizes[axis] // (int(before or 1) * size)
            members = [member + i * stride for member in members for i in range(size)]
        return tuple(members)
    return tuple(range(devices))


def _outside(kind: str, each: HloInstruction, members: tuple[int, ...], host: int) -> float:
    """Share of the bytes received in a collective that comes from other hosts of `host` devices."""
    if pairs := (
        re.findall(r"\{(\d+),(\d+)\}", each.text) if "source_target_pairs" in each.text else []
    ):
        return float(any(int(a) // host != int(b) // host for a, b in pairs))
    n, near = len(members), max(collections.Counter(m // host for m in members).values())
    # Data enter a host once, through all of its participating devices, and are passed on inside;
    # in an all-to-all every device receives its own data.
    return (n - near) / (n - 1) / (1 if "all-to-all" in kind else near)


# positions of input, kernel and output among (operand, operand, result) of a cuDNN call; its window
# and labels are those of the forward convolution
_GRADIENTS = {"BackwardInput": (2, 1, 0), "BackwardFilter": (0, 2, 1)}


def hlo_flops(program: HloProgram) -> float:
    """FLOPs of matrix products and convolutions on one device, two per multiply-add, without
    products with padding and with the zeros of a dilation. Covers dot, convolution (a batched
    product on a TPU), calls of cuBLAS and cuDNN, and the estimates of kernels."""
    return sum(times * _flops(program, each) for times, each, _ in executed_counts(program))


def _flops(program: HloProgram, each: HloInstruction) -> float:
    if each.opcode == "dot" or "__cublas$" in each.text:
        contract = re.search(
            r"lhs_contracting_dim(?:ensions)?(?:s)?\"?[=:][{\[]([\d,\"]*)[}\]]", each.text
        )
        if not contract:
            return 0.0
        left = program.operands(each)[0].shape
        dims = [int(n) for n in contract[1].replace('"', "").split(",") if n]
        return 2.0 * math.prod(each.arrays[0].shape) * math.prod(left[d] for d in dims)
    if stated := re.search(r'"cost_estimate":\{"flops":"(\d+)"', each.text):
        return float(stated[1])
    if "__gpu$xla.gpu.triton" in each.text:  # which has no estimate, but the scopes of its call
        stated = re.search(r'op_name="[^"]*\bcomputed=(\d+)', each.text)
        return float(stated[1]) if stated else 0.0
    call = re.search(r'"__cudnn\$conv(\w+)"', each.text)
    if each.opcode != "convolution" and not call:
        return 0.0
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", each.text)
    assert labels, each.text
    shapes = [array.shape for array in (*program.operands(each)[:2], each.arrays[0])]
    left, kernel, out = (shapes[i] for i in _GRADIENTS.get(call[1] if call else "", (0, 1, 2)))
    window = re.search(r"window=\{([^}]*)\}", each.text)
    attributes = dict(item.split("=") for item in window[1].split()) if window else {}
    macs = float(
        out[labels[3].index("b")] * out[labels[3].index("f")] * kernel[labels[2].index("i")]
    )
    for d in range(sum(c.isdigit() for c in labels[1])):
        number = {
            k: int(v.split("x")[d])
            for k, v in attributes.items()
            if k in ("size", "stride", "lhs_dilate", "rhs_dilate")
        }
        low = int(attributes["pad"].split("x")[d].split("_")[0]) if "pad" in attributes else 0
        sizes = (
            left[labels[1].index(str(d))],
            kernel[labels[2].index(str(d))],
            out[labels[3].index(str(d))],
        )
        macs *= _taps(
            *sizes,
            number.get("stride", 1),
            low,
            number.get("lhs_dilate", 1),
            number.get("rhs_dilate", 1),
        )
    return 2.0 * macs


@functools.cache
def _taps(size: int, taps: int, outputs: int, stride: int, low: int, hole: int, spread: int) -> int:
    """Pairs of (output, tap) that read an element of an input of `size` with `hole` - 1 zeros
    between its elements."""
    last = (size - 1) * hole
    at = (p * stride - low + t * spread for p in range(outputs) for t in range(taps))
    return sum(1 for x in at if 0 <= x <= last and not x % hole)
