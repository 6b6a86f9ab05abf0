"""What the pictures share: colours, axes with units, text that the font has, whole files."""

import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gpt_jax.errors import UserError
from gpt_jax.integrity import free_bytes, replace_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# of Okabe & Ito 2008, "Color Universal Design": told apart by the colour-blind, without their
# yellow, too pale for a line on white; in grey it is the markers and the dashes that tell
BLACK, VERMILLION, BLUE, ORANGE, GREEN, PURPLE, SKY = COLOURS = (
    "#000000", "#D55E00", "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9",
)  # fmt: skip
SUFFIXES = (".png", ".svg", ".pdf")
POINTS = 1000  # of a line: a picture is about as many pixels wide
DRAWN_EARLY = 0.05  # share of a run in which the loss falls so far that the rest would look flat
ENOUGH = 10  # points that suffice for an axis to leave the early ones out
UNITS = ((2 * 3600, 3600, "hours"), (2 * 60, 60, "minutes"), (0, 1, "seconds"))


def new_figure(width: float, height: float, **adjust: float) -> "Figure":
    """Return an empty Figure of a size in inches that no window or global state knows of.

    ``adjust`` are its margins: matplotlib's own search for them takes longer than drawing.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=120)
    FigureCanvasAgg(figure)
    if adjust:
        figure.subplots_adjust(**adjust)
    return figure


def save(figure: "Figure", path: Path) -> Path:
    """Write a picture in the format of its suffix, whole or not at all; return its path.

    Raises UserError for another suffix and for what the disk refuses.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise UserError(f"{path} is no picture's name: let it end in {', '.join(SUFFIXES)}")
    if not path.parent.is_dir():
        problem = f"{path} cannot be written: there is no folder {path.parent}"
        raise UserError(f"{problem}: make it, or name another")
    buffer = io.BytesIO()
    figure.savefig(buffer, format=path.suffix[1:].lower())
    try:
        replace_file(path, buffer.getvalue())
    except OSError as error:
        free = free_bytes(path, error)
        raise UserError(
            f"{path} cannot be written ({error.strerror or error}{free}): "
            f"{'make room, or ' * bool(free)}name another place"
        ) from None
    return path


def legible(text: str) -> str:
    """Return a text as the font can show it: what it lacks as \\u escapes, no $ as mathematics."""
    from matplotlib.font_manager import findfont, get_font

    font = get_font(findfont("DejaVu Sans"))
    shown = [c if c.isprintable() and font.get_char_index(ord(c)) else ascii(c)[1:-1] for c in text]
    return "".join(shown).replace("$", r"\$")


def short(x: float, _: Any = None) -> str:
    """Return a number as an axis shows it: 5000, 600k, 1.5M, 300B."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(x) >= max(size, 1e4):
            return f"{x / size:g}{letter}"
    return f"{x:g}"


def rate_label(rate: float, _: Any = None) -> str:
    """Return a learning rate as configs write it: 0, 6e-4, 1.5e-5."""
    mantissa, exponent = f"{rate:.1e}".split("e")
    return f"{mantissa.removesuffix('.0')}e{int(exponent)}" if rate else "0"


def label_x(axes: "Axes", x: str, highest: float) -> float:
    """Label the axis of steps, tokens or time; return how many of its units are one shown."""
    if x == "time":
        unit, name = next((unit, name) for least, unit, name in UNITS if highest >= least)
        axes.set_xlabel(f"training time ({name})")
        return unit
    axes.set_xlabel({"step": "iteration", "tokens": "tokens seen in training"}[x])
    axes.xaxis.set_major_formatter(short)
    return 1


def thinned(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return a line of at most 2 POINTS that covers what one through all points would."""
    size = -(-len(x) // POINTS)
    if size <= 2:
        return x, y
    starts = np.arange(0, len(x), size)
    extremes = [f.reduceat(y, starts) for f in (np.fmin, np.fmax)]
    return np.repeat(x[starts], 2), np.stack(extremes, 1).ravel()


def running_median(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the median of y over a 25th of its points around each, in at most POINTS points.

    At the beginning it is of fewer, as many before as after: the first fall is not smoothed away.
    A median, because one spike does not move it. What is not finite is left out.
    """
    x, y = x[np.isfinite(y)], y[np.isfinite(y)]
    size = -(-len(x) // POINTS)
    if size > 1:
        n = len(x) // size
        x = x[: n * size].reshape(n, size).mean(1)
        y = np.median(y[: n * size].reshape(n, size), 1)
    n, most = len(y), len(y) // 50
    halves = [min(i, most) for i in range(n)]
    return x, np.array([np.median(y[i - h : i + h + 1]) for i, h in enumerate(halves)])


def loss_limits(lines: Iterable[tuple[np.ndarray, np.ndarray]]):
    """Return (lowest, highest) of an axis on which the end of these lines, (x, y), is readable.

    An untrained model's loss is several times that of a trained one: on an axis that held it, the
    differences that matter would be a pixel high. The first 5 % of each may stick out, and half a
    percent of its other points on either side; its last point does not. Returns None where there is
    nothing to show.
    """
    every, late = [], []
    for x, y in lines:
        there = np.isfinite(x) & np.isfinite(y)
        x, y = x[there], y[there]
        if not len(y):
            continue
        ys = y[x >= x.min() + DRAWN_EARLY * (x.max() - x.min())]
        late += [*np.quantile(ys, (0.005, 0.995)), y[-1]] if len(ys) >= ENOUGH else [*ys, y[-1]]
        every += [y.min(), y.max()]
    if not every:
        return None
    low, high = min(late), max(late)
    # cut off only what would take more than a third of the axis
    if len(late) < 2 or max(every) - min(every) <= 1.5 * (high - low) or high == low:
        low, high = min(every), max(every)
    pad = 0.06 * (high - low) or 0.05 * abs(high) or 1
    return low - pad, high + pad


def names(paths: Sequence[Path]) -> list[str]:
    """Return the shortest ends of these paths that tell them apart."""
    parts = [path.resolve().parts for path in paths]
    found = []
    for mine in parts:
        others = [theirs for theirs in parts if theirs != mine]
        n = next(
            n for n in range(1, len(mine) + 1)
            if n == len(mine) or all(theirs[-n:] != mine[-n:] for theirs in others)
        )  # fmt: skip
        name = "/".join(mine[-n:])
        # matplotlib's legend leaves out what begins with an underscore
        found.append(legible(f"./{name}" if name.startswith("_") else name))
    return found
