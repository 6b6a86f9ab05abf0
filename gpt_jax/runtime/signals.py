"""Stopping politely: the first signal is noted, a second one ends the process at once."""

import os
import signal
import sys

import jax
from jax.experimental import multihost_utils


class Stop:
    """A context in which SIGINT and SIGTERM are heard ``at`` an iteration, not at once.

    Of several processes it is enough that one hears. SIGTERM is then JAX's own to hear, whose
    service has all of them stop at the same iteration.
    """

    def __init__(self):
        self.asked = False
        self.several = jax.process_count() > 1

    def __enter__(self) -> "Stop":
        heard = (signal.SIGINT,) if self.several else (signal.SIGINT, signal.SIGTERM)
        self.before = {s: signal.signal(s, self.ask) for s in heard}
        return self

    def at(self, iteration: int) -> bool:
        """Return whether to stop before ``iteration``; to be asked before each."""
        if self.several:
            return multihost_utils.reached_preemption_sync_point(iteration)
        return self.asked

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def ask(self, number: int, _: object) -> None:
        """Note the first signal; leave with 130 on the second."""
        if self.asked:
            os._exit(130)  # the last whole checkpoint stays; nothing else may hold us up
        self.asked = True
        if self.several:
            signal.raise_signal(signal.SIGTERM)
        name = signal.Signals(number).name
        print(f"\n{name}: saving after this iteration (again: stop now)", file=sys.stderr)
