"""Draw docs/house.svg, the modules of the core and what imports what: `python docs/house.py`.

The arrows are those of the real import statements, less those that a longer way says already. Left
out are errors.py, which nearly all import, and what none of the others does. A number is the
module's place in README's reading order.
"""

import ast
import re
from pathlib import Path

DOCS = Path(__file__).parent
ROOT = DOCS.parent
PACKAGE = ROOT / "gpt_jax"
# a module in two or three words, and how far from the left it stands, in modules: so that no arrow
# passes behind another module
SAYS = {
    "train": ("the training loop", 3),
    "sample": ("weights to text", 1),
    "pretrained": ("a model by name", 2.2),
    "checkpoint": ("save and restore", 1.1),
    "sampling": ("the next token", 0),
    "train_step": ("one update", 1.1),
    "evaluation": ("loss of a split", 2.3),
    "model": ("the network", 0.5),
    "sharding": ("mesh and layout", 1.5),
    "optimizer": ("AdamW, schedule", 4.5),
    "loss": ("cross-entropy", 0),
    "attention": ("reference, backends", 1),
    "config": ("every key", 2),
    "data": ("files to batches", 3),
    "tokenizer": ("text to ids", 4),
}
WIDTH, STEP, HEIGHT, LEFT, TOP, FLOOR = 148, 166, 46, 20, 54, 92  # pixels
INK, LINE, FILL, ROOF, EDGE = "#1b1b1b", "#5f6b76", "#dcebf7", "#fbe3c8", "#eeeeee"


def modules() -> dict[str, Path]:
    """Return the core's modules and the two scripts by name."""
    core = {path.stem: path for path in sorted(PACKAGE.glob("[!_]*.py"))}
    return {**core, "train": ROOT / "train.py", "sample": ROOT / "sample.py"}


def imports() -> dict[str, set[str]]:
    """Return which modules in the picture each of them imports when it is loaded."""
    graph: dict[str, set[str]] = {}
    known = set(modules())
    for name, path in modules().items():
        found = set()
        for node in ast.parse(path.read_text("utf-8")).body:
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("gpt_jax"):
                for alias in node.names:
                    found |= set(f"{node.module}.{alias.name}".split(".")[1:2])
        graph[name] = found & known - {name}
    used = set().union(*graph.values()) - {"errors"} | {"train", "sample"}
    return {name: others & used for name, others in graph.items() if name in used}


def floors(graph: dict[str, set[str]]) -> dict[str, int]:
    """Return the floor of each module: one above the highest that it imports."""
    level: dict[str, int] = {}

    def of(name: str) -> int:
        if name not in level:
            level[name] = max((of(other) + 1 for other in graph[name]), default=0)
        return level[name]

    top = max(map(of, graph))
    return {name: top if name in ("train", "sample") else of(name) for name in graph}


def direct(graph: dict[str, set[str]]) -> set[tuple[str, str]]:
    """Return the imports that no longer way says already."""

    def below(name: str) -> set[str]:
        return graph[name].union(*map(below, graph[name]))

    return {
        (name, other)
        for name, others in graph.items()
        for other in others
        if not any(other in below(between) for between in others - {other})
    }


def reading_order() -> list[str]:
    """Return the core's modules in the order of README's "Reading it"."""
    text = (ROOT / "README.md").read_text("utf-8").split("## Reading it")[1]
    return [name for name in re.findall(r"`(\w+)\.py`", text) if name in modules()]


def edges() -> list[str]:
    """Return the folders of code beside the core."""
    return sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py"))


def picture() -> str:
    """Return the SVG."""
    graph, order = imports(), reading_order()
    level = floors(graph)
    rows = max(level.values()) + 1
    centre = {name: LEFT + WIDTH / 2 + STEP * SAYS[name][1] for name in graph}
    width = round(max(centre.values()) + WIDTH / 2 + LEFT)
    height = TOP + rows * FLOOR + 78

    def y(name: str) -> int:
        return TOP + (rows - 1 - level[name]) * FLOOR

    svg = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}" font-family="sans-serif" role="img">',
        "<title>The modules of gpt_jax and what each imports</title>",
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
        f'markerHeight="7" orient="auto"><path d="M0 0L8 4L0 8z" fill="{LINE}"/></marker></defs>',
        f'<rect width="{width}" height="{height}" rx="6" fill="#ffffff"/>',
        text(LEFT, 30, "The core of gpt_jax: an arrow goes from a module to one that it imports; "
             "the numbers are the order to read in", 13),
    ]  # fmt: skip
    for name, other in sorted(direct(graph)):
        x1, y1, x2, y2 = centre[name], y(name) + HEIGHT, centre[other], y(other)
        shift = max(-48.0, min(48.0, (x2 - x1) / 6))
        bend = (y2 - y1) * 0.45
        svg.append(
            f'<path d="M{x1 + shift:.0f} {y1}C{x1 + shift:.0f} {y1 + bend:.0f} '
            f'{x2 - shift:.0f} {y2 - bend:.0f} {x2 - shift:.0f} {y2 - 2}" fill="none" '
            f'stroke="{LINE}" stroke-width="1.4" marker-end="url(#tip)"/>'
        )
    for name in graph:
        script = name in ("train", "sample")
        x = centre[name] - WIDTH / 2
        number = f"{order.index(name) + 1}  " if name in order else ""
        svg += [
            f'<rect x="{x:.0f}" y="{y(name)}" width="{WIDTH}" height="{HEIGHT}" rx="5" '
            f'fill="{ROOF if script else FILL}" stroke="{LINE}"/>',
            text(x + 10, y(name) + 19, f"{number}{name}.py", 14, bold=True),
            text(x + 10, y(name) + 37, SAYS[name][0], 12),
        ]
    base = TOP + rows * FLOOR - 18
    names = edges()
    small = ", ".join(f"{name}.py" for name in sorted(set(modules()) - set(graph)))
    half = -(-len(names) // 2)
    svg += [
        f'<rect x="{LEFT}" y="{base}" width="{width - 2 * LEFT}" height="80" rx="5" '
        f'fill="{EDGE}" stroke="{LINE}" stroke-dasharray="4 3"/>',
        text(LEFT + 12, base + 22, f"Beside it: {small}, and folders that you need not know to "
             "understand it:", 13),
        text(LEFT + 12, base + 44, "   ".join(f"{n}/" for n in names[:half]), 13),
        text(LEFT + 12, base + 64, "   ".join(f"{n}/" for n in names[half:]), 13),
        "</svg>",
    ]  # fmt: skip
    return "\n".join(svg) + "\n"


def text(x: float, y: float, words: str, size: int, bold: bool = False) -> str:
    """Return a line of text."""
    weight = ' font-weight="bold"' if bold else ""
    return f'<text x="{x:.0f}" y="{y}" font-size="{size}" fill="{INK}"{weight}>{words}</text>'


if __name__ == "__main__":
    (DOCS / "house.svg").write_text(picture(), "utf-8")
