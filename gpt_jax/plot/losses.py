"""Pictures of losses: of one run, and of several side by side."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from gpt_jax.plot.figure import (
    BLACK,
    BLUE,
    COLOURS,
    PURPLE,
    SKY,
    VERMILLION,
    label_x,
    loss_limits,
    names,
    new_figure,
    rate_label,
    running_median,
    thinned,
)
from gpt_jax.plot.log import Log, finite

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SMOOTHED = 100  # points of batches from which on their running median is drawn too
DOTTED = 40  # evaluations up to which each has its marker
MARKERS, STYLES = "os^DvPX", ("-", "--", ":", "-.")
LOSS = "loss (nats/token)"


def run_picture(log: Log, x: str = "step") -> "Figure":
    """Return the picture of a run: losses above, the learning rate below, over ``x``.

    x is "step", "tokens" or "time". Dotted verticals are where the run was resumed; crosses at the
    bottom are updates left out, triangles there losses that are not finite. Raises UserError
    where the log is empty or does not know ``x``.
    """
    steps, evals = log.over(x)
    every = np.concatenate([steps["x"], evals["x"]])
    has_rate = bool(np.isfinite(steps["lr"]).any())
    height = 5 if has_rate else 4.2
    figure = new_figure(8, height, left=0.11, right=0.97, top=0.93, bottom=0.11, hspace=0.08)
    ratios = [4, 1] if has_rate else [1]
    panels = figure.subplots(len(ratios), 1, sharex=True, squeeze=False, height_ratios=ratios)[:, 0]
    axes = panels[0]
    unit = label_x(panels[-1], x, np.nanmax(every))
    batch = finite(steps["loss"])
    evaluated = {name: finite(evals[f"{name}_loss"]) for name in ("train", "val")}
    lines = [(steps["x"], batch), *((evals["x"], loss) for loss in evaluated.values())]

    axes.plot(*thinned(steps["x"] / unit, batch), color=SKY, linewidth=0.7, alpha=0.5,
              label="batch")  # fmt: skip
    if np.isfinite(batch).sum() >= SMOOTHED:
        axes.plot(*running_median(steps["x"] / unit, batch), color=BLUE, linewidth=1.4,
                  label="batch, running median")  # fmt: skip
    marker = {"marker": "o", "markersize": 4} if len(evals["x"]) <= DOTTED else {}
    for name, color, style in (("train", VERMILLION, "--"), ("val", BLACK, "-")):
        axes.plot(evals["x"] / unit, evaluated[name], style, color=color, linewidth=1.6, **marker,
                  label=f"{name} {last_and_best(evaluated[name])}")  # fmt: skip
    limit_losses(axes, lines)
    mark_events(panels, steps, evals, unit)
    axes.set_title(names([log.path.parent])[0])
    if has_rate:
        panels[1].plot(*thinned(steps["x"] / unit, steps["lr"]), color=BLACK, linewidth=1.2)
        highest = float(np.nanmax(steps["lr"])) or 1.0
        panels[1].set(ylim=(0, 1.15 * highest), yticks=[0, highest / 2, highest])
        panels[1].yaxis.set_major_formatter(rate_label)
    for panel, label in zip(panels, (LOSS, "learning rate"), strict=False):
        panel.set_ylabel(label)
        panel.yaxis.set_label_coords(-0.085, 0.5)
        panel.margins(x=0.02)
        panel.grid(alpha=0.3)
    axes.legend(loc="upper right", framealpha=0.9)
    return figure


def limit_losses(axes: Any, lines: Sequence) -> None:
    """Let the axis of losses show what loss_limits says, and say what lies above."""
    if limits := loss_limits(lines):
        axes.set_ylim(*limits)
        highest = max(np.nanmax(y, initial=-np.inf) for _, y in lines)
        if highest > limits[1]:
            above = f"\N{UPWARDS ARROW} losses up to {highest:.2f}"
            axes.set_title(above, loc="right", fontsize="medium")


def last_and_best(loss: np.ndarray) -> str:
    """Return what a legend says of the losses of a split: the last, and the lowest if another."""
    loss = loss[np.isfinite(loss)]
    if not len(loss):
        return "(not evaluated yet)"
    best = "" if loss.min() == loss[-1] else f" (best {loss.min():.4f})"
    return f"{loss[-1]:.4f}{best}"


def mark_events(panels: Any, steps: dict, evals: dict, unit: float) -> None:
    """Draw where a run was resumed, left updates out, and had losses that are not finite."""
    every, its, marks = (np.append(steps[n], evals[n]) for n in ("x", "iter", "resumed"))
    order = np.argsort(its, kind="stable")
    # the line that says so may be of many iterations later
    resumed = np.interp(marks[np.isfinite(marks)], its[order], every[order])
    # a finished run that is started again only evaluates once more
    for i, at in enumerate(resumed[resumed < np.nanmax(every)]):
        for panel in panels:
            panel.axvline(at / unit, color=PURPLE, linestyle=":", linewidth=1.6, zorder=1.5,
                          label="" if i or panel is not panels[0] else "resumed")  # fmt: skip
    axes = panels[0]
    left_out = np.flatnonzero(np.diff(steps["skipped"], prepend=0) > 0)
    losses = ((steps, "loss"), (evals, "train_loss"), (evals, "val_loss"))
    bad = [kind["x"][np.isnan(finite(kind[name]))] for kind, name in losses]
    for at, y, marker, label in (
        (steps["x"][left_out], 0.03, "x", "updates left out"),
        (np.concatenate(bad), 0.08, "v", "loss not finite"),
    ):
        if len(at):
            axes.plot(at / unit, np.full(len(at), y), marker, color=VERMILLION, markersize=6,
                      transform=axes.get_xaxis_transform(), label=label)  # fmt: skip


def differing(logs: Sequence[Log]) -> dict[str, list[str]]:
    """Return what forbids to compare the losses of these runs, and the names of each's kinds.

    {} or some of {"data sets": [...], "tokenizers": [...]}: another text is harder or easier, and a
    token of another tokenizer is more of it or less. What a folder does not say is no difference.
    """
    found = {}
    measured = [log.measured_on() for log in logs]
    for what in ("data sets", "tokenizers"):
        known = dict(one[what] for one in measured if what in one)
        if len(known) > 1:
            found[what] = list(dict.fromkeys(known.values()))
    return found


def comparison_picture(logs: Sequence[Log], x: str = "step") -> "Figure":
    """Return the losses of several runs in one picture, over ``x``: "step", "tokens" or "time".

    Those of the validation split are drawn strong, those of the training split light; of a run not
    yet evaluated the running median of its batches. Above stands what forbids to compare them.
    Raises UserError where a log is empty or does not know ``x``.
    """
    columns = [log.over(x) for log in logs]
    every = np.concatenate([kind["x"] for both in columns for kind in both])
    figure = new_figure(8, 5, left=0.09, right=0.96, top=0.94, bottom=0.11)
    axes = figure.subplots()
    unit = label_x(axes, x, np.nanmax(every))
    drawn = []
    titles = names([log.path.parent for log in logs])
    for i, (title, (steps, evals)) in enumerate(zip(titles, columns, strict=True)):
        color, style = COLOURS[i % len(COLOURS)], STYLES[i // len(COLOURS) % len(STYLES)]
        train, val = (finite(evals[f"{name}_loss"]) for name in ("train", "val"))
        if len(val):
            light = evals["x"], train
        else:
            light = running_median(steps["x"], finite(steps["loss"]))
        axes.plot(light[0] / unit, light[1], style, color=color, linewidth=1, alpha=0.45)
        axes.plot(evals["x"] / unit, val, style, color=color, linewidth=1.6, markersize=5,
                  marker=MARKERS[i % len(MARKERS)], markevery=max(1, len(val) // 10),
                  label=f"{title}: {last_and_best(val)}")  # fmt: skip
        drawn += [light, (evals["x"], val)]
    limit_losses(axes, drawn)
    if differ := " and ".join(differing(logs)):
        axes.set_title(f"not comparable: {differ} differ", loc="left", fontsize="medium")
    axes.plot([], [], color="grey", linewidth=1, alpha=0.6, label="train, without markers")
    axes.set_ylabel(LOSS)
    axes.margins(x=0.02)
    axes.grid(alpha=0.3)
    axes.legend(loc="upper right", framealpha=0.9, title="validation loss at last",
                fontsize="medium" if len(logs) < 8 else "small")  # fmt: skip
    return figure
