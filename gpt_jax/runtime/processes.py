"""Several processes, one run: how they find each other, agree, and end when one of them dies.

Everything rests on JAX's own runtime (jax.distributed): its detection of the cluster, and its
coordination service as a blackboard and a barrier. In a run of one process every function here
returns at once.
"""

import ctypes
import itertools
import json
import os
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import jax
from jax._src.distributed import global_state  # its client has no public name yet

from gpt_jax.config import LoadConfig, TrainConfig
from gpt_jax.errors import RunError, UserError

SILENCE = 20  # seconds without a sign of life after which a process counts as dead
PERIOD = 2  # seconds from one sign of life to the next
BARRIER = 24 * 3600  # seconds: the dead are found by their silence, the slow are waited for
MAY_DIFFER = {"process_id", "wandb_run_name"}  # keys that change nothing the processes share
kept_alive: list[Any] = []  # what C code may still call
before_leaving: list[Callable[[], None]] = []  # what gives the terminal back
numbers = count()  # barriers and boards are used once: each gets a number, the same everywhere


@contextmanager
def connected(config: TrainConfig | LoadConfig, advice: str) -> Iterator[None]:
    """Be one of the processes of a run, if there are several: a context for all that uses devices.

    They are found by JAX (Cloud TPU, SLURM, Open MPI, Kubernetes) or named by the config. Only
    process 0 keeps its stdout. Raises UserError where they are named in part or cannot be found.
    Ends the process itself, in a line, with 2 where they do not answer or one has wrong input, with
    1 where one cannot go on, and with 1, the line ending in ``advice``, where one dies.
    """
    join(config)
    if not global_state.client:
        yield
        return
    over = threading.Event()
    on_abort(f"error: JAX's runtime has ended {name_of_this()} (its reason is above; most likely "
             f"process 0 or its host has died): {advice}")  # fmt: skip
    threading.Thread(target=watch, args=(over, advice), daemon=True, name="watch").start()
    try:
        if not is_first():
            sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
        agree({name: value for name, value in vars(config).items() if name not in MAY_DIFFER})
        yield
        barrier()  # or the last to end would miss those that ended before
    except UserError as error:
        # at once: JAX would wait for the others at its exit. Process 0 has the service that they
        # need to come to the same end
        if is_first():
            time.sleep(2 * PERIOD)
        leave(2, f"error: {error}")
    except RunError as error:
        # a save fails where another process has died, too: the watch will know, and ends this one
        time.sleep(SILENCE + 2 * PERIOD)
        leave(1, f"error: {error}")
    except Exception as error:
        # most likely a collective that has lost its other end: the watch will know which
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        time.sleep(SILENCE + 2 * PERIOD)
        raise
    finally:
        over.set()


def join(config: TrainConfig | LoadConfig) -> None:
    """Start JAX's runtime of several processes, if there are several."""
    named = named_processes(config)
    if config.num_processes == 1:
        return
    # JAX's runtime ends a process that waits in vain by an abort with a stack trace
    patience = threading.Timer(config.initialization_timeout, give_up, [config])
    patience.daemon = True
    patience.start()
    try:
        jax.distributed.initialize(
            **named, initialization_timeout=config.initialization_timeout + 60
        )
    except Exception as error:  # whatever the cluster's own tools have to say
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        missing = [f"--{name}" for name, value in named.items() if value is None]
        # no cluster was found, or (in a notebook) it is too late to look for one
        alone = "be defined" in reason or "must be called before" in reason
        if alone and len(missing) == len(named):
            return
        if "be defined" in reason:
            raise UserError(
                "this is no cluster that JAX knows: to join processes by hand also give "
                + ", ".join(missing)
            ) from None
        raise UserError(
            f"the other processes cannot be found ({reason}): name them with "
            "--coordinator_address, --num_processes and --process_id, or run this one alone with "
            "--num_processes=1"
        ) from None
    finally:
        patience.cancel()


def named_processes(config: TrainConfig | LoadConfig) -> dict[str, Any]:
    """Return what the config says of the processes, None where JAX is to find it."""
    address, n, this = config.coordinator_address, config.num_processes, config.process_id
    host, _, port = address.rpartition(":")
    if address and not (host and port.isdecimal() and 0 < int(port) < 2**16):
        raise UserError(f"coordinator_address={address!r} is not HOST:PORT, 10.0.0.1:1234 say")
    if n and this >= n:
        raise UserError(f"process_id={this} is out of range: num_processes={n} count from 0")
    return {
        "coordinator_address": address or None,
        "num_processes": n or None,
        "process_id": None if this < 0 else this,
    }


def give_up(config: TrainConfig | LoadConfig) -> None:
    """End this process, which has waited long enough for the others."""
    where = config.coordinator_address or "the cluster's first process"
    n = config.num_processes or "all"
    leave(
        2,
        f"error: {n} processes have not met at {where} within initialization_timeout="
        f"{config.initialization_timeout} s: start every one of them, with the same command but "
        "for --process_id, where they can reach that address",
    )


def leave(code: int, line: str) -> None:
    """End the process at once, from any thread, whatever its main thread waits for."""
    last_word(line)
    os._exit(code)


def last_word(line: str) -> None:
    """Give the terminal back, and say a line below all that was printed."""
    for give_back in before_leaving:
        give_back()
    sys.stdout.flush()
    print(line, file=sys.stderr, flush=True)


def on_abort(line: str) -> None:
    """Have a last word where JAX's runtime aborts the process: it does when process 0 is gone."""
    if sys.platform != "win32":
        # Python's own signal handlers wait for the main thread, which is lost in a collective
        kind = ctypes.CFUNCTYPE(None, ctypes.c_int)
        kept_alive.append(kind(lambda _: leave(1, line)))
        ctypes.CDLL(None).signal(signal.SIGABRT, kept_alive[-1])


def name_of_this() -> str:
    """Return what to call this process in a message."""
    return f"process {global_state.process_id} on {socket.gethostname()}"


def is_first() -> bool:
    """Return whether this is the process that logs and writes, as one process alone is."""
    return global_state.process_id == 0


def barrier() -> None:
    """Wait until every process has come to this line."""
    if global_state.client:
        global_state.client.wait_at_barrier(f"gpt_jax/{next(numbers)}", 1000 * BARRIER)


def in_turn(work: Callable[[], None]) -> None:
    """Do something in one process after the other: what one has made, the next finds there."""
    for turn in range(global_state.num_processes):
        if turn == global_state.process_id:
            work()
        barrier()


def gather(fact: Any) -> list[Any]:
    """Return what each process has called this with, a JSON value, by process."""
    if not global_state.client:
        return [fact]
    board = f"gpt_jax/{next(numbers)}"
    global_state.client.key_value_set(f"{board}/{global_state.process_id}", json.dumps(fact))
    barrier()
    said = dict(global_state.client.key_value_dir_get(board))
    return [json.loads(said[f"{board}/{p}"]) for p in range(global_state.num_processes)]


def agree(facts: dict[str, Any]) -> None:
    """Compare ``facts``, name to JSON value, over all processes; UserError in each if one differs.

    Processes that do not run the same program on the same data hang, or worse, do not.
    """
    said = gather(facts)
    for process, name in itertools.product(range(len(said)), facts):
        if said[process].get(name) != said[0].get(name):
            raise UserError(
                f"process {process} has {name}={said[process].get(name)!r}, but process 0 has "
                f"{name}={said[0].get(name)!r}: start all with the same command, on the same files"
            )


def all_see(out_dir: str) -> None:
    """Raise UserError in every process if one does not see what process 0 writes to a folder.

    Of a checkpoint that lies in parts on the disks of several hosts nothing can be restored.
    """
    mark = f".{secrets.token_hex(8)}" if is_first() else ""
    if mark:
        Path(out_dir, mark).touch()
    seen = gather(Path(out_dir, gather(mark)[0]).exists())
    if mark:
        Path(out_dir, mark).unlink()
    if not all(seen):
        raise UserError(
            f"process {seen.index(False)} does not see what process 0 writes to out_dir={out_dir}: "
            "put it on a disk that all hosts share"
        )


def watch(over: threading.Event, advice: str) -> None:
    """Give signs of life and look for the others', until it is ``over`` or one of them is dead."""
    client: Any = global_state.client
    board, n = "gpt_jax/alive", global_state.num_processes
    this, host = global_state.process_id, socket.gethostname()
    seen = {process: ("", time.monotonic(), "an unknown host") for process in range(n)}
    for sign in count():
        try:
            client.key_value_set(f"{board}/{this}", f"{sign} {host}", allow_overwrite=True)
            signs = dict(client.key_value_dir_get(board))
        except Exception:
            signs = {}  # the service is process 0's
        if over.wait(PERIOD):
            return
        now = time.monotonic()
        for key, text in signs.items():
            process = int(key.rpartition("/")[2])
            if text != seen[process][0]:
                seen[process] = (text, now, text.partition(" ")[2])
        silent = [process for process in range(n) if now - seen[process][1] > SILENCE]
        if silent:
            if is_first():  # the others lose the service with it: they have the word first
                time.sleep(2 * PERIOD)
            dead = silent if signs else [0]
            who = ", ".join(f"process {process} on {seen[process][2]}" for process in dead)
            leave(1, f"error: {who} has not been heard of for {SILENCE} s: {advice}")
