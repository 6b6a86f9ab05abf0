"""How a preparation goes, in one line: rewritten in place for a person, now and then for a log."""

import math
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator

from gpt_jax.prepare.sources import Fragment

LIVE_SECONDS, LOG_SECONDS = 0.5, 30.0


class Progress:
    """Counts what has been done and says so."""

    def __init__(self, log: Callable[[str], None], live: bool = False) -> None:
        self.log, self.live = log, live
        self.start = self.begun = self.said = time.monotonic()
        self.documents = self.bytes = self.tokens = 0  # bytes of text; tokens in this run alone
        self.first: float | None = None  # share done when this run began

    def begin(self) -> None:
        """Start the clock of the rate: what came before was no encoding."""
        self.begun = time.monotonic()

    def took(self, documents: int, n_bytes: int, tokens: int, done: float) -> None:
        """Count a block: documents in all so far, bytes and tokens of it, share of all so far."""
        self.first = done if self.first is None else self.first
        self.documents, self.bytes, self.tokens = (
            documents, self.bytes + n_bytes, self.tokens + tokens,
        )  # fmt: skip
        if self._is_time():
            self._say(self._line(self.said - self.begun, done))

    def over(self, what: str, fragments: Iterable[Fragment]) -> Iterator[str]:
        """Yield the texts of a pass over a source that gives no tokens, and tell how far it is."""
        try:
            for fragment in fragments:
                if self._is_time():
                    self._say(f"{what}: {fragment.done:.0%}")
                yield fragment.text
        finally:
            self.end()

    def end(self) -> None:
        """Clear the line that was rewritten in place."""
        if self.live:
            sys.stdout.write("\r\x1b[K")
            sys.stdout.flush()

    def seconds(self) -> float:
        """Return the seconds that this run has taken."""
        return time.monotonic() - self.start

    def _line(self, seconds: float, done: float) -> str:
        share = left = ""
        gained = done - (self.first or 0.0)
        if math.isfinite(done):
            share = f"{done:.1%}, "
        if gained > 0:  # false for NaN
            left = f", {clock(seconds * (1 - done) / gained)} left"
        return (
            f"{share}{self.documents:,} documents, {size(self.bytes)}, "
            f"{self.tokens / max(seconds, 1e-9):,.0f} tokens/s{left}"
        )

    def _is_time(self) -> bool:
        now = time.monotonic()
        if now - self.said < (LIVE_SECONDS if self.live else LOG_SECONDS):
            return False
        self.said = now
        return True

    def _say(self, line: str) -> None:
        if self.live:
            width = shutil.get_terminal_size().columns - 1  # a longer line could not be rewritten
            sys.stdout.write(f"\r{line[:width]}\x1b[K")
            sys.stdout.flush()
        else:
            self.log(line)


def size(n_bytes: int) -> str:
    """Return a number of bytes in MB, or GB from the thousandth on."""
    return f"{n_bytes / 1e6:,.1f} MB" if n_bytes < 1e9 else f"{n_bytes / 1e9:,.2f} GB"


def clock(seconds: float) -> str:
    """Return seconds as 1:02:03."""
    minutes, second = divmod(round(seconds), 60)
    hour, minute = divmod(minutes, 60)
    return f"{hour}:{minute:02}:{second:02}"
