"""Processes of their own: fresh ones, whose memory is free again when they end."""

import os
import signal
import subprocess
import sys
from contextlib import suppress
from typing import Any

from gpt_jax.errors import RunError, UserError


def output(
    command: list[str], what: str, timeout: float, task: str = "", **variables: str
) -> tuple[str, str]:
    """Return stdout and stderr of a command that ends well within ``timeout`` seconds.

    ``task`` is its stdin, ``variables`` are added to its environment. Raises UserError with its own
    line where it ends with 2, RunError with its last line where it fails otherwise.
    """
    try:
        child = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True, env={**os.environ, **variables}, start_new_session=True,
        )  # fmt: skip
    except OSError as error:
        raise UserError(f"{command[0]!r:.100} cannot be run ({error.strerror})") from None
    try:
        out, err = child.communicate(task, timeout)
    except subprocess.TimeoutExpired:
        raise RunError(f"{what} took more than --timeout={timeout:g} seconds") from None
    finally:
        end(child)
    if child.returncode:
        last = (err.strip().splitlines() or [f"it ended with {child.returncode}"])[-1]
        kind = UserError if child.returncode == 2 else RunError
        raise kind(f"{what}: {last.removeprefix('error: ')[:300]}")
    return out, err


def end(child: Any) -> None:
    """Kill a process that has not ended, and what it has started."""
    kill(child)
    child.wait()
    for pipe in (child.stdin, child.stdout, child.stderr):
        pipe.close()


def kill(child: Any) -> None:
    """Kill a process group: what torch.compile has started would outlive its process."""
    if sys.platform == "win32":
        child.kill()
        return
    with suppress(ProcessLookupError, PermissionError):  # all have ended
        os.killpg(child.pid, signal.SIGKILL)


def own(verb: str, argv: list[str]) -> list[str]:
    """Return the command that runs a bench of ours in a process of its own."""
    return [sys.executable, "-m", "gpt_jax.bench", verb, *argv]
