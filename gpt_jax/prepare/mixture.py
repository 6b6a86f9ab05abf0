"""Several data sets as one: `--dataset=a:0.7,b:0.3` by weight, `--dataset=a,b` by size.

By weight, each sample is drawn from one of the sets by its turn in a cycle. After any number of
samples each set has had within one of its share of them, and it walks its own epochs meanwhile.
By size, the files of all are one set.
"""

import math
import os
import re
from fractions import Fraction
from pathlib import Path

from gpt_jax.errors import UserError
from gpt_jax.prepare import prepare_on_first_use

LONGEST_CYCLE = 10_000  # samples: weights are rounded to this part of their sum where need be
WEIGHT = re.compile(r"[0-9]{1,9}(\.[0-9]{1,9})?|\.[0-9]{1,9}")


def sets_of(dataset: str) -> dict[str, Fraction | None]:
    """Return the sets that --dataset names, each with its share of the samples.

    The shares are None where there is one set, or several by size. UserError for what is no
    mixture.
    """
    pieces = [piece.strip() for piece in dataset.split(",")]
    said = f"dataset={dataset!r:.100}"
    how = "write NAME, or NAME:WEIGHT,NAME:WEIGHT, or NAME,NAME to mix them by size"
    weights: dict[str, Fraction | None] = {}
    for piece in pieces:
        name, colon, weight = piece.partition(":")
        if not name:
            raise UserError(f"{said}: a data set has no name: {how}")
        if os.path.normpath(name) in map(os.path.normpath, weights):
            raise UserError(f"{said} names {name!r} twice: give it one weight")
        if colon and not (WEIGHT.fullmatch(weight) and Fraction(weight)):
            raise UserError(
                f"{said}: the weight {weight!r} of {name!r} is not a number above 0, such as 0.7 "
                f"or 2: {how}"
            )
        weights[name] = Fraction(weight) if colon else None
    given = [weight for weight in weights.values() if weight]
    if not given:
        return {dataset: None} if len(weights) == 1 else weights
    if len(weights) == 1 or len(given) < len(weights):
        raise UserError(f"{said}: give each of several data sets a weight, or none: {how}")
    return {name: Fraction(weight or 0) / sum(given) for name, weight in weights.items()}


def turns(shares: list[Fraction], dataset: str) -> tuple[int, ...]:
    """Return the cycle in which sets of these shares take turns, by their numbers.

    After any n samples a set has had more than ``n * share - 1`` and less than ``n * share + 1``:
    of the sets that would not be ahead of their shares, the one comes next that would soonest be
    behind (the earliest deadline first: Steiner & Yeomans 1993, "Level schedules for mixed-model,
    just-in-time processes"). UserError for a share that is too small for the longest cycle.
    """
    length = math.lcm(*(share.denominator for share in shares))
    counts = [int(share * length) for share in shares]
    if length > LONGEST_CYCLE:
        length = LONGEST_CYCLE
        counts = [int(share * length) for share in shares]
        remainders = [count - share * length for count, share in zip(counts, shares, strict=True)]
        for i in sorted(range(len(counts)), key=remainders.__getitem__)[: length - sum(counts)]:
            counts[i] += 1
    if not all(counts):
        raise UserError(
            f"dataset={dataset!r:.100}: the smallest weight is less than 1/{LONGEST_CYCLE:,} of "
            "the sum: raise it or leave that data set out"
        )
    had, cycle = [0] * len(counts), []
    for n in range(1, length + 1):
        due = [
            (-(-(had[i] + 1) * length // count), i)
            for i, count in enumerate(counts)
            if had[i] * length < n * count
        ]
        cycle.append(min(due)[1])
        had[cycle[-1]] += 1
    return tuple(cycle)


def prepare_sets(data_dir: str, dataset: str) -> None:
    """Make the small named sets of --dataset that are not there; UserError for any other."""
    for name in sets_of(dataset):
        prepare_on_first_use(name, Path(data_dir, name))
