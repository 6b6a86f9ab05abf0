"""Stopping politely: the first signal is noted, a second one ends the process at once.

Python runs its own signal handlers between two bytecodes of the main thread: not while XLA compiles
or a device is waited for. So a thread does the listening, at the end of signal.set_wakeup_fd.
"""

import os
import signal
import socket
import sys
import threading
import time
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from typing import Any

from jax.experimental import multihost_utils

from gpt_jax.runtime.processes import before_leaving, global_state, last_word, leave

# Ctrl-C; kill, a container's or a cluster's end; a terminal or ssh that is gone; SLURM's notice
# (#SBATCH --signal=USR1@120)
STOPS = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")
ECHO = 0.1  # seconds in which the same signal is no second one: timeout(1) sends each twice
GRACE = 1  # seconds from the loss of a reader of our output to the signal that was its reason; and
# for a last word


class Stop:
    """A context in which signals stop a run: heard ``at`` an iteration, or at once.

    Before ``wait_for_save`` the first signal ends the process with 0, for there is nothing to save.
    Of several processes it is enough that one hears. SIGTERM is then JAX's own to hear, whose
    service has all of them stop at the same iteration. A Stop that is not entered, or not by the
    main thread, hears nothing.
    """

    def __init__(self):
        self.noted = threading.Event()
        self.noted_at = 0.0
        self.first = 0  # the number of the signal that was noted
        self.saves = False
        self.several = False
        self.heard: list[int] = []

    def __enter__(self) -> "Stop":
        self.several = global_state.num_processes > 1
        self.undo = ExitStack()
        if threading.current_thread() is threading.main_thread():  # Python's rule for signals
            with ExitStack() as undo:
                self.listen(undo)
                self.undo = undo.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self.undo.close()

    @property
    def asked(self) -> bool:
        """Whether a signal was noted."""
        return self.noted.is_set()

    def wait_for_save(self) -> None:
        """Say that from now on there is progress: a stop waits until it is saved."""
        self.saves = True

    def at(self, iteration: int) -> bool:
        """Return whether to stop before ``iteration``; to be asked before each."""
        if self.several:
            return multihost_utils.reached_preemption_sync_point(iteration)
        return self.asked

    def now(self) -> bool:
        """Return whether to break off what can be done again; one of several never does alone."""
        return self.asked and not self.several

    def listen(self, undo: ExitStack) -> None:
        """Hear the signals from now on, until ``undo``."""
        numbers = [getattr(signal, name) for name in STOPS if hasattr(signal, name)]
        if self.several:
            numbers.remove(signal.SIGTERM)
        # ignored is what nohup asks for, and None a handler that Python could not put back
        deaf = (signal.SIG_IGN, None)
        self.heard = [number for number in numbers if signal.getsignal(number) not in deaf]
        for redirect, stream in ((redirect_stdout, sys.stdout), (redirect_stderr, sys.stderr)):
            if stream:  # pythonw has none
                output: Any = Output(stream, self.noted)
                undo.enter_context(redirect(output))
        # undone in reverse: what came in before the end is still read, so no signal is lost
        ear, mouth = socket.socketpair()
        undo.callback(ear.close)
        thread = threading.Thread(target=self.read, args=(ear,), daemon=True, name="stop")
        thread.start()
        undo.callback(thread.join)
        undo.callback(mouth.close)
        mouth.setblocking(False)
        undo.callback(
            signal.set_wakeup_fd, signal.set_wakeup_fd(mouth.fileno(), warn_on_full_buffer=False)
        )
        for number in self.heard:
            undo.callback(signal.signal, number, signal.signal(number, lambda *_: None))

    def read(self, ear: socket.socket) -> None:
        """Read the numbers of the signals that arrive, until the other end is closed."""
        while numbers := ear.recv(4096):
            for number in numbers:
                if number in self.heard:
                    self.ask(number)

    def ask(self, number: int) -> None:
        """Note the first signal, or leave with 0; leave with 130 on the second."""
        name = signal.Signals(number).name
        below = "" if before_leaving else "\n"  # the terminal's ^C, if nothing else takes it away
        if self.asked:
            echo = number == self.first and time.monotonic() - self.noted_at < ECHO
            # a dropped ssh sends SIGHUP twice, from the shell and, when that has ended, the kernel
            if name != "SIGHUP" and not echo:
                line = "stopped at once: what was done since the last checkpoint is not saved"
                args = (f"{below}{name}: {line}",)
                word = threading.Thread(target=last_word, args=args, daemon=True)
                word.start()
                word.join(GRACE)  # a terminal that takes no more may not hold us up
                os._exit(130)  # the last whole checkpoint stays
            return
        waits = self.saves or self.several  # processes that lose one would wait for it
        self.first = number
        self.noted.set()
        if not waits:
            leave(0, f"{name}: stopped before the first new iteration: nothing to save")
        if self.several:
            signal.raise_signal(signal.SIGTERM)
        print(f"{below}{name}: saving after this iteration (again: stop now)", file=sys.stderr)
        self.noted_at = time.monotonic()


class Output:
    """A stream that a run outlives: once it cannot be written, what is printed is dropped.

    A `tee` may be killed, by the same Ctrl-C or another's, the terminal that a SIGHUP tells of is
    gone, the disk under a log may be full: a line must not cost the run its checkpoint.
    """

    def __init__(self, stream: Any, noted: threading.Event):
        self.stream, self.noted = stream, noted

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        try:
            return self.stream.write(text)
        except OSError as error:
            self.drop(error)
            return len(text)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except OSError as error:
            self.drop(error)

    def drop(self, error: OSError) -> None:
        """Send what is still buffered, and all that follows, nowhere; say so, if no stop is why."""
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), self.stream.fileno())
        if not self.noted.wait(GRACE):
            name = str(self.stream.name).strip("<>")
            what = f"{name} cannot be written any more ({error.strerror})"
            print(f"{what}: the run goes on, and its metrics.jsonl", file=sys.stderr)
