"""Where a long text may be cut before it is encoded, so that its ids are those of the whole."""

import json
import re
from typing import Any

from gpt_jax.tokenizer import Tokenizer

ANYWHERE = re.compile("")
# Tokenizers first split text into words by a pattern. Those of GPT-2, of the later tiktoken
# encodings, of Llama 3 and of Qwen all begin a word here, whatever comes before and after: at a
# line that starts with no blank, when the line before has a last character that is none (a slash
# may belong to the line end before it), and at a single blank between two that are none.
WORD = re.compile(r"(?<=\S\n)(?=[^\s/])|(?<=\S)(?= \S)")
LLAMA = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PATTERNS = (LLAMA % "{1,3}", LLAMA % "")  # Llama 3's and Qwen's, as their tokenizer.json has them


def cuts_of(tokenizer: Tokenizer) -> re.Pattern[str] | None:
    """Return a pattern of the places where a text may be cut; None where none is known."""
    spec = tokenizer.to_json()
    if spec["kind"] in ("char", "byte"):
        return ANYWHERE
    by_words = spec["kind"] == "tiktoken" or (
        spec["kind"] == "huggingface" and _by_words(json.loads(spec["json"]))
    )
    return WORD if by_words else None


def _by_words(data: dict[str, Any]) -> bool:
    """Tell whether a tokenizer.json splits by one of the patterns, and nothing before that."""
    before, normalizer = data.get("pre_tokenizer") or {}, data.get("normalizer")
    first = before["pretokenizers"][0] if before.get("type") == "Sequence" else before
    if normalizer not in (None, {"type": "NFC"}):
        return False  # NFC joins nothing to a blank or a line end
    if not all(token["special"] for token in data.get("added_tokens") or []):
        return False  # one that is not may hold blanks
    if first.get("type") == "Split":
        isolated = first.get("behavior") == "Isolated" and not first.get("invert")
        return isolated and first.get("pattern") in [{"Regex": pattern} for pattern in PATTERNS]
    return (
        first.get("type") == "ByteLevel"
        and first.get("use_regex", True)
        and not first.get("add_prefix_space", True)
    )
