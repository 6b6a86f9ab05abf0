"""Stopping politely: the first signal is noted, a second one ends the process at once."""

import os
import signal
import sys


class Stop:
    """A context in which SIGINT and SIGTERM set ``asked`` instead of ending the process."""

    def __init__(self):
        self.asked = False

    def __enter__(self) -> "Stop":
        self.before = {s: signal.signal(s, self.ask) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def ask(self, number: int, _: object) -> None:
        """Note the first signal; leave with 130 on the second."""
        if self.asked:
            os._exit(130)  # the last whole checkpoint stays; nothing else may hold us up
        self.asked = True
        name = signal.Signals(number).name
        print(f"\n{name}: saving after this iteration (again: stop now)", file=sys.stderr)
