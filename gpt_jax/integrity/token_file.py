"""A file of token ids in memory, as long as it stays the one that was opened."""

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import DTypeLike

from gpt_jax.errors import UserError


@dataclass(frozen=True)
class TokenFile:
    """The token ids of one file, mapped into memory."""

    path: Path
    tokens: np.ndarray  # uint16 or uint32, (n,)
    opened: tuple[int, ...] = ()  # stamp of the file that was mapped; (): tokens of no file
    part: int = 0  # which data set of a mixture it belongs to

    def refuse_if_changed(self) -> None:
        """Raise UserError where the file is not the one that was opened, or is gone.

        To read past the end of a mapped file that was cut short would kill the process by SIGBUS.
        """
        if self.opened and stamp(self.path) != self.opened:
            raise UserError(
                f"{self.path} was replaced, written to or removed while in use (it had "
                f"{self.opened[0]:,} bytes): put it back or prepare the data set again, and rerun"
            )

    def refuse(self, first: int, ids: np.ndarray, vocab_size: int) -> None:
        """Raise UserError for the first id, of those from token ``first`` on, out of range."""
        place = int(np.argmax(ids >= vocab_size))
        raise UserError(
            f"{self.path}: token {first + place} is {ids[place]}, but vocab_size={vocab_size}: "
            "the file and its meta.json do not belong together, prepare the data set again"
        )


def stamp(path: Path) -> tuple[int, ...]:
    """Return a file's size in bytes, time of its last change in ns, and inode; () if it is gone."""
    with suppress(OSError):
        found = path.stat()
        return found.st_size, found.st_mtime_ns, found.st_ino
    return ()


def open_file(path: Path, dtype: DTypeLike, header_bytes: int = 0) -> TokenFile:
    """Return the little-endian ids, "uint16" or "uint32", that follow the header of a file.

    The file is taken as it is, OSError or ValueError if it cannot be mapped:
    ``prepare.checked.open_checked`` finds the files of a data set and says what is wrong with one.
    """
    opened = stamp(path)  # before it is mapped: a file that comes in between is noticed
    tokens = np.memmap(path, np.dtype(dtype).newbyteorder("<"), "r", header_bytes)
    return TokenFile(path, np.asarray(tokens), opened)  # slices of a bare array are quicker
