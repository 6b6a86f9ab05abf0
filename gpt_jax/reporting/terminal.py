"""The lines at the foot of a terminal that are drawn again and again, below the log.

Whatever ends or stops the process (a second Ctrl-C, kill -9, Ctrl-Z) has to leave a terminal that a
shell can go on with. So the cursor is never hidden, and rests at the start of the line below. What
is printed meanwhile, to stdout or stderr, goes above. rich.live does neither, and draws anew for
each line that is printed, where here what was drawn last is kept as text (docs/performance.md).

Where stdout is no terminal nothing is drawn, and a wait is one plain line of the log.
"""

import io
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout, suppress
from typing import Any

from rich.console import Console
from rich.text import Text

from gpt_jax.runtime.processes import before_leaving
from gpt_jax.runtime.signals import Output

PERIOD = 0.25  # seconds from one drawing to the next
STOPPED = 2  # seconds later still, the process was stopped by Ctrl-Z and not merely slow
WIDEST = 120  # columns: a longer line is hard to read
# what a line begins with: a terminal writes the ^C of Ctrl-C, as all that is typed, wherever the
# cursor is, and only between two lines or two writes. Not \r, at which a stream would be flushed
START = "\033[G"
ASCII = str.maketrans("━─", "#-")  # where a terminal may not know the lines of a bar
waits: list["Wait"] = []  # what is waited for now, the innermost last
compiled: set[str] = set()  # steps that need not be compiled again


def is_live() -> bool:
    """Return whether stdout is a terminal on which lines can be drawn again."""
    if not sys.stdout:  # closed, by `>&-`
        return False
    console = Console()
    able = not (console.is_dumb_terminal or console.legacy_windows)
    return sys.stdout.isatty() and console.is_terminal and able


class Wait:
    """Something that is waited for, and since when."""

    def __init__(self, what: str):
        self.what, self.since = what, time.monotonic()

    def line(self) -> Text:
        """Return what is waited for and the seconds so far, as a line of a terminal."""
        return Text.assemble((self.what, "bold"), f" ... {time.monotonic() - self.since:.0f}s")


@contextmanager
def waiting(what: str, piped: bool = True) -> Iterator[Wait]:
    """Say what is waited for: a context.

    On a terminal it stands at the foot, with its seconds; else it is a line of the log, if
    ``piped``.
    """
    wait = Wait(what)
    with ExitStack() as shown:
        if not Foot.shown and is_live():
            shown.enter_context(Foot(lambda _: [waits[-1].line()] if waits else []))
        if not Foot.shown and piped:
            print(f"{what} ...", flush=True)
        waits.append(wait)
        if Foot.shown:
            Foot.shown.refresh()
        try:
            yield wait
        finally:
            waits.remove(wait)


@contextmanager
def compiling(step: str) -> Iterator[None]:
    """Say that a step is being compiled, the first time that it is used: a context."""
    if step in compiled:
        yield
        return
    compiled.add(step)
    with waiting(f"compiling the {step} step (the first time: seconds to minutes)"):
        yield


@contextmanager
def evaluating(
    split: str, n_batches: float, stop: Callable[[], bool]
) -> Iterator[Callable[[], bool]]:
    """Say how far an evaluation is: a context, whose ``stop`` is asked before each batch."""
    asked = 0
    with ExitStack() as first, waiting(f"evaluating on {split}", piped=False) as wait:
        first.enter_context(compiling("evaluation"))

        def asking() -> bool:
            nonlocal asked
            asked += 1
            if asked > 1:
                first.close()  # which the first batch has been compiled in
            wait.what = f"evaluating on {split}: batch {asked:,} of {math.ceil(n_batches):,}"
            return stop()

        yield asking


class Foot:
    """A context in which ``lines`` of a width stand at the foot of the terminal."""

    shown: "Foot | None" = None  # a process has one terminal

    def __init__(self, lines: Callable[[int], list[Text]]):
        self.lines = lines
        self.stream: Any = sys.stdout
        # past what W&B listens to, and past what ends the process where nobody reads
        self.raw = self.stream.stream if isinstance(self.stream, Output) else self.stream
        # to a string: rich itself would write, if only "", where it may fail
        self.console = Console(file=io.StringIO(), force_terminal=True, highlight=False)
        self.text, self.lengths = "", [0]  # what was drawn last, and how long its lines are
        self.lock, self.over = threading.RLock(), threading.Event()
        self.awake = time.monotonic()  # when this process has last looked

    def __enter__(self) -> "Foot":
        self.undo = ExitStack()
        if isinstance(self.raw, io.TextIOWrapper):  # under PYTHONUNBUFFERED each write is one
            through = self.raw.write_through
            self.undo.callback(self.raw.reconfigure, write_through=through)
            self.raw.reconfigure(write_through=False)
        streams: list[Any] = [(redirect_stdout, sys.stdout)]
        if sys.stderr and sys.stderr.isatty():
            streams.append((redirect_stderr, sys.stderr))
        for redirect, stream in streams:
            above = self.undo.enter_context(Above(stream, self))
            self.undo.enter_context(redirect(above))
        self.thread = threading.Thread(target=self.draw_again, daemon=True, name="terminal")
        Foot.shown = self
        before_leaving.append(self.clear)
        self.refresh()
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        Foot.shown = None
        before_leaving.remove(self.clear)
        self.clear()
        self.thread.join()
        self.undo.close()

    def clear(self) -> None:
        """Take the lines away, and draw no more: from any thread."""
        with self.lock:
            self.over.set()
            self.put(erased(self.drawn()))
            self.text = ""

    def draw_again(self) -> None:
        """Draw what has changed, until it is over."""
        while not self.over.wait(PERIOD):
            self.refresh()

    def refresh(self) -> None:
        """Draw the lines as they are now."""
        width, height = self.size()
        self.console.width = width
        lines = self.lines(min(width - 1, WIDEST))[: height - 1]
        with self.console.capture() as captured:
            for line in lines:
                self.console.print(line, no_wrap=True, overflow="crop", width=width - 1)
        with self.lock:
            rows = self.drawn()
            text = "".join(f"{START}{line}\n" for line in captured.get().splitlines())
            if self.over.is_set() or text == self.text or not self.in_foreground():
                return
            self.text = text
            self.lengths = [min(line.cell_len, width - 1) for line in lines]
            # line over line, and only then what is left below: it does not flicker
            text = text.replace("\n", "\033[K\n")
            self.put(f"{up(rows)}{text}\033[J")

    def drawn(self) -> int:
        """Return how many lines above the cursor are the foot."""
        # not by SIGCONT: Python's handler of it waits for a main thread that may be lost in XLA
        stopped = time.monotonic() - self.awake > PERIOD + STOPPED
        self.awake = time.monotonic()
        if stopped or not self.in_foreground():
            self.text = ""  # by now they are the shell's
        if not self.text:
            return 0
        width = self.size()[0]  # a terminal that has become narrower since has wrapped them
        return sum(math.ceil(max(columns, 1) / width) for columns in self.lengths)

    def in_foreground(self) -> bool:
        """Return whether the terminal is this process's: after `bg` it is the shell's."""
        with suppress(OSError, ValueError, AttributeError):  # it may be no controlling terminal
            return os.tcgetpgrp(self.raw.fileno()) == os.getpgrp()
        return True

    def size(self) -> tuple[int, int]:
        """Return columns and rows of the terminal, 80 and 24 where it does not say."""
        with suppress(OSError, ValueError):
            columns, rows = os.get_terminal_size(self.raw.fileno())
            if columns and rows:
                return max(columns, 2), rows
        return 80, 24

    def above(self, stream: Any, text: str) -> None:
        """Print whole lines above the foot."""
        with self.lock:
            # in one write with the text, if they go the same way
            self.put(erased(self.drawn()), flush=stream is not self.stream)
            try:
                stream.write(text)
                stream.flush()
            finally:
                self.put(self.text)

    def put(self, text: str, flush: bool = True) -> None:
        """Write to the terminal; if it is gone, the log will tell."""
        if not str(self.raw.encoding).lower().startswith("utf"):
            text = text.translate(ASCII)
        with suppress(OSError):
            self.raw.write(text)
            if flush:
                self.raw.flush()
        self.awake = time.monotonic()  # Ctrl-S may have held it up


def up(rows: int) -> str:
    """Return what moves the cursor to the start of a line above."""
    return f"\033[{rows}A{START}" if rows else START


def erased(rows: int) -> str:
    """Return what clears the lines above the cursor, and leaves it where they began."""
    return f"{up(rows)}\033[J" if rows else ""


class Above:
    """A stream whose lines, once they are whole, go above the foot: a context."""

    def __init__(self, stream: Any, foot: Foot):
        self.stream, self.foot, self.rest = stream, foot, ""

    def __enter__(self) -> "Above":
        return self

    def __exit__(self, *_: object) -> None:
        if self.rest:
            self.write("\n")

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        with self.foot.lock:
            whole, newline, self.rest = (self.rest + text).rpartition("\n")
            if newline:
                self.foot.above(self.stream, whole + newline)
        return len(text)

    def flush(self) -> None:
        """Do nothing: each line is flushed when it is whole."""
