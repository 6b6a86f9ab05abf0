"""Text of your own, and of others: files, folders and data sets of the hub become a stream.

Where all files are plain text, the last characters are for validation, as nanoGPT splits. Of rows
each is for one or the other, by a hash of nanoGPT's seed and the document's number: neither the
order nor the number of threads matters, and nothing need be known of what is still to come.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from gpt_jax.errors import UserError
from gpt_jax.prepare.cuts import cuts_of
from gpt_jax.prepare.files import Stream
from gpt_jax.prepare.hub import Hub
from gpt_jax.prepare.pipeline import Place, blocks, cores, encoded
from gpt_jax.prepare.progress import Progress, size
from gpt_jax.prepare.sources import File, Source, describe, find
from gpt_jax.prepare.tokenizers import choose

HUB = "hf:"
FILES_SHARE, HUB_SHARE = 0.1, 0.0005  # for validation: nanoGPT's, of Shakespeare and openwebtext
NAMED = {
    # of no loading script, for `datasets` runs none; the number as nanoGPT counted it
    "openwebtext": partial(Hub, "Skylion007/openwebtext", rows=8_013_769),
    "fineweb_edu": partial(Hub, "HuggingFaceFW/fineweb-edu", "sample-10BT"),
}
MOST_WORKERS = 128  # tiktoken's own bound on threads that do not wait for each other


def named(name: str) -> Hub:
    """Return the data set of the hub that openwebtext or fineweb_edu stands for."""
    return NAMED[name]()


def sources_of(
    inputs: Sequence[str | Path], config: str | None, split: str | None, column: str | None
) -> list[Source]:
    """Return the files and data sets that inputs name; UserError for what is not there."""
    if not inputs:
        raise UserError("text needs --input=FILE, or a folder of .txt and .md files (see --help)")
    column = column or "text"
    sources: list[Source] = []
    for given in inputs:
        dataset = str(given).removeprefix(HUB)
        if dataset != str(given):
            sources.append(Hub(dataset, config, split or "train", column))
        else:
            sources += find([given], column)
    if not any(isinstance(source, Hub) for source in sources):
        for flag, value in (("config", config), ("split", split)):
            if value is not None:
                raise UserError(f"--{flag}={value} is for data sets of the hub: --input=hf:NAME")
    return list({json.dumps(source.stamp()): source for source in sources}.values())


def stream(
    sources: Sequence[Source],
    called: str,
    tokenizer: str,
    val_share: float | None,
    workers: int | None,
    log: Callable[[str], None],
    live: bool = False,
) -> Stream:
    """Return the text of sources by a tokenizer, as files.write takes it.

    called is what messages and meta.json name the sources by. val_share of the characters, or of
    the documents where there are rows, is for validation; workers threads encode. live rewrites the
    line of progress in place. UserError for text that cannot be used.
    """
    progress = Progress(log, live)
    local = [source for source in sources if isinstance(source, File)]
    share = val_share if val_share is not None else FILES_SHARE if local else HUB_SHARE
    if not 0 < share < 1:
        raise UserError(f"val_share={share} is not a share between 0 and 1, such as 0.01")
    workers = cores() if workers is None else workers
    if not 0 < workers <= MOST_WORKERS:
        raise UserError(f"workers={workers} is not in 1..{MOST_WORKERS}")
    if len(sources) > 1 and len(local) == len(sources):
        log(f"reading {describe(local)}")
    for source in sources:
        if isinstance(source, Hub):
            source.package()  # before any work
    ends, left = True, None
    if len(local) == len(sources) and all(file.is_text for file in local):
        counts = [
            sum(map(len, progress.over(f"counting characters: {file.name}", file.fragments())))
            for file in local
        ]
        sources = [source for source, count in zip(sources, counts, strict=True) if count]
        if not sources:
            if called == local[0].name:
                raise UserError(f"{called} is empty: give a file of text")
            raise UserError(f"{called} has no text: {len(local):,} files, none with a word")
        ends, left = len(sources) > 1, int(sum(counts) * (1 - share))
    # the symbols of a text are those of all of it; else what validation is made of is not looked at
    made = choose(
        tokenizer, partial(_sample, sources, progress, None if tokenizer == "char" else left)
    )
    stamps = [source.stamp() for source in sources]
    identity = json.dumps([stamps, made.to_json(), share, ends])

    def begin(place: Any) -> Iterator[tuple[str, Any, Any]]:
        progress.begin()
        if place is None:
            at = Place(left=left)
        else:
            at, progress.bytes = Place(**place["place"]), place["bytes"]
            progress.documents = at.documents
            log(f"going on after {at.documents:,} documents, {size(progress.bytes)}")
        taken = blocks(sources, cuts_of(made), share, at)
        try:
            yield from encoded(taken, made, ends, workers, progress)
        finally:
            progress.end()

    def summary(tokens: int) -> list[str]:
        lines = [
            f"{progress.documents:,} document{'s' * (progress.documents != 1)}, "
            f"{progress.bytes:,} bytes of text, "
            f"{progress.bytes / tokens:.2f} bytes/token, {progress.seconds():,.1f} seconds"
        ]
        for source in sources:
            if isinstance(source, Hub) and progress.documents < source.rows:
                lines.append(
                    f"{progress.documents:,} documents came, and the whole set has {source.rows:,}"
                )
        return lines

    digest = hashlib.sha256(identity.encode()).hexdigest()
    return Stream(called, made, digest, begin, summary)


def _sample(sources: Sequence[Source], progress: Progress, left: int | None) -> Iterator[str]:
    for source in sources:
        said = f"reading for the tokenizer: {source.name}"
        for fragment in progress.over(said, source.fragments()):
            yield fragment[:left]
            left = None if left is None else max(0, left - len(fragment))
