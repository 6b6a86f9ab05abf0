"""The network: GPT-2 as nanoGPT writes it, with nanoGPT's parameter names.

Axis letters, here and in every einsum, comment and test (JAX's own docs say N for heads and H for
the size of one; nanoGPT's readers know them as below):

    B batch   T query positions   S key positions   C embedding   H heads   D head size
    F MLP width   V vocabulary   L layers   A accumulation steps
"""

import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from gpt_jax import kernels
from gpt_jax.attention import attention, cached_attention, drop
from gpt_jax.config import GPTConfig
from gpt_jax.errors import UserError
from gpt_jax.kernels import float8, layer_norm
from gpt_jax.kernels.gelu import gelu
from gpt_jax.loss import cross_entropy_of_projection, project


class Cache(NamedTuple):
    """Keys and values of the positions so far: (L, B, S, H, D) each; a layer's lack the L."""

    k: Array
    v: Array


def new_cache(config: GPTConfig, batch: int, slots: int = 0) -> Cache:
    """Return an empty cache for ``batch`` rows of ``slots`` positions, or of block_size."""
    head_size = config.n_embd // config.n_head
    shape = (config.n_layer, batch, slots or config.block_size, config.n_head, head_size)
    return Cache(jnp.zeros(shape, config.dtype), jnp.zeros(shape, config.dtype))


class Linear(nn.Module):
    """A product with a weight of shape ``inputs + outputs``, in ``config.dtype``, plus a bias.

    ``parts`` other than 1 is the length of the weight's second axis: each entry has its own product
    in the list that is returned. q, k and v then need no slices, their gradients no concatenation.
    x is the input of all products, or a list of one for each.
    """

    config: GPTConfig
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    std: float = 0.02
    parts: int = 1

    @nn.compact
    def __call__(self, x: Any) -> Any:
        c = self.config
        xs = x if isinstance(x, list) else [x]
        shape = *xs[0].shape[: -len(self.inputs)], *self.outputs[self.parts > 1 :]
        weight = self.param("weight", nn.initializers.normal(self.std), self.inputs + self.outputs)
        weight = weight.astype(c.dtype).reshape(math.prod(self.inputs), self.parts, -1)
        # as products of two matrices: over more axes XLA's CPU backend transposes by the element
        xs = [x.astype(c.dtype).reshape(-1, len(weight)) for x in xs]
        in_8_bits = c.matmul_dtype == "float8" and not self.is_initializing()
        ys = float8.products(xs[0], weight) if in_8_bits else products(xs, weight)
        if c.bias:
            bias = self.param("bias", nn.initializers.zeros, self.outputs).astype(c.dtype)
            ys = [y + b for y, b in zip(ys, bias.reshape(len(ys), 1, -1), strict=True)]
        return [y.reshape(shape) for y in ys] if self.parts > 1 else ys[0].reshape(shape)


def products(xs: list[Array], weight: Array) -> list[Array]:
    """Return x (M, K), of one or of P, times each weight[:, i] of (K, P, N).

    float32 means it, on TPUs and Hopper too.
    """
    exact = jax.lax.Precision.HIGHEST if weight.dtype == jnp.float32 else None
    xs = xs * (weight.shape[1] // len(xs))
    return [jnp.dot(x, weight[:, i], precision=exact) for i, x in enumerate(xs)]


class LayerNorm(nn.Module):
    """Add y to the stream x, and normalise: returns x + y, then that normed, once for each use."""

    config: GPTConfig
    uses: int = 1

    @nn.compact
    def __call__(self, x: Array, y: Array | None = None) -> tuple[Array, ...]:
        c, shape = self.config, (self.config.n_embd,)
        weight = self.param("weight", nn.initializers.ones, shape)
        bias = self.param("bias", nn.initializers.zeros, shape) if c.bias else None
        norm = layer_norm.fused if kernels.use(c.kernels, c.dtype) else layer_norm.reference
        return norm(x, y, weight, bias, self.uses)


class Embedding(nn.Module):
    """A table of ``rows`` vectors of C, looked up by id."""

    config: GPTConfig
    rows: int

    def setup(self):
        shape = (self.rows, self.config.n_embd)
        self.weight = self.param("weight", nn.initializers.normal(0.02), shape)

    def __call__(self, ids: Array) -> Array:
        return jnp.asarray(self.weight)[ids]  # numpy cannot be indexed by a traced array


def dropped(x: Array, rate: float, key: Any) -> Array:
    """Return x with dropout, or as it is where there is no key."""
    return x if key is None else drop(x, rate, key)


class CausalSelfAttention(nn.Module):
    """Multi-head attention; with a cache, the new positions also see the cached ones.

    Of two keys, the probabilities drop by one and the output by the other.
    """

    config: GPTConfig

    @nn.compact
    def __call__(self, x: list[Array], positions: Array, cache: Cache | None, keys: list):
        c = self.config
        heads = (c.n_head, c.n_embd // c.n_head)
        # (C, 3, H, D) keeps q, k and v of a head together, so that heads can be sharded
        q, k, v = Linear(c, (c.n_embd,), (3, *heads), parts=3, name="c_attn")(x)  # (B, T, H, D)
        if cache is not None:
            rows = jnp.arange(len(q))[:, None]
            k, v = cache.k.at[rows, positions].set(k), cache.v.at[rows, positions].set(v)
            cache = Cache(k, v)
            y = cached_attention(q, k, v, positions)
        else:
            how = {} if keys[0] is None else {"dropout": c.dropout, "key": keys[0]}
            y = attention(q, k, v, backend=c.attention, kernels=c.kernels, **how)
        std = 0.02 / math.sqrt(2 * c.n_layer)
        y = Linear(c, heads, (c.n_embd,), std, name="c_proj")(y)
        return dropped(y, c.dropout, keys[1]), cache


class MLP(nn.Module):
    """Two products with a GELU between."""

    config: GPTConfig

    @nn.compact
    def __call__(self, x: Array, key: Any) -> Array:
        c = self.config
        x = Linear(c, (c.n_embd,), (4 * c.n_embd,), name="c_fc")(x)
        x = gelu(x, c.activation == "gelu_tanh", c.kernels)
        std = 0.02 / math.sqrt(2 * c.n_layer)
        x = Linear(c, (4 * c.n_embd,), (c.n_embd,), std, name="c_proj")(x)
        return dropped(x, c.dropout, key)


class Block(nn.Module):
    """x += attention(norm(x)); x += mlp(norm(x)); x is the residual stream.

    ``keys`` are those of a layer's three dropouts, or three None for none.
    """

    config: GPTConfig

    @nn.compact
    def __call__(self, x: Array, cache: Cache | None, keys: list, positions: Array):
        c = self.config
        uses = 3 if c.matmul_dtype == "auto" else 1  # q, k and v; in 8 bits they are one product
        x, *normed = LayerNorm(c, uses, name="ln_1")(x)
        y, cache = CausalSelfAttention(c, name="attn")(normed, positions, cache, keys[:2])
        x, normed = LayerNorm(c, name="ln_2")(x, y)
        return x + MLP(c, name="mlp")(normed, keys[2]), cache


class GPT(nn.Module):
    """The language model: token ids in, logits of the next token out."""

    config: GPTConfig

    def setup(self):
        c = self.config
        block = Block
        if c.remat != "none":
            keep = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
            policy = keep if c.remat == "dots" else None
            # inside an unrolled loop XLA would merge the recomputation away if it were let to
            prevent_cse = not c.scan_layers
            block = nn.remat(Block, policy=policy, prevent_cse=prevent_cse)
        self.wte = Embedding(c, c.vocab_size)
        self.wpe = Embedding(c, c.block_size)
        self.h = nn.scan(
            block,
            variable_axes={"params": 0},  # every weight of a layer gets a leading L
            split_rngs={"params": True},
            in_axes=(0, 0, nn.broadcast),  # pyright: ignore[reportArgumentType]
            length=c.n_layer,
            unroll=1 if c.scan_layers else c.n_layer,
        )(c)
        self.ln_f = LayerNorm(c)

    def features(self, tokens: Array, positions=None, cache=None, deterministic: bool = True):
        """Return the final features (B, T, C) of ``tokens`` (B, T), and the cache."""
        if tokens.shape[1] > self.config.block_size:
            raise UserError(
                f"Cannot forward sequence of length {tokens.shape[1]}, "
                f"block size is only {self.config.block_size}"
            )
        if positions is None:
            positions = jnp.arange(tokens.shape[1])[None]
        c, key, keys = self.config, None, [None] * 3
        if c.dropout and not deterministic:
            # all at once: one made of another takes a kernel of its own on a GPU
            keys = jax.random.split(self.make_rng("dropout"), 1 + 3 * c.n_layer)
            key, keys = keys[0], list(keys[1:].reshape(3, -1))
        x = dropped(self.wte(tokens) + self.wpe(positions), c.dropout, key)
        # the residual stream: float16's range would not suffice
        x = x.astype("bfloat16" if c.dtype == "bfloat16" else "float32")
        x, cache = self.h(x, cache, keys, positions)
        return self.ln_f(x)[1], cache

    def __call__(self, tokens: Array, deterministic: bool = True) -> Array:
        """Return the logits, float32 (B, T, V), of ``tokens``, int32 (B, T) with T <= block_size.

        ``deterministic=False`` turns dropout on and needs ``rngs={"dropout": key}``.
        Radford et al. 2019, "Language Models are Unsupervised Multitask Learners".
        """
        x, _ = self.features(tokens, deterministic=deterministic)
        return project(x, self.wte.weight, self.config.dtype)

    def loss(self, tokens: Array, targets: Array, deterministic: bool = True) -> Array:
        """Return the mean cross-entropy in nats/token; targets (B, T) of -1 are left out."""
        total, count = self.total_loss(tokens, targets, deterministic)
        return total / jnp.maximum(count, 1)

    def total_loss(self, tokens, targets, deterministic: bool = True, devices: int = 1):
        """Return the summed cross-entropy in nats, and the number of targets it counts.

        ``devices`` is the number of those that share the rows and the vocabulary.
        """
        x, _ = self.features(tokens, deterministic=deterministic)
        dtype = self.config.dtype
        return cross_entropy_of_projection(
            x, self.wte.weight, targets, dtype, devices=devices, backend=self.config.kernels
        )

    def next_logits(self, tokens: Array, last: Array, positions=None, cache=None):
        """Return the logits, float32 (B, V), at index ``last`` (B,) of each row, and the cache."""
        x, cache = self.features(tokens, positions, cache)
        x = jnp.take_along_axis(x, last[:, None, None], axis=1)
        return project(x, self.wte.weight, self.config.dtype)[:, 0], cache


def count_params(params: Any, non_embedding: bool = True) -> int:
    """Return the number of parameters; as nanoGPT reports it, without the position embedding."""
    total = sum(x.size for x in jax.tree.leaves(params))
    return total - params["wpe"]["weight"].size if non_embedding else total
