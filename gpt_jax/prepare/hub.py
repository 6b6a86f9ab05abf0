"""Data sets of the Hugging Face hub, streamed: no copy of the text is kept."""

import itertools
import math
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from gpt_jax.errors import UserError
from gpt_jax.prepare.files import Unfinished
from gpt_jax.prepare.sources import Fragment, text_of

STATE_EVERY = 1000  # rows between two places that the data set itself can go on from


@dataclass(frozen=True)
class Hub:
    """One split of a data set by its name on the hub."""

    dataset: str  # owner/name
    config: str | None = None
    split: str = "train"
    column: str = "text"
    rows: int = 0  # as counted by others; 0: what the data set's card says

    @property
    def name(self) -> str:
        """The data set's name with its config."""
        return self.dataset + (f" ({self.config})" if self.config else "")

    @property
    def size(self) -> int:
        """A weight of its own, for the bytes are not known."""
        return 1 << 30

    def stamp(self) -> Any:
        """Return name, config, split and column."""
        return [self.dataset, self.config, self.split, self.column]

    def package(self) -> Any:
        """Return the package datasets; UserError where it is not installed or the name is none."""
        if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", self.dataset):
            raise UserError(f"hf:{self.dataset} names no data set: write hf:owner/name")
        try:
            import datasets  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise UserError(
                f"{self.dataset} needs the package datasets: pip install 'gpt_jax[data]'"
            ) from error
        return datasets

    def open(self) -> Any:
        """Return the rows as `datasets` streams them; UserError where it cannot."""
        datasets = self.package()
        config = (self.config,) if self.config else ()
        try:
            return datasets.load_dataset(self.dataset, *config, split=self.split, streaming=True)
        except Exception as error:  # the package raises its own, the network's and the disk's
            raise UserError(
                f"cannot load {self.name} ({_line(error)}): check the network, the name, "
                "--config and --split"
            ) from error

    def fragments(self, at: Any = None) -> Iterator[Fragment]:
        """Yield a document a row; Unfinished where the stream breaks, for a rerun goes on."""
        rows, total = self.open(), self.rows
        with suppress(Exception):  # a card need not tell
            total = total or rows.info.splits[self.split].num_examples
        # the rows' own state was taken ``past`` rows ago
        at = at or {"rows": 0, "state": None, "past": 0}
        number, state, past = at["rows"], at["state"], at["past"]
        try:
            if state is not None:
                rows.load_state_dict(state)
            for row in itertools.islice(rows, past, None):
                number, past = number + 1, past + 1
                if past >= STATE_EVERY:
                    state, past = rows.state_dict(), 0
                text = text_of(f"{self.name} row {number}", row, self.column)
                where = {"rows": number, "state": state, "past": past}
                yield Fragment(text, True, where, number / total if total else math.nan)
        except UserError:
            raise
        except Exception as error:
            raise Unfinished(
                f"{self.name} stopped after {number:,} documents ({_line(error)}): run again, "
                "what is saved by then is not done twice"
            ) from error


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]
