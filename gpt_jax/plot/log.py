"""The numbers of a run, as columns, from its metrics.jsonl."""

import json
from array import array
from collections import defaultdict
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from gpt_jax.checkpoint import read_meta, steps
from gpt_jax.commandline import saved_run
from gpt_jax.errors import UserError
from gpt_jax.reporting import is_entry

HIGHEST = 1e9  # nats/token: beyond it nothing is a loss, and drawing would overflow
X = {"step": "iter", "tokens": "tokens", "time": "time"}  # what can be drawn over, and its key


class Log:
    """The columns of a metrics.jsonl, which may grow: ``read`` takes in what is new.

    ``steps`` and ``evals`` map a key to its float64 column, nan where a line lacks it; one of
    nothing but nan is that of a key that no line has. Losses are in nats/token, time in seconds.
    """

    def __init__(self, path: Path):
        self.path, self.offset = path, 0
        self.columns = {"loss": defaultdict(lambda: array("d")),
                        "val_loss": defaultdict(lambda: array("d"))}  # fmt: skip

    def read(self) -> "Log":
        """Take in the lines that have been added; of no file, none. Returns itself."""
        if not self.path.is_file():
            return self
        with self.path.open("rb") as file:
            file.seek(self.offset)
            for line in file:
                try:
                    entry = json.loads(line)
                except (ValueError, RecursionError):
                    if not line.endswith(b"\n"):
                        break  # it is being written
                else:
                    if isinstance(entry, dict) and is_entry(entry):
                        self.add(entry)
                self.offset += len(line)
        return self

    def add(self, entry: dict[str, Any]) -> None:
        """Add a line's numbers to the columns of its kind."""
        columns = self.columns["val_loss" if "val_loss" in entry else "loss"]
        n = len(columns["iter"])
        for name, x in entry.items():
            if type(x) is float or (type(x) is int and abs(x) < 2**63):
                column = columns[name]
                column.extend([np.nan] * (n - len(column)))
                column.append(x)

    @property
    def steps(self) -> dict[str, np.ndarray]:
        """The columns of the updates."""
        return self.full("loss")

    @property
    def evals(self) -> dict[str, np.ndarray]:
        """The columns of the evaluations."""
        return self.full("val_loss")

    def full(self, kind: str) -> dict[str, np.ndarray]:
        """Return the columns of a kind of line, each as long as the others."""
        n = len(self.columns[kind]["iter"])
        full: dict[str, np.ndarray] = defaultdict(lambda: np.full(n, np.nan))
        for name, column in self.columns[kind].items():
            full[name] = np.append(np.array(column), np.full(n - len(column), np.nan))
        return full

    def over(self, x: str) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """Return steps and evals with a column "x": iterations, tokens, or seconds of training.

        Tokens of lines that do not tell them are taken from the run's config.json. Raises UserError
        where nothing tells of them, and where there are no lines at all.
        """
        steps, evals = self.steps, self.evals
        if not len(steps["iter"]) and not len(evals["iter"]):
            raise UserError(f"{self.path} holds no metrics yet: train first, or name another run")
        unknown = np.isnan(steps[X[x]]).any() or np.isnan(evals[X[x]]).any()
        per_iter = self.tokens_per_iter() if x == "tokens" and unknown else None
        for kind, after in ((steps, 1), (evals, 0)):  # a step is told of once it has been taken
            kind["x"] = kind[X[x]]
            if per_iter:
                missing = np.isnan(kind["x"])
                kind["x"] = np.where(missing, (kind["iter"] + after) * per_iter, kind["x"])
        if np.isnan(np.append(steps["x"], evals["x"])).all():
            problem = f"{self.path} does not say the {x} of its lines, an older version wrote it"
            remedy = "put the run's config.json beside it, or use --x=step"
            raise UserError(
                f"{problem}: {remedy if x == 'tokens' else 'use --x=step or --x=tokens'}"
            )
        return steps, evals

    def tokens_per_iter(self) -> int | None:
        """Return the tokens of an update, None where the run's config.json does not say."""
        c = saved_run(str(self.path.parent))
        try:
            return c["gradient_accumulation_steps"] * c["batch_size"] * c["block_size"]
        except KeyError:
            return None

    def measured_on(self) -> dict[str, tuple[str, str]]:
        """Return of what this run's losses are, as far as its folder knows: (identity, name) each.

        The data set is what config.json says, the tokenizer what the newest checkpoint does.
        """
        run, known = str(self.path.parent), {}
        with suppress(UserError, KeyError):  # one that cannot be read says nothing
            dataset = saved_run(run)["dataset"]
            known["data sets"] = (dataset, dataset)
        with suppress(UserError, KeyError, IndexError):
            spec = dict(read_meta(run, steps(run)[-1])["tokenizer"])
            spec.pop("merges", None)  # GPT-2's file, which not every checkpoint keeps
            name = spec.get("name", spec.get("kind"))
            known["tokenizers"] = (json.dumps(spec, sort_keys=True), str(name))
        return known


def finite(x: np.ndarray) -> np.ndarray:
    """Return a column with nan for what cannot be drawn: inf and the impossibly large."""
    return np.where(np.abs(x) < HIGHEST, x, np.nan)
