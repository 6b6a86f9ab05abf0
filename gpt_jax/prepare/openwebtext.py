"""OpenWebText by GPT-2's encoding, streamed: memory stays small and no copy of the text is kept.

Which documents are for validation is decided by a hash of nanoGPT's seed and the document's
number. The share is nanoGPT's 0.0005; the documents are not the same ones, for those hang on a
shuffle of the whole set.
"""

import hashlib
import itertools
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from gpt_jax.errors import UserError
from gpt_jax.prepare.files import Corpus
from gpt_jax.tokenizer import tiktoken_tokenizer

NAME = "Skylion007/openwebtext"
DOCUMENTS = 8_013_769  # as nanoGPT counted them
VAL_SHARE, SEED = 0.0005, 2357
BATCH = 1024  # documents encoded at a time
PROGRESS_SECONDS = 10


def is_val(index: int) -> bool:
    """Tell whether the document of this number is for validation."""
    digest = hashlib.sha256(f"{SEED} {index}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < VAL_SHARE * 2**64


def corpus(log: Callable[[str], None]) -> Corpus:
    """Return OpenWebText, each document ended by GPT-2's end of text."""
    try:
        import datasets  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UserError(
            "openwebtext needs the package datasets: pip install 'gpt_jax[data]'"
        ) from error
    tokenizer = tiktoken_tokenizer("gpt2")
    tokenizer.token_bytes(0)  # with no files for tiktoken, say so before any work
    try:
        rows = datasets.load_dataset(NAME, split="train", streaming=True)
    except Exception as error:  # the package raises its own, the network's and the disk's
        raise UserError(f"cannot load {NAME} ({_line(error)}): check the network") from error
    return Corpus(NAME, tokenizer, _pieces(rows, tokenizer, log))


def _pieces(rows: Any, tokenizer: Any, log: Callable[[str], None]) -> Iterator[tuple[str, Any]]:
    log("openwebtext: this takes hours; interrupted, it starts again from the first document")
    texts = _texts(rows)
    start = said = time.monotonic()
    documents = tokens = 0
    with ThreadPoolExecutor(os.cpu_count()) as threads:  # tiktoken lets other threads run
        while batch := list(itertools.islice(texts, BATCH)):
            for ids in threads.map(tokenizer.encode_ordinary, batch):
                yield "val" if is_val(documents) else "train", [*ids, tokenizer.end_of_text]
                documents, tokens = documents + 1, tokens + len(ids) + 1
            now = time.monotonic()
            if now - said >= PROGRESS_SECONDS:
                said, rate = now, tokens / max(now - start, 1e-9)
                log(
                    f"openwebtext: {documents:,} documents, {tokens:,} tokens, {rate:,.0f} tokens/s"
                )
    if documents < DOCUMENTS:
        log(f"openwebtext: {documents:,} documents came, and the whole set has {DOCUMENTS:,}")


def _texts(rows: Any) -> Iterator[str]:
    count = 0
    try:
        for row in rows:
            yield row["text"]
            count += 1
    except Exception as error:
        raise UserError(
            f"{NAME} stopped after {count:,} documents ({_line(error)}): run again, from the start"
        ) from error


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]
