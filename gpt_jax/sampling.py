"""Text from a model: one prefill over the prompts, then a jitted loop with a key-value cache."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from gpt_jax.errors import UserError
from gpt_jax.kernels import decode as kernels
from gpt_jax.model import GPT, Cache, new_cache

STREAM_CHUNK = 8  # tokens from one look at the text to the next
PROMPT_MULTIPLE = 64  # prompts are padded to a multiple, so that few lengths are compiled for


@dataclass(frozen=True)
class Rule:
    """How the next token is drawn; hashable, so that a compiled loop is made once for each."""

    temperature: float = 1.0  # 0 takes the likeliest
    top_k: int = 0  # 0 keeps all
    top_p: float = 1.0
    stop_tokens: tuple[int, ...] = ()

    def __post_init__(self):
        if not (self.temperature >= 0 and self.top_k >= 0 and 0 < self.top_p <= 1):
            raise UserError(
                f"temperature={self.temperature}, top_k={self.top_k}, top_p={self.top_p}: "
                "the first two must be at least 0, top_p above 0 and at most 1"
            )


class Decoding(NamedTuple):
    """What decoding goes on from: rows of text, how far each has come, and what follows."""

    tokens: Array  # int32 (B, N): prompt and text, then zeros
    lengths: Array  # int32 (B,)
    done: Array  # bool (B,): a stop token has come
    logits: Array  # float32 (B, V) of the token that follows
    cache: Cache
    keys: Array  # (B,)
    weights: Any  # as the decoding kernels read them, or None: the plain network decodes


def next_token(logits: Array, keys: Array, rule: Rule, n_tokens=0, fused=False) -> Array:
    """Return a token a row, int32 (B,), from logits (B, V) with a key a row.

    nanoGPT's order: temperature, then top-k, which keeps every logit that ties with the k-th; then
    top-p (Holtzman et al. 2020), the fewest tokens that hold that much of what is left. Ids from
    ``n_tokens`` on, if it is not 0, only pad the vocabulary and are never drawn. ``fused`` draws
    in a kernel where there is one for the rule.
    """
    V, k = logits.shape[-1], rule.top_k
    if fused and rule.temperature > 0 and 0 < k < V and rule.top_p == 1 and kernels.can_draw(keys):
        return kernels.draw_top_k(logits, keys, rule.temperature, k, n_tokens)
    if n_tokens:
        logits = jnp.where(jnp.arange(V)[None] < n_tokens, logits, -jnp.inf)
    if rule.temperature == 0:
        return logits.argmax(-1).astype(jnp.int32)
    logits = logits / rule.temperature
    if 0 < k < V:
        least = jax.lax.top_k(logits, k)[0][:, -1:]
        logits = jnp.where(logits >= least, logits, -jnp.inf)
    if rule.top_p < 1:
        ordered = jnp.sort(logits, axis=-1, descending=True)
        probs = jax.nn.softmax(ordered, axis=-1)
        needed = probs.cumsum(-1) - probs < rule.top_p  # what comes before does not yet suffice
        least = jnp.where(needed, ordered, jnp.inf).min(-1, keepdims=True)
        logits = jnp.where(logits >= least, logits, -jnp.inf)
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


@partial(jax.jit, static_argnums=(0, 4, 6))
def prefill(model, params, prompts, lengths, room: int, keys, fused: bool = False) -> Decoding:
    """Return the Decoding that follows prompts (B, P) of the given lengths, up to ``room`` tokens.

    A prompt longer than block_size is read through its last block_size tokens. With ``fused`` the
    decoding kernels go on from it.
    """
    c, (B, P) = replace(model.config, scan_layers=True), prompts.shape  # compiled in a third
    tokens = jnp.zeros((B, room), jnp.int32).at[:, :P].set(prompts)
    P = min(P, c.block_size)
    # what pads a short prompt is cached too, in slots that no query sees before they are rewritten
    positions = jnp.broadcast_to(jnp.arange(P), (B, P))
    cache, last = new_cache(c, B, min(room, c.block_size)), jnp.minimum(lengths, P) - 1
    read = partial(model.clone(config=c).apply, {"params": params}, method="next_logits")
    logits, cache = read(read_window(tokens, lengths, P), last, positions, cache)
    weights, cache = kernels.prepare(c, params, cache) if fused else (None, cache)
    return Decoding(tokens, lengths, jnp.zeros(B, bool), logits, cache, keys, weights)


def read_window(tokens: Array, lengths: Array, width: int) -> Array:
    """Return each row's last ``width`` tokens (B, width); a shorter row is filled up."""
    first = jnp.maximum(lengths - width, 0)
    return jnp.take_along_axis(tokens, first[:, None] + jnp.arange(width)[None], axis=1)


@partial(jax.jit, static_argnums=(0, 4), donate_argnums=2)
def decode(model: GPT, params: Any, state: Decoding, steps: Array, rule: Rule) -> Decoding:
    """Return the state up to ``steps`` tokens on; ends early when every row has stopped.

    While all texts fit block_size a step costs one position, through the cache. Beyond it every
    learned position would shift, so the last block_size tokens are read anew each step: this is
    nanoGPT's crop, and gives the text it gives.
    """
    c, room, weights = model.config, state.tokens.shape[1], state.weights
    S = c.block_size
    read: Any = partial(model.apply, {"params": params}, method="next_logits")
    step = partial(kernels.next_logits, c, params, weights) if weights else read

    def cached(tokens, lengths, cache):
        last = lengths[:, None] - 1
        return step(jnp.take_along_axis(tokens, last, 1), jnp.zeros_like(lengths), last, cache)

    def windowed(tokens, lengths, cache):
        return read(read_window(tokens, lengths, S), jnp.minimum(lengths, S) - 1)[0], cache

    def append(carry, forward, most):
        tokens, lengths, done, logits, cache, keys, _ = carry
        new_keys, on = jax.vmap(jax.random.fold_in)(keys, lengths), goes_on(carry, most)
        token = next_token(logits, new_keys, rule, c.n_tokens, weights is not None)
        here = on[:, None] & (jnp.arange(room)[None] == lengths[:, None])
        tokens = jnp.where(here, token[:, None], tokens)
        lengths += on
        done |= on & (token[:, None] == np.array(rule.stop_tokens, np.int32)[None]).any(1)
        logits, cache = forward(tokens, lengths, cache)
        return Decoding(tokens, lengths, done, logits, cache, keys, None)

    def goes_on(carry, most):  # row by row
        return ~carry.done & (carry.lengths < ends) & (carry.lengths.max() < most)

    # A GPU waits for the host to read a while loop's condition, but not for a loop of known length.
    # A step too many changes nothing: it comes upon the same position again.
    def run(carry, forward, most, chunk):
        return jax.lax.while_loop(
            lambda carry: goes_on(carry, most).any(),
            lambda carry: jax.lax.fori_loop(0, chunk, lambda _, x: append(x, forward, most), carry),
            carry,
        )

    ends, carry = state.lengths + steps, state._replace(weights=None)
    carry = run(carry, cached, min(S, room), STREAM_CHUNK if weights else 1)
    return (run(carry, windowed, room + 1, 1) if room > S else carry)._replace(weights=weights)


def start(
    model: GPT, params: Any, prompts: Sequence[Sequence[int]], keys: Array, max_new_tokens: int
) -> Decoding:
    """Return the Decoding of prompts of any lengths, with room for ``max_new_tokens`` more.

    Raises UserError for an empty prompt and for an id that the model does not have.
    """
    lengths = [len(prompt) for prompt in prompts]
    if max_new_tokens < 0:
        raise UserError(f"max_new_tokens={max_new_tokens} is negative: give it 0 or more")
    if not prompts or min(lengths) == 0:
        raise UserError("the prompt has no tokens: give it at least one, a newline for example")
    padded = -(-max(lengths) // PROMPT_MULTIPLE) * PROMPT_MULTIPLE
    tokens = np.zeros((len(prompts), padded), np.int64)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = np.asarray(prompt)
    known = model.config.n_tokens or model.config.vocab_size
    if tokens.min() < 0 or tokens.max() >= known:
        bad = int(tokens.min() if tokens.min() < 0 else tokens.max())
        raise UserError(f"the prompt holds token {bad}, the model knows 0 to {known - 1}")
    room = padded + -(-max_new_tokens // PROMPT_MULTIPLE) * PROMPT_MULTIPLE
    fused = kernels.can_decode(model.config, params)
    return prefill(model, params, np.int32(tokens), np.array(lengths, np.int32), room, keys, fused)


def generate(
    model: GPT,
    params: Any,
    tokens: Sequence[Any],
    *,
    key: Array,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    stop_tokens: Sequence[int] = (),
) -> list[Any]:
    """Return the prompt and its continuation, ids; for a list of prompts, a list of such lists.

    The prompts of a list may differ in length. ``key`` is one key, from which each row's follows,
    or an array of a key a row; a row's key gives it the same text in any batch. temperature 0 takes
    the likeliest token. A row ends after max_new_tokens, or with a stop token, which it keeps.
    Raises UserError for an empty prompt, an unknown id, or a setting out of range.
    """
    single = len(tokens) == 0 or np.ndim(tokens[0]) == 0
    prompts = [tokens] if single else tokens
    if key.ndim == 0:
        rows = jnp.arange(len(prompts))
        key = key[None] if single else jax.vmap(jax.random.fold_in, (None, 0))(key, rows)
    rule = Rule(temperature, top_k or 0, top_p, tuple(stop_tokens))
    state = start(model, params, prompts, key, max_new_tokens)
    state = decode(model, params, state, jnp.int32(max_new_tokens), rule)
    rows, lengths = jax.device_get((state.tokens, state.lengths))
    texts = [row[:n].tolist() for row, n in zip(rows, lengths, strict=True)]
    return texts[0] if single else texts


def stream(
    model: GPT, params: Any, prompt: Sequence[int], *, key: Array, max_new_tokens: int, **rule: Any
) -> Iterator[list[int]]:
    """Yield the continuation of one prompt, a few ids at a time: generate's, for the same key."""
    rule |= {"top_k": rule.get("top_k") or 0, "stop_tokens": tuple(rule.get("stop_tokens", ()))}
    state = start(model, params, [prompt], key[None], max_new_tokens)
    shown, end = len(prompt), len(prompt) + max_new_tokens
    while shown < end and not state.done[0]:
        steps = jnp.int32(min(STREAM_CHUNK, end - shown))
        state = decode(model, params, state, steps, Rule(**rule))
        yield (new := np.asarray(state.tokens[0, shown : int(state.lengths[0])]).tolist())
        shown += len(new)
