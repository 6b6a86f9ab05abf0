"""What the devices say to each other: the collectives of a compiled program, read from its text.

XLA's text names each computation once. What a loop's body holds happens as often as the loop goes
round, so the text is read as a graph: from the entry, through calls, fusions and loops.
"""

import math
import re
from collections import Counter, defaultdict
from typing import NamedTuple

KINDS = (
    "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute",
    "collective-broadcast", "ragged-all-to-all",
)  # fmt: skip
BITS = {"pred": 8, "c64": 64, "c128": 128, "token": 0, "opaque": 0}  # others: f32, bf16, f8e4m3fn

COMPUTATION = re.compile(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
# a shape may be a tuple, with layouts in braces; the word before the operands is what is done
INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][a-z0-9\-]*)\((.*)$")
ARRAY = re.compile(r"\b([a-z]+[0-9]*[a-z0-9]*)\[([0-9,]*)\]")
CALLED = re.compile(
    r"\b(?:calls|to_apply|called_computations|branch_computations|true_computation"
    r"|false_computation|body|condition)=(\{[^}]*\}|%?[\w.\-]+)"
)


class Collective(NamedTuple):
    """One collective instruction, and how often a step does it."""

    kind: str  # one of KINDS
    bytes: int  # of what one device gets out of it, all times it is done together
    count: int  # times that a step does it
    shapes: tuple[str, ...]  # of what a device gets out of it: "f32[768,64]"
    devices: int  # that take part in it together; 0: the text does not say

    @property
    def sent(self) -> float:
        """Bytes that one device sends, as a ring of all that take part would."""
        n = self.devices or 2**30  # many
        share = (n - 1) / n
        times = {"all-reduce": 2 * share, "reduce-scatter": n - 1 if self.devices else 1}
        return self.bytes * times.get(self.kind, 1 if "permute" in self.kind else share)


class Instruction(NamedTuple):
    """A line of a computation: its name, shape, operation, and the rest of the line."""

    name: str
    shape: str
    operation: str
    rest: str


def collectives(text: str) -> list[Collective]:
    """Return every collective of a compiled program (``compiled.as_text()``), loops counted.

    Of an asynchronous pair only the start counts. A gather that XLA takes apart into permutes that
    overlap a product is listed as the permutes it became; an all-reduce inside a fusion named
    "all-reduce-scatter" as the reduce-scatter that it is.
    """
    program, entry = computations(text)
    found = []
    for name, times in executions(program, entry).items():
        for line in program[name]:
            kind = line.operation.removesuffix("-start")
            if kind not in KINDS:
                continue
            shapes = result(line)
            devices = group_size(line.rest)
            if kind == "all-reduce" and name.startswith("all-reduce-scatter"):
                kind = "reduce-scatter"
                one = sum(size(shape) for shape in shapes) // max(devices, 1)
            else:
                one = sum(size(shape) for shape in shapes)
            found.append(Collective(kind, one * times, times, shapes, devices))
    return found


def totals(found: list[Collective]) -> dict[str, dict[str, float]]:
    """Return count, bytes and sent bytes by kind, of a list of collectives."""
    sums: dict[str, dict[str, float]] = {}
    for one in found:
        kind = sums.setdefault(one.kind, {"count": 0, "bytes": 0, "sent": 0})
        kind["count"] += one.count
        kind["bytes"] += one.bytes
        kind["sent"] += one.sent
    return dict(sorted(sums.items()))


def computations(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """Return the instructions of each computation of an HLO module, and the name of its entry."""
    program: dict[str, list[Instruction]] = defaultdict(list)
    name = entry = ""
    for line in re.sub(r"/\*.*?\*/", "", text).splitlines():
        if not line[:1].isspace():
            if match := COMPUTATION.match(line):
                name = match[1]
                program[name] = []
                entry = name if line.startswith("ENTRY") else entry
        elif match := INSTRUCTION.match(line):
            program[name].append(Instruction(*match.groups()))
    return program, entry


def executions(program: dict[str, list[Instruction]], entry: str) -> Counter[str]:
    """Return how often each computation is done in one run of the entry."""
    times: Counter[str] = Counter()

    def visit(name: str, n: int) -> None:
        times[name] += n
        for line in program.get(name, ()):
            rounds = trip_count(program, line) if line.operation == "while" else 1
            for called in CALLED.findall(line.rest):
                for other in re.findall(r"[\w.\-]+", called):
                    if other in program:
                        visit(other, n * rounds)

    visit(entry, 1)
    return Counter({name: n for name, n in times.items() if name in program})


def trip_count(program: dict[str, list[Instruction]], loop: Instruction) -> int:
    """Return how often a loop goes round: as XLA notes it, or as its condition and step say.

    1 where neither can be read: a loop that goes round an unknown number of times counts once.
    """
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.rest):
        return int(known[1])
    parts = {key: name for key, name in re.findall(r"(condition|body)=%?([\w.\-]+)", loop.rest)}
    condition = {line.name: line for line in program.get(parts.get("condition", ""), ())}
    for line in condition.values():
        if line.operation != "compare" or "direction=LT" not in line.rest:
            continue
        counter, limit = (condition.get(name) for name in operands(line)[:2])
        end = constant(limit)
        index = re.search(r"index=(\d+)", counter.rest if counter else "")
        if end is not None and index:
            step = counter_step(program.get(parts["body"], []), int(index[1]))
            return max(1, math.ceil(end / step))
    return 1


def counter_step(body: list[Instruction], index: int) -> int:
    """Return what a loop's body adds to the loop's counter, element ``index`` of its tuple."""
    lines = {line.name: line for line in body}
    root = body[-1] if body else None
    added = 0
    if root and root.operation == "tuple" and index < len(operands(root)):
        line = lines.get(operands(root)[index])
        while line and line.operation in ("add", "copy"):
            inputs = [lines.get(name) for name in operands(line)]
            added += sum(constant(value) or 0 for value in inputs)
            line = next((one for one in inputs if one and constant(one) is None), None)
    return max(added, 1)


def constant(line: Instruction | None) -> int | None:
    """Return the value of a constant whole number, None for any other instruction."""
    match = re.match(r"(-?\d+)\)", line.rest) if line and line.operation == "constant" else None
    return int(match[1]) if match else None


def operands(line: Instruction) -> list[str]:
    """Return the names of an instruction's operands."""
    return re.findall(r"%([\w.\-]+)", line.rest.split(")")[0])


def result(line: Instruction) -> tuple[str, ...]:
    """Return the shapes that a collective leaves on a device: of a start, not those it was given.

    all-gather-start, collective-permute-start and any start whose operands are a tuple of their own
    return (operands, results, context); other starts, and what is no start, only results.
    """
    shape, start = line.shape, line.operation.endswith("-start")
    if line.operation in ("all-gather-start", "collective-permute-start") or (
        start and shape.startswith("((")
    ):
        given, results = elements(shape)[:2]
        shape = results if results else given
    return tuple(f"{kind}[{sizes}]" for kind, sizes in ARRAY.findall(without_layout(shape)))


def elements(shape: str) -> list[str]:
    """Return the elements of a tuple's shape, each of which may be a tuple."""
    parts, depth, start = [], 0, 1
    for i, c in enumerate(shape):
        depth += (c in "([{") - (c in ")]}")
        if (c == "," and depth == 1) or (c == ")" and depth == 0):
            parts.append(shape[start:i].strip())
            start = i + 1
    return parts


def without_layout(shape: str) -> str:
    """Return a shape without what follows its sizes in braces: order, tiles, memory space."""
    return re.sub(r"\{[^}]*\}", "", shape)


def size(shape: str) -> int:
    """Return the bytes of an array such as "bf16[12,768]"."""
    kind, sizes = re.fullmatch(r"(\w+)\[(.*)\]", shape).groups()  # pyright: ignore
    digits = re.match(r"[a-z]+(\d+)", kind)
    bits = BITS.get(kind, int(digits[1]) if digits else 0)
    return -(-bits * math.prod(int(n) for n in sizes.split(",") if n) // 8)


def group_size(rest: str) -> int:
    """Return how many devices take part in a collective together, 0 where the text is silent.

    The groups are lists ({{0,1},{2,3}}), iota tiles ([2,4]<=[8]), or axes of a mesh
    (mesh['a'=2,'b'=4] {'b'}).
    """
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", rest):
        return len(listed[1].split(","))
    if tiled := re.search(r"replica_groups=\[\d+,(\d+)\]", rest):
        return int(tiled[1])
    if mesh := re.search(r"replica_groups=@?[\w]*\[([^\]]*)\] ?\{([^}]*)\}", rest):
        sizes = {name: int(n) for name, n in re.findall(r"'([^']+)'=(\d+)", mesh[1])}
        return math.prod(sizes.get(axis, 1) for axis in re.findall(r"'([^']+)'", mesh[2]))
    return 0
