"""What a run holds while it lasts: its folder, for itself alone, and its ear for signals."""

import errno
import json
import os
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows: nothing is locked there
    fcntl = None

from gpt_jax.config import TrainConfig
from gpt_jax.errors import UserError
from gpt_jax.integrity import free_bytes, made
from gpt_jax.runtime.processes import all_see, gather, is_first
from gpt_jax.runtime.signals import Stop

LOCK = ".lock"  # in out_dir; it must stay where it is while a run lasts
NAMES = ("pid", "host", "time")  # what it holds, a line of JSON
PATIENCE = 1  # seconds in which the holder of a lock has written who it is
TAKEN = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)  # flock's word for it; NFS has its own


@contextmanager
def running(config: TrainConfig) -> Iterator[Stop]:
    """Hold a run's out_dir, made if need be, and hear the signals that stop it: a context.

    An evaluation alone holds nothing, nor does a run that has nothing to resume from. Raises
    UserError, in every process, where out_dir cannot be written or another run holds it. Ended by
    an exception, it leaves no empty folder that it has made.
    """
    stop = Stop()
    there = gather(os.path.isdir(config.out_dir))[0]
    if config.eval_only or (config.init_from == "resume" and not there):
        yield stop
        return
    with stop, ExitStack() as held:
        refusal = None
        if is_first():
            try:
                make_writable(Path(config.out_dir), held)
                held.enter_context(locked(config.out_dir))
            except UserError as error:
                refusal = str(error)
        refusal = gather(refusal)[0]
        if refusal:
            raise UserError(refusal)
        all_see(config.out_dir)
        yield stop


def make_writable(out: Path, held: ExitStack) -> None:
    """Make a folder; UserError now, not at the first checkpoint, if it cannot be written."""
    there = next(path for path in (out, *out.parents) if path.exists())
    if not there.is_dir():
        raise UserError(f"out_dir={out} cannot be made: {there} is a file: name a folder")
    try:
        held.enter_context(made(out))
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise UserError(
            f"out_dir={out} cannot be written: {error}{free_bytes(out, error)}"
        ) from None


@contextmanager
def locked(out_dir: str) -> Iterator[None]:
    """Hold the only lock on a folder, where its file system has locks; UserError if it is taken.

    The kernel gives the lock back with the process, however that ends: a file left over by a
    `kill -9` bars no one.
    """
    with ExitStack() as held:
        lock(Path(out_dir, LOCK), held)
        yield


def lock(path: Path, held: ExitStack) -> None:
    """Lock a file, made if need be, until ``held`` ends; do nothing where there are no locks."""
    if fcntl is None:
        return
    last = time.monotonic() + PATIENCE
    while True:
        with ExitStack() as opened:
            try:
                file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            except OSError as error:
                raise UserError(f"out_dir={path.parent} cannot be written: {error}") from None
            opened.callback(os.close, file)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno not in TAKEN:
                    remove(file, path)
                    return
                holder = holder_of(file)
                if not holder and time.monotonic() < last:
                    time.sleep(0.01)
                    continue
                raise UserError(in_use(path.parent, holder)) from None
            if is_at(file, path):
                opened.callback(remove, file, path)  # while it is held: then it can be another's
                me = [os.getpid(), socket.gethostname(), time.strftime("%Y-%m-%d %H:%M:%S")]
                with suppress(OSError):  # a full disk: it is held, without a name
                    os.ftruncate(file, 0)
                    os.write(file, f"{json.dumps(dict(zip(NAMES, me, strict=True)))}\n".encode())
                held.push(opened.pop_all())
                return
            # else its holder has removed it since it was opened here: locked, it would bar no one


def is_at(file: int, path: Path) -> bool:
    """Return whether an open file is still the one of that name."""
    try:
        return os.path.samestat(os.fstat(file), os.stat(path))
    except FileNotFoundError:
        return False


def remove(file: int, path: Path) -> None:
    """Remove an open file, if it is still the one of that name and can be removed."""
    with suppress(OSError):
        if is_at(file, path):
            path.unlink()


def holder_of(file: int) -> dict[str, Any]:
    """Return what the holder of a lock has written of itself, {} where that is not its word."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        holder = json.loads(os.pread(file, 4096, 0))
        if holder["host"] == socket.gethostname():
            with suppress(PermissionError):  # another user's process
                os.kill(holder["pid"], 0)  # raises where the file is left over from a dead one
        return {name: holder[name] for name in NAMES}
    return {}


def in_use(out: Path, holder: dict[str, Any]) -> str:
    """Return why a run cannot have its folder, and what to do."""
    if not holder:
        return (
            f"out_dir={out} is in use by another process: wait for it, stop it, or give another "
            "--out_dir"
        )
    return (
        f"out_dir={out} is in use by process {holder['pid']} on {holder['host']} since "
        f"{holder['time']}: wait for it, stop it (kill {holder['pid']}), or give another --out_dir"
    )
