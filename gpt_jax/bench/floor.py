"""The least that each instruction of a compiled program can take: bytes to move, FLOPs to do.

Read from XLA's text, an instruction is a kernel (or several): it reads its operands and writes its
results once. What a fusion only cuts a piece out of, or writes a piece into, counts as that piece.
"""

import math
import re
from typing import NamedTuple

from gpt_jax.plan.hlo import (
    ARRAY,
    CALLED,
    Instruction,
    computations,
    elements,
    operands,
    size,
    without_layout,
)

# what moves nothing by itself
FREE = {"parameter", "constant", "get-tuple-element", "tuple", "bitcast", "while", "call",
        "conditional", "after-all", "partition-id", "replica-id", "iota"}  # fmt: skip
PIECES = {"slice", "dynamic-slice", "gather"}
SAME = {"bitcast", "reshape"}  # of what a fusion reads: another name for it
# products, each 2 x rows x columns x depth, that attention does: scores and values; backward the
# scores again and the gradients of q, k, v and the scores
ATTENTION = {"__cudnn$fmhaSoftmax": 2, "__cudnn$fmhaSoftmaxBackward": 5}


class Floor(NamedTuple):
    """What an instruction is, and what it cannot do without, each time."""

    operation: str
    shape: str
    bytes: int
    flops: float  # in bfloat16's: those of float8, twice as fast, count half

    def seconds(self, bandwidth: float, peak: float) -> float:
        """Return the longer of moving and multiplying, in bytes/s and FLOP/s."""
        return max(self.bytes / bandwidth, self.flops / peak)


def floors(text: str) -> dict[str, Floor]:
    """Return the floor of each instruction of a compiled program (``compiled.as_text()``)."""
    program, _ = computations(text)
    found: dict[str, Floor] = {}
    insides = {name for lines in program.values() for line in lines for name in inside(line)}
    for name, lines in program.items():
        if name in insides:
            continue
        shapes = {line.name: line.shape for line in lines}
        for line in lines:
            if line.operation not in FREE:
                found[line.name] = Floor(
                    kind(line), shown(line.shape),
                    traffic(program, line, shapes), flops(program, line, shapes),
                )  # fmt: skip
    return found


def inside(line: Instruction) -> list[str]:
    """Return the computations that an instruction does within its own kernels."""
    if line.operation in ("while", "call", "conditional"):
        return []
    return [
        name for called in CALLED.findall(line.rest) for name in re.findall(r"[\w.\-]+", called)
    ]


def kind(line: Instruction) -> str:
    """Return an instruction's operation, of a custom call its target."""
    target = re.search(r'custom_call_target="([^"]+)"', line.rest)
    return target[1] if target else line.operation


def shown(shape: str) -> str:
    """Return a shape as a table shows it: no layout, and of a tuple the first array."""
    arrays = ARRAY.findall(without_layout(shape))
    first = f"{arrays[0][0]}[{arrays[0][1]}]" if arrays else shape
    return first if len(arrays) < 2 else f"{first}, ..."


def nbytes(shape: str) -> int:
    """Return the bytes of an array or of a tuple of arrays."""
    return sum(size(f"{kind}[{sizes}]") for kind, sizes in ARRAY.findall(without_layout(shape)))


def traffic(program: dict, line: Instruction, shapes: dict[str, str]) -> int:
    """Return the bytes that an instruction reads and writes."""
    names = operands(line)
    if line.operation in PIECES:
        return 2 * nbytes(line.shape)
    if line.operation == "dynamic-update-slice":
        return 2 * nbytes(shapes.get(names[1], ""))
    if line.operation == "fusion" and (called := inside(line)) and called[0] in program:
        body = program[called[0]]
        given = [reads(body, body_line) for body_line in sorted(
            (one for one in body if one.operation == "parameter"),
            key=lambda one: int(one.rest.split(")")[0]))]  # fmt: skip
        return sum(given) + writes(body)
    if line.operation == "custom-call" and line.shape.startswith("("):
        # the last of a library's results is room to work in, not a result
        results = [one for one in elements(line.shape) if not re.match(r"[su]8\[\d*\]", one)]
        return sum(nbytes(shapes.get(name, "")) for name in names) + sum(map(nbytes, results))
    return sum(nbytes(shapes.get(name, "")) for name in names) + nbytes(line.shape)


def reads(body: list[Instruction], given: Instruction) -> int:
    """Return the bytes that a fusion reads of one of its parameters."""
    total, names = 0, {given.name}
    for line in body:
        used = [name for name in operands(line) if name in names]
        if not used:
            continue
        if line.operation in SAME:
            names.add(line.name)
        elif line.operation in PIECES and operands(line)[0] in names:
            total += nbytes(line.shape)
        elif line.operation == "dynamic-update-slice" and operands(line)[0] in names:
            pass  # written in place
        else:
            return nbytes(given.shape)
    return min(total, nbytes(given.shape))


def writes(body: list[Instruction]) -> int:
    """Return the bytes that a fusion writes: of an update in place only the update."""
    lines = {line.name: line for line in body}
    root = body[-1]
    results = [lines[name] for name in operands(root)] if root.operation == "tuple" else [root]
    total = 0
    for line in results:
        while line.operation in SAME and operands(line)[0] in lines:
            line = lines[operands(line)[0]]
        if line.operation == "dynamic-update-slice":
            line = lines[operands(line)[1]]
        total += nbytes(line.shape)
    return total


def flops(program: dict, line: Instruction, shapes: dict[str, str]) -> float:
    """Return the FLOPs of an instruction's products; causal attention does half."""
    if line.operation == "dot" or "__cublas" in line.rest:
        left = shapes.get(operands(line)[0], "")
        listed = re.search(r'lhs_contracting_dim(?:s|ensions)"?[=:][{\[]([\d,"]*)', line.rest)
        depth = [dims(left)[int(i)] for i in re.findall(r"\d+", listed[1])] if listed else []
        times = 0.5 if left.startswith("f8") else 1
        return 2 * math.prod(dims(line.shape)) * math.prod(depth) * times
    if (products := ATTENTION.get(kind(line))) and (
        scores := re.search(r'"dimensions": ?\[([\d", ]+)\]', line.rest)
    ):
        done = math.prod(int(n) for n in re.findall(r"\d+", scores[1]))
        causal = 0.5 if "CAUSAL" in line.rest else 1
        return 2 * products * done * dims(shapes.get(operands(line)[0], ""))[-1] * causal
    total = 0.0
    for name in inside(line) if line.operation in ("fusion", "custom-call") else ():
        body = program.get(name, [])
        given = {one.name: one.shape for one in body}
        total += sum(flops(program, one, given) for one in body)
    return total


def dims(shape: str) -> list[int]:
    """Return the sizes of a shape's first array."""
    arrays = ARRAY.findall(shape)
    return [int(n) for n in arrays[0][1].split(",") if n] if arrays else []
