"""Whether what was written is what comes back: digests of arrays and JSON, disks that refuse.

To Orbax a bit that has flipped in an array's file is as good as any.
"""

import errno
import hashlib
import itertools
import json
import logging
import math
import os
import re
import shutil
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax import Array

from gpt_jax.errors import DamageError, RunError, UserError

KINDS = {  # of what a checkpoint's JSON must hold
    "iter": int, "val_loss": float | None, "best_val_loss": float | None, "wandb_id": str | None,
    "config": dict, "model": dict, "tokenizer": dict, "digests": dict, "sha256": str,
}  # fmt: skip
ENOUGH = 32  # updates before a spike can stand out from them
FULL = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC), errno.EFBIG)  # Windows has no EDQUOT
HIGHEST_RATIO = 1000  # bytes of arrays to a byte on the disk


def quiet() -> None:
    """Have Orbax's threads print no stack traces of errors that are raised, and said in a line.

    Where one file fails, each of the threads at work on the others prints its own, some later.
    """
    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(is_news)  # which knows one that is there already
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
    if not isinstance(sys.unraisablehook, Unraisable):
        sys.unraisablehook = Unraisable(sys.unraisablehook)


def is_news(record: logging.LogRecord) -> bool:
    """Return whether a log record tells of anything but an error on its way through Orbax."""
    return not (record.exc_info and from_orbax(record.exc_info[1]))


class Unraisable:
    """A hook for errors that nobody can catch, deaf to Orbax's."""

    def __init__(self, before: Callable[[Any], Any]):
        self.before = before

    def __call__(self, problem: Any) -> None:
        if not from_orbax(problem.exc_value):
            self.before(problem)


def from_orbax(error: BaseException | None) -> bool:
    """Return whether an error has passed through Orbax or the event loops that it runs."""
    frames = traceback.extract_tb(error.__traceback__) if error else []
    return any("orbax" in frame.filename or "asyncio" in frame.filename for frame in frames)


def in_a_line(error: Exception) -> str:
    """Return an exception's text, without its middle if it is long: what is wrong comes last.

    Behind that TensorStore may put a kilobyte of its specification, and so, or not, from one time
    to the next.
    """
    text = " ".join(f"{type(error).__name__}: {error}".split())
    text = re.sub(r" \[\w+='.*", "", text)
    return text if len(text) <= 300 else f"{text[:100]} ... {text[-180:]}"


def free_bytes(path: str | Path, error: Exception) -> str:
    """Return what to say of the space left where ``path`` lies or would lie.

    "" where what failed had another reason; what Orbax raises may not tell.
    """
    if isinstance(error, OSError) and error.errno not in (*FULL, None):
        return ""
    for there in (Path(path).absolute(), *Path(path).absolute().parents):
        with suppress(OSError):
            return f"; {shutil.disk_usage(there).free:,} bytes are free there"
    return ""


@contextmanager
def written(path: str | Path) -> Iterator[None]:
    """Turn whatever fails when writing below ``path`` into a RunError, with the space left."""
    try:
        yield
    except RunError:
        raise
    except Exception as error:  # Orbax passes on what its own libraries and threads raise
        why = f"{path} cannot be written ({in_a_line(error)}{free_bytes(path, error)})"
        advice = "what was saved before is whole: mend it and go on with --init_from=resume"
        raise RunError(f"{why}: {advice}") from error


@contextmanager
def made(folder: Path, keep: bool = False) -> Iterator[None]:
    """Make a folder; unless it is to be kept, remove it if an exception leaves it empty."""
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        with suppress(OSError):  # what is not empty stays
            for path in new if not keep else ():
                path.rmdir()
        raise


def refuse_to_overwrite(path: Path) -> None:
    """Raise UserError where there is anything at a path, be it a broken link."""
    if os.path.lexists(path):
        raise UserError(f"{path} is there already: move it away, or name another destination")


def replace_file(path: Path, content: str | bytes) -> None:
    """Write a file anew, so that whatever happens the old one is there or the new, whole."""
    new = path.with_name(f".{path.name}.new")
    try:
        with open(new, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)
    except OSError:
        with suppress(OSError):
            new.unlink()  # on a full disk it takes the last bytes
        raise


def room_for_a_copy(tree: Any) -> bool:
    """Return whether the devices of a tree, all of this process, can surely hold it twice.

    There must be room for all that the largest update so far has needed a second time: the copy
    breaks up what is free, and an update asks for much of it in one piece (docs/performance.md).
    """
    leaves = jax.tree.leaves(tree)
    devices = leaves[0].devices() if jax.process_count() == 1 else ()
    for device in devices:
        stats = device.memory_stats()
        if stats is None:  # a CPU; several virtual ones would starve each other's collectives
            return len(devices) == 1
        copy = sum(x.nbytes for x in leaves) / len(devices)
        if stats["bytes_limit"] < 2 * stats["peak_bytes_in_use"] + copy:
            return False
    return bool(devices)


@jax.jit  # as one program: one by one, each shape would be compiled for
def copied(tree: Any) -> Any:
    """Return a copy of each array of a tree, where it lies."""
    return jax.tree.map(jnp.copy, tree)


def digests(tree: Any) -> Callable[[], dict[str, str | None]]:
    """Start to compute the digest of each array; call what is returned for them, by path.

    It is None for an array that holds nan or inf.
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
    sums = checksums([x for _, x in leaves])

    def computed() -> dict[str, str | None]:
        rows = zip(names, np.asarray(sums), strict=True)
        return {name: f"{a:08x}{b:08x}" if finite else None for name, (a, b, finite) in rows}

    return computed


@jax.jit
def checksums(arrays: list[Array]) -> Array:
    """Return uint32 (n, 3): two sums over each array's bits, and whether it is all finite.

    Each element is mixed, one to one, with its index (the finaliser of murmur3, Appleby 2011), so
    a change to any one changes both sums. They are integers: the same on every mesh, and on the
    device they cost about as much as reading the array.
    """

    def checksum(x: Array) -> Array:
        mixed = jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}").astype(jnp.uint32)
        strides = [math.prod(x.shape[axis + 1 :]) % 2**32 for axis in range(x.ndim)]
        iotas = [jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) for axis in range(x.ndim)]
        index = sum((i * jnp.uint32(n) for i, n in zip(iotas, strides, strict=True)), jnp.uint32(0))
        mixed ^= index * jnp.uint32(0x9E3779B9)
        mixed = (mixed ^ mixed >> 16) * jnp.uint32(0x85EBCA6B)
        mixed = (mixed ^ mixed >> 13) * jnp.uint32(0xC2B2AE35)
        mixed ^= mixed >> 16
        sums = [mixed.sum(dtype=jnp.uint32), (mixed * (2 * index + 1)).sum(dtype=jnp.uint32)]
        return jnp.stack([*sums, jnp.isfinite(x).all().astype(jnp.uint32)])

    return jnp.stack([checksum(x) for x in arrays])


def sealed(meta: dict[str, Any]) -> dict[str, Any]:
    """Return a checkpoint's JSON with its own digest."""
    text = json.dumps({n: x for n, x in meta.items() if n != "sha256"}, sort_keys=True)
    return {**json.loads(text), "sha256": hashlib.sha256(text.encode()).hexdigest()}


def read_sealed(path: Path, step: int) -> dict[str, Any]:
    """Return the JSON of a checkpoint; DamageError if it is not what was written, or no file is."""
    odd = [file for file in path.parents[1].rglob("*") if not (file.is_file() or file.is_dir())]
    if odd:  # to read a pipe or a device may take for ever
        raise DamageError(f"{path.parents[1]} cannot be read: {odd[0]} is no file")
    try:
        meta = json.loads(path.read_text("utf-8"))
        wrong = [n for n, kind in KINDS.items() if not isinstance(meta.get(n, ...), kind)]
        if wrong or str(meta["iter"]) != str(step):
            raise ValueError(f"{wrong[0] if wrong else 'iter'} is not what it must be")
        if meta["sha256"] != sealed(meta)["sha256"]:
            raise ValueError("it is not what was written: its sha256 differs")
        return meta
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise DamageError(f"{path} cannot be read ({error!s:.200})") from None


def amend(path: Path, changes: dict[str, Any]) -> None:
    """Change values of a JSON that is sealed, and seal it anew."""
    with written(path):
        meta = json.loads(path.read_text("utf-8"))
        replace_file(path, json.dumps(sealed({**meta, **changes})))


def check_digests(path: Path, tree: Any, saved: Any) -> None:
    """Raise DamageError where ``tree``, read from ``path``, has not the digests of its saving.

    ``saved`` holds those of each item, by the name of its folder.
    """
    expected = saved.get(path.name) if isinstance(saved, dict) else None
    if not isinstance(expected, dict):
        raise DamageError(f"{path} has no digests in its JSON: nobody can tell if it is damaged")
    found = digests(tree)()
    wrong = [name for name in {**found, **expected} if found.get(name) != expected.get(name)]
    if wrong:
        raise DamageError(f"{path} is damaged: {wrong[0]!r:.80} is not what was saved")


def check_stored(path: Path, like: Any) -> None:
    """Raise DamageError where the arrays stored at ``path`` are not of the shapes of ``like``."""
    with reading(path):
        stored, wanted = (
            sorted((x.shape, str(x.dtype)) for x in jax.tree.leaves(tree))
            for tree in (stored_shapes(path), like)
        )
        held = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    for there, ours in itertools.zip_longest(stored, wanted):
        if there != ours:
            raise DamageError(f"{path} holds other arrays than its JSON says: {there}, not {ours}")
    claimed = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(like))
    if claimed > 2**20 + HIGHEST_RATIO * held:
        raise DamageError(f"{path} claims {claimed:,} bytes of arrays, but its files have {held:,}")


def check_sizes(path: Path, config: Any) -> None:
    """Raise DamageError where the parameters at ``path`` are not of a GPTConfig's sizes.

    For before the network is even traced: the JSON may claim any number of layers.
    """
    with reading(path):
        stored = stored_shapes(path)
        wte, ln_1 = stored["wte"]["weight"].shape, stored["h"]["ln_1"]["weight"].shape
        wpe = stored["wpe"]["weight"].shape
        sizes = {"vocab_size": wte[0], "n_embd": wte[1], "block_size": wpe[0], "n_layer": ln_1[0]}
    for name, size in sizes.items():
        if size != getattr(config, name):
            claim = f"{name}={getattr(config, name)}"
            raise DamageError(f"{path} is damaged: it has {name}={size}, and its JSON says {claim}")


def stored_shapes(path: Path) -> Any:
    """Return what Orbax's own files say of the arrays at ``path``; none is read."""
    return ocp.PyTreeCheckpointHandler().metadata(path)  # pyright: ignore


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn what Orbax cannot read into DamageError; what is no fault of the files goes on."""
    quiet()
    try:
        yield
    except Exception as error:  # Orbax passes on what its libraries and the disk raise
        if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED: Out of memory" in str(error):
            raise
        raise DamageError(f"{path} is damaged ({in_a_line(error)})") from None


def is_spike(recent: Array, loss: Array, grad_norm: Array, zscore: float) -> Array:
    """Return whether one of the two is ``zscore`` standard deviations above ``recent``'s."""
    known = recent >= 0
    mean, deviation = recent.mean(1, where=known), recent.std(1, where=known)
    above = jnp.stack([loss, grad_norm]) - mean
    return ((known.sum(1) >= ENOUGH) & (above > zscore * deviation)).any()
