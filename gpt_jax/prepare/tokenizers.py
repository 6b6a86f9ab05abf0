"""Which tokenizer a text is prepared with."""

from collections.abc import Callable, Iterator

from gpt_jax.errors import UserError
from gpt_jax.tokenizer import Tokenizer, byte_tokenizer, char_tokenizer, tiktoken_tokenizer

TOKENIZERS = ("char", "byte", "gpt2")


def choose(spec: str, sample: Callable[[], Iterator[str]]) -> Tokenizer:
    """Return the tokenizer that spec names; sample() gives the text, in parts, for its symbols."""
    if spec not in TOKENIZERS:
        raise UserError(f"tokenizer={spec!r} is not one of {', '.join(TOKENIZERS)}")
    if spec == "char":
        return char_tokenizer(sorted(set().union(*map(set, sample()))))
    tokenizer = byte_tokenizer() if spec == "byte" else tiktoken_tokenizer("gpt2")
    tokenizer.token_bytes(0)  # with no files for tiktoken, say so before any work
    return tokenizer
