"""Where documents come from: files of text, of JSON lines and of Parquet, found and read in parts.

A source gives its documents in fragments of bounded size, each with where the source has got to:
from there it goes on in another process. Nothing is ever held whole but one row, and a row that
is longer than LONGEST is refused as soon as it is.
"""

import codecs
import gzip
import io
import json
import os
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from gpt_jax.errors import UserError

TEXT, LINES, PARQUET = (".txt", ".md"), (".jsonl", ".json"), (".parquet",)
PACKED = (".gz", ".zst")
KNOWN = ".txt, .md, .jsonl (or .json, one object a line), each plain, .gz or .zst, and .parquet"
READ = 1 << 20  # bytes taken from a file at a time
LONGEST = 1 << 26  # bytes of a row, characters of text in which there is no place to cut
PARQUET_ROWS = 32  # at a time: dictionary pages can make much of little


class Fragment(NamedTuple):
    """A part of a document; the last one of a document may be empty."""

    text: str
    ends: bool  # the document ends here
    at: Any  # where the source goes on after this document, as JSON
    done: float  # share of the source, NaN where unknown


class Source(Protocol):
    """A file or a data set that gives documents in order."""

    @property
    def name(self) -> str:
        """What messages call it."""
        ...

    @property
    def size(self) -> int:
        """Its weight in the share that is done: bytes, where they are known."""
        ...

    def stamp(self) -> Any:
        """Return as JSON what tells this source from another and from a changed one."""
        ...

    def fragments(self, at: Any = None) -> Iterator[Fragment]:
        """Yield the documents from the place ``at`` on; None is the beginning."""
        ...


@dataclass(frozen=True)
class File:
    """A file on this machine."""

    path: Path
    size: int
    mtime_ns: int
    column: str  # of rows

    @property
    def name(self) -> str:
        """The path."""
        return str(self.path)

    @property
    def is_text(self) -> bool:
        """Whether the file is one document, not rows."""
        return _suffix(self.path)[0] in TEXT

    def stamp(self) -> Any:
        """Return path, size, time of the last change and column."""
        return [self.name, self.size, self.mtime_ns, None if self.is_text else self.column]

    def fragments(self, at: Any = None) -> Iterator[Fragment]:
        """Yield the file's documents; UserError for what cannot be read as its suffix says."""
        suffix, packed = _suffix(self.path)
        try:
            if suffix in PARQUET:
                yield from _parquet(self, at or 0)
                return
            with _opened(self.path, packed) as (file, share):
                read = _text if suffix in TEXT else _json_lines
                yield from read(self, file, share, at or 0)
        except UserError:
            raise
        except ImportError as error:
            raise UserError(f"{self.name} needs pyarrow: pip install 'gpt_jax[data]'") from error
        # pyarrow's own are ValueErrors and OSErrors
        except (OSError, EOFError, zlib.error, ValueError) as error:
            raise UserError(f"cannot read {self.name}: {one_line(error)}") from error


def one_line(error: Exception) -> str:
    """Return what an error says in one line of bounded length."""
    said = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(said.split())[:200]


def _suffix(path: Path) -> tuple[str, str]:
    """Return the suffix that tells what a file holds, and the one that tells how it is packed."""
    packed = path.suffix.lower() if path.suffix.lower() in PACKED else ""
    return (Path(path.stem) if packed else path).suffix.lower(), packed


def _is_known(path: Path) -> bool:
    suffix, packed = _suffix(path)
    return suffix in (*TEXT, *LINES) or (suffix in PARQUET and not packed)


def find(inputs: Sequence[str | Path], column: str = "text") -> list[File]:
    """Return the files that paths, folders and glob patterns name, each once, in a fixed order.

    A string may hold several, with commas between. Of a folder, all files with a known suffix but
    .json (which seldom holds lines) and hidden ones. UserError for what is not there or not known.
    """
    paths: dict[Path, None] = {}
    for given in inputs:
        whole = Path(given)
        for part in [given] if whole.exists() else str(given).split(","):
            paths.update(dict.fromkeys(_expand(Path(part))))
    return [_file(path, column) for path in paths]


def _expand(path: Path) -> list[Path]:
    if path.is_dir():
        found = []
        for folder, folders, names in os.walk(path):
            folders[:] = [name for name in folders if not name.startswith(".")]
            found += [Path(folder, name) for name in names if not name.startswith(".")]
        found = [p for p in found if _is_known(p) and ".json" not in p.suffixes and p.is_file()]
        if not found:
            raise UserError(f"{path} has no text: no file in it is of {KNOWN}")
        return sorted(found, key=lambda path: path.as_posix())
    if any(sign in str(path) for sign in "*?[") and not path.exists():
        root = Path(path.anchor)
        found = sorted(root.glob(str(path.relative_to(root))), key=lambda path: path.as_posix())
        files = [path for path in found if path.is_file()]
        if not files:
            raise UserError(f"no file matches {str(path)!r}: look at the folder and the pattern")
        return files
    return [path]


def _file(path: Path, column: str) -> File:
    try:
        found = path.stat()
        if not path.is_file():
            raise UserError(f"{path} is no regular file: save the text in one")
        with open(path, "rb"):
            pass
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    if not _is_known(path):
        raise UserError(f"{path} is none of {KNOWN}: rename it, to .txt if it is plain text")
    return File(path, found.st_size, found.st_mtime_ns, column)


def describe(files: Sequence[File]) -> str:
    """Return how many files of which suffix there are, as "3 files (2 .txt, 1 .jsonl.gz)"."""
    kinds = Counter("".join(_suffix(file.path)) for file in files)
    return f"{len(files):,} files ({', '.join(f'{n:,} {kind}' for kind, n in kinds.items())})"


@contextmanager
def _opened(path: Path, packed: str) -> Iterator[tuple[Any, Any]]:
    """Open a file for reading unpacked bytes; the second value tells the share that is read."""
    with open(path, "rb") as raw:
        size = max(1, os.fstat(raw.fileno()).st_size)

        def share() -> float:
            return raw.tell() / size

        if packed == ".gz":
            with gzip.GzipFile(fileobj=raw) as file:
                yield file, share
        elif packed == ".zst":
            import pyarrow  # pyright: ignore[reportMissingImports]

            with pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, "r"), "zstd") as file:
                yield file, share
        else:
            yield raw, share


def _text(source: File, file: Any, share: Any, skip: int) -> Iterator[Fragment]:
    """Yield one document: UTF-8 with no byte order mark, its line ends made newlines."""
    if skip:  # it is over
        return
    newlines = io.IncrementalNewlineDecoder(None, translate=True)
    rest, start, first = b"", 0, True
    while True:
        block = file.read(READ)
        data = rest + block
        try:
            text, used = codecs.utf_8_decode(data, "strict", not block)
        except UnicodeDecodeError as error:
            raise UserError(
                f"{source.name} is not UTF-8 at byte {start + error.start} "
                f"(0x{data[error.start]:02X}): convert it to UTF-8"
            ) from error
        rest, start = data[used:], start + used
        if first and text:
            text, first = text.removeprefix("\ufeff"), False
        yield Fragment(newlines.decode(text, not block), not block, 1, share())
        if not block:
            return


def _json_lines(source: File, file: Any, share: Any, skip: int) -> Iterator[Fragment]:
    for number, line in enumerate(_lines(source, file), 1):
        if number > skip and line.strip():
            where = f"{source.name} line {number}"
            yield Fragment(_row(where, line, source.column), True, number, share())


def _lines(source: File, file: Any) -> Iterator[bytes]:
    held, size, number = [], 0, 1  # what has come of the line
    while block := file.read(READ):
        first, *more = block.split(b"\n")
        held, size = [*held, first], size + len(first)
        for line in more:
            yield b"".join(held)
            held, size, number = [line], len(line), number + 1
        if size > LONGEST:
            raise UserError(
                f"{source.name} line {number} is longer than {LONGEST:,} bytes: is it JSON lines, "
                "one object a line? Split what is in it"
            )
    if size:
        yield b"".join(held)


def _row(where: str, line: bytes, column: str) -> str:
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UserError(
            f"{where} is not UTF-8 at its byte {error.start} (0x{line[error.start]:02X}): convert "
            "it to UTF-8"
        ) from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not JSON ({one_line(error)}): mend or remove it") from error
    if not isinstance(row, dict):
        raise UserError(f'{where} is no JSON object: each line is to be one, as {{"text": ...}}')
    return text_of(where, row, column)


def text_of(where: str, row: dict[str, Any], column: str) -> str:
    """Return the text in a row's column, "" for null; UserError for no text or no such column."""
    if column not in row:
        names = ", ".join(map(str, row))
        raise UserError(f"{where} has no column {column!r}: --column= one of {names:.200}")
    text = row[column]
    if text is None:
        return ""
    if not isinstance(text, str):
        raise UserError(
            f"{where}: its {column!r} is {type(text).__name__}, not text: --column= another"
        )
    return scalar(where, text)


def scalar(where: str, text: str) -> str:
    """Return text with U+FFFD for each half of a surrogate pair, which JSON can hold alone."""
    if len(text) > LONGEST:
        raise UserError(
            f"{where} has {len(text):,} characters, and a document {LONGEST:,} at most: split it"
        )
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _parquet(source: File, skip: int) -> Iterator[Fragment]:
    import pyarrow  # pyright: ignore[reportMissingImports]
    import pyarrow.parquet  # pyright: ignore[reportMissingImports]

    column, types = source.column, pyarrow.types
    # a buffer, so that a row group's column is not read whole
    with pyarrow.parquet.ParquetFile(source.path, pre_buffer=False, buffer_size=READ) as file:
        schema = file.schema_arrow
        if column not in schema.names:
            names = ", ".join(schema.names)
            raise UserError(
                f"{source.name} has no column {column!r}: --column= one of {names:.200}"
            )
        kind = schema.field(column).type
        kind = kind.value_type if types.is_dictionary(kind) else kind
        if not (types.is_string(kind) or types.is_large_string(kind)):
            raise UserError(f"{source.name}: its {column!r} is {kind}, not text: --column= another")
        total, group, number = file.metadata.num_rows, 0, 0
        while group < file.num_row_groups:  # whole groups need not be read to be passed over
            rows = file.metadata.row_group(group).num_rows
            if number + rows > skip:
                break
            group, number = group + 1, number + rows
        groups = list(range(group, file.num_row_groups))
        for batch in file.iter_batches(PARQUET_ROWS, groups, [column], use_threads=False):
            for text in batch.column(0):
                number += 1
                if number > skip:
                    where = f"{source.name} row {number}"
                    try:
                        row = text_of(where, {column: text.as_py()}, column)
                    except UnicodeDecodeError as error:
                        raise UserError(f"{where} is not UTF-8: write it anew") from error
                    yield Fragment(row, True, number, number / total)
