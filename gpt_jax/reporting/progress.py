"""How far a run is: three lines at the foot of a terminal, and the facts of its end."""

import math
import statistics
import time
from array import array
from collections.abc import Callable
from typing import Any

from rich.text import Text

from gpt_jax.config import TrainConfig
from gpt_jax.reporting import terminal

RECENT = 64  # iterations whose median is the speed now
SHORTEST_BAR = 8  # columns
GAP = "   "  # between facts


class Progress:
    """What a run that goes on from ``meta`` has told of so far.

    ``flops`` is of an iteration, ``peak`` of all devices in a second or None, and ``memory``
    returns bytes by name (memory.py).
    """

    def __init__(
        self, config: TrainConfig, meta: dict[str, Any], tokens_per_iter: int, flops: float,
        peak: float | None, memory: Callable[[], dict[str, int]],
    ):  # fmt: skip
        self.config, self.tokens_per_iter, self.memory = config, tokens_per_iter, memory
        self.flops, self.peak = flops, peak
        self.first = self.done = meta["iter"]  # iterations, before this start and in all
        self.loss = math.nan
        self.seconds = array("d")  # of each iteration but the first, which compiles
        self.begun = self.before = time.perf_counter()
        self.pause = 0.0  # seconds of the last evaluation, with the save that followed it
        self.val: tuple[int, float] | None = None  # iteration and loss
        best = meta.get("best_val_loss")
        self.best: tuple[int | None, float] = None, math.inf if best is None else best
        self.saved, self.saved_at = meta.get("saved", meta["iter"]), None
        self.checkpoints: Any = None

    def stepped(self, iteration: int, loss: float) -> None:
        """Note that an iteration is done."""
        now = time.perf_counter()
        if self.done > self.first:
            self.seconds.append(now - self.before)
        self.loss, self.done, self.before = loss, iteration + 1, now

    def evaluated(self, iteration: int, val_loss: float) -> None:
        """Note a loss in nats/token."""
        self.val = iteration, val_loss
        if val_loss <= self.best[1]:
            self.best = self.val

    def resumed(self) -> None:
        """Note that an evaluation is over."""
        now = time.perf_counter()
        self.pause, self.before = now - self.before, now

    def saving(self, iteration: int) -> None:
        """Note that a checkpoint is being written."""
        self.saved, self.saved_at = iteration, time.perf_counter()

    def lasted(self) -> float:
        """Return the seconds since this start of the run."""
        return time.perf_counter() - self.begun

    def speed(self) -> float:
        """Return seconds an iteration, the median of the last ones, nan where there is none."""
        recent = self.seconds[-RECENT:]
        return statistics.median(recent) if recent else math.nan

    def left(self) -> float:
        """Return the seconds that the rest will take, as the last iterations and evaluation did."""
        end, every = self.config.max_iters, self.config.eval_interval
        evaluations = end // every - (self.done - 1) // every + (end % every > 0)
        evaluations -= self.val is not None and self.val[0] == self.done
        return max(end - self.done, 0) * self.speed() + evaluations * self.pause

    def lines(self, width: int) -> list[Text]:
        """Return the three lines, of at most ``width`` columns."""
        waits = terminal.waits
        now = waits[-1].line() if waits else fitting(self.facts(), width)
        return [self.bar(width), now, fitting(self.kept(), width)]

    def bar(self, width: int) -> Text:
        """Return the line with the iterations, a bar, and the time left."""
        end = max(self.config.max_iters, 1)
        share = min(self.done / end, 1)
        before = f"step {self.done:,}/{end:,} "
        left = self.left()  # nan before there is a speed
        left = f"  {duration(left)} left" if left > 0 else ""
        after = f" {math.floor(100 * share):3}%{left}"
        columns = width - len(before) - len(after)
        if columns < SHORTEST_BAR:
            return fitting([Text(before.strip()), Text(after.strip())], width)
        filled = round(share * columns)
        # two weights of a line, too: a terminal may have no colours, or no dim ones
        return Text.assemble(before, ("━" * filled, "green"), ("─" * (columns - filled), "dim"),
                             after)  # fmt: skip

    def facts(self) -> list[Text]:
        """Return what is true of the iteration that was told of last."""
        if self.done == self.first:
            return []
        found = [fact("loss", f"{self.loss:.4f}")]
        seconds = self.speed()
        if not math.isnan(seconds):
            found.append(fact("", f"{self.tokens_per_iter / seconds:,.0f}", " tokens/s"))
            if self.peak:
                found.append(fact("mfu", f"{self.flops / seconds / self.peak:.1%}"))
        return [
            *found,
            *(fact("peak memory", size, f" ({which})") for which, size in self.peak_memory()),
        ]

    def kept(self) -> list[Text]:
        """Return what is true of the evaluation and the checkpoint before."""
        found = []
        if self.val:
            best = " (best)" if self.best == self.val else ""
            found.append(fact("val loss", f"{self.val[1]:.4f}", f" at {self.val[0]:,}{best}"))
        if math.isfinite(self.best[1]) and self.best != self.val:
            where = "" if self.best[0] is None else f" at {self.best[0]:,}"
            found.append(fact("best", f"{self.best[1]:.4f}", where))
        ago = f", {duration(time.perf_counter() - self.saved_at)} ago" if self.saved_at else ""
        writing = self.checkpoints and self.checkpoints.saving
        if writing and not writing.done():
            found.append(fact("saving", f"{self.saved:,}"))
        elif self.saved:
            found.append(fact("saved", f"{self.saved:,}", ago))
        return found

    def peak_memory(self) -> list[tuple[str, str]]:
        """Return whose memory is counted and how much was used at most, where it is known."""
        counted = self.memory()
        for name, which in (("device_memory_peak", "device"), ("host_memory_peak", "host")):
            if name in counted:
                return [(which, f"{counted[name] / 2**30:.2f} GiB")]
        return []


def fact(label: str, value: str, rest: str = "") -> Text:
    """Return a value, set off from what says what it is."""
    return Text.assemble((f"{label} " if label else "", "dim"), (value, "bold"), (rest, "dim"))


def fitting(facts: list[Text], width: int) -> Text:
    """Return the facts in a line, without the last ones where they do not fit."""
    while facts and sum(map(len, facts)) + len(GAP) * (len(facts) - 1) > width:
        facts = facts[:-1]
    return Text(GAP).join(facts)


def duration(seconds: float) -> str:
    """Return seconds as people say them: 42s, 3m 20s, 5h 12m, 4d 6h."""
    minutes, hours = int(seconds / 60), int(seconds / 3600)
    if hours >= 48:
        return f"{hours // 24}d {hours % 24}h"
    if hours:
        return f"{hours}h {minutes % 60:02}m"
    return f"{minutes}m {int(seconds % 60):02}s" if minutes else f"{seconds:.0f}s"
