"""The folder in which compiled programs wait for the next process: the user's own, of bounded size.

A compiled program is code. So it is taken only from where no one else can have put it.
"""

import glob
import os
import re
import stat
import sys
import tempfile
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

from gpt_jax.runtime.processes import is_first

# what JAX's own bound does too, but only with another package, and with a lock around each read
ENTRIES, BYTES = 1000, 2**30  # kept from one process to the next, the last used first
ERROR = re.compile("Error (?:reading|writing) persistent compilation cache entry for '(.*?)': ")


def default_folder() -> Path | None:
    """Return the folder, made if need be: gpt_jax/xla in XDG_CACHE_HOME or ~/.cache.

    None, and a line on stderr, where it cannot be written or is not the user's alone.
    """
    try:
        caches = Path(os.environ.get("XDG_CACHE_HOME", ""))
        if not caches.is_absolute():  # which the XDG specification has us ignore
            caches = Path.home() / ".cache"
        caches.mkdir(parents=True, exist_ok=True)
        folder = caches.resolve() / "gpt_jax" / "xla"
        for path in (folder.parent, folder):
            path.mkdir(mode=0o700, exist_ok=True)
        folder = folder.resolve()
        reason = not_ours(folder)
        if not reason and is_first():  # the only one that writes
            with tempfile.TemporaryFile(dir=folder) as file:
                file.write(bytes(2**12))  # an empty file fits on a full disk
            drop_the_oldest(folder)
    except (OSError, RuntimeError) as error:  # the latter: of no home
        reason = str(error)
    if not reason:
        return folder
    if is_first():
        print(
            f"note: compiled programs are not kept ({reason}): name a folder of yours in "
            "JAX_COMPILATION_CACHE_DIR, or none with JAX_ENABLE_COMPILATION_CACHE=0",
            file=sys.stderr,
        )
    return None


def not_ours(folder: Path) -> str:
    """Return why others could have put something into a folder, "" if they could not.

    Of a folder above it is enough that nobody else can rename what is in it.
    """
    if not hasattr(os, "getuid"):
        return ""  # on Windows a home has an access list, and its modes say nothing
    for path in (folder, *folder.parents):
        found = path.stat()
        if found.st_uid not in (os.getuid(), 0):
            return f"{path} belongs to another user"
        others = stat.S_IWOTH | (stat.S_IWGRP if path in (folder, folder.parent) else 0)
        sticky = path != folder and found.st_mode & stat.S_ISVTX
        if found.st_mode & others and not sticky:
            return f"{path} can be written by others"
    return ""


def drop_the_oldest(folder: Path) -> None:
    """Remove the files used longest ago, but for ENTRIES of them and BYTES in all."""
    used = []
    for path in folder.rglob("*"):
        with suppress(OSError):  # another process may be at the same
            found = path.stat()
            if stat.S_ISREG(found.st_mode):
                used.append((max(found.st_atime, found.st_mtime), found.st_size, path))
    size = 0
    for n, (_, its, path) in enumerate(sorted(used, reverse=True)):
        size += its
        if n >= ENTRIES or size > BYTES:
            with suppress(OSError):
                path.unlink()


def keep_whole(folder: Path) -> None:
    """Have JAX's warnings of entries that it cannot read or write become one line, and mend them.

    An entry that a full disk or a kill has cut short would be met, and not replaced, at every
    start: JAX writes none that is there. Removed, it is made again.
    """
    if not isinstance(warnings.showwarning, Mender):
        warnings.showwarning = Mender(folder, warnings.showwarning)


class Mender:
    """A way to show warnings, but for those of the compile cache."""

    def __init__(self, folder: Path, before: Any):
        self.folder, self.before, self.told = folder, before, False

    def __call__(self, message: Any, *args: Any, **kwargs: Any) -> None:
        text = " ".join(str(message).split())
        found = ERROR.match(text)
        if not found:
            self.before(message, *args, **kwargs)
            return
        for path in self.folder.glob(f"{glob.escape(found[1])}-*-cache"):
            with suppress(OSError):
                path.unlink()
        if not self.told:
            self.told = True
            why = f"{self.folder}: {text[found.end() :]:.200}"
            print(f"note: a compiled program is not kept, or made again ({why})", file=sys.stderr)
