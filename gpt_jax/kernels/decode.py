"""Decoding on one NVIDIA GPU: one new position of each row, in few kernels that read little.

A new token of a few rows costs what its bytes cost: every weight is read once. So the weights are
laid out once, in 16 bits and a row for each output, and a layer is five kernels: LayerNorm and
c_attn; attention, which writes its key and value into the cache in place; c_proj and the residual;
LayerNorm, c_fc and GELU; c_proj and the residual. The head is one kernel, and two draw the token.
With more than ``FEW`` rows the products are XLA's.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import pallas as pl

from gpt_jax.config import GPTConfig
from gpt_jax.kernels import barrier, launch, power_of_2, triton, use
from gpt_jax.kernels.gelu import gelu
from gpt_jax.model import Cache

FEW = 4  # rows up to which a product is bound by reading its weight, and not by arithmetic
PROGRAMS = 264  # of a grid, at least: two for each of Hopper's multiprocessors, all must read
TILE = 8192  # weights of a program, all asked for at once: 64 a thread
SLOTS = 128  # of the cache, read at once
SPLITS = 8  # programs that share a row's slots of a head, at most
DRAWN = 32  # logits of a tile
TOGETHER = 32  # tiles of a program that finds their maxima
STEPS = 32  # values tried at once on the way to the k-th largest
SEARCHED = 8192  # logits of tiles with candidates, looked at once
CANDIDATES = 1024  # that are drawn from at once
DRAW_WARPS = 16


class Product(NamedTuple):
    """A weight, 16 bits (outputs, inputs), and what is added, float32 (outputs,) or None.

    Where LayerNorm comes first its scale is in the weight and its shift in the bias, and ``sums``
    are those of the weight's rows: W (x - mean) / s = (W x - mean sums) / s, so that a program
    need not know the mean before it multiplies.
    """

    weight: Array
    bias: Array | None
    sums: Array | None = None


class Layer(NamedTuple):
    """A layer's products; LayerNorm is part of the first and the third."""

    c_attn: Product
    attn_proj: Product
    c_fc: Product
    mlp_proj: Product


class Weights(NamedTuple):
    """What a decoding step reads in place of params: the layers, and wte after ln_f."""

    layers: tuple[Layer, ...]
    head: Product


def can_decode(config: GPTConfig, params: Any) -> bool:
    """Return whether these kernels are used: where all the others are, if all is on one device."""
    arrays = [x for x in jax.tree.leaves(params) if isinstance(x, Array)]
    return use(config.kernels, config.dtype) and all(len(x.devices()) == 1 for x in arrays)


def lay_out(config: GPTConfig, params: Any) -> Weights:
    """Return params as decoding reads them."""
    h = params["h"]

    def product(weight: Array, bias: Array | None, norm: Any = None) -> Product:
        bias = None if bias is None else bias.reshape(-1).astype(jnp.float32)
        if norm is None:
            return Product(weight.astype(config.dtype), bias)
        if "bias" in norm:
            shift = jnp.einsum("nk,k->n", weight, norm["bias"], precision="highest")
            bias = shift if bias is None else bias + shift
        weight = (weight * norm["weight"][None]).astype(config.dtype)
        return Product(weight, bias, weight.astype(jnp.float32).sum(1))

    def of_layer(i: int, module: Any, inputs: int, norm: Any = None) -> Product:
        module, norm = jax.tree.map(lambda x: x[i], (module, norm))
        return product(module["weight"].reshape(inputs, -1).T, module.get("bias"), norm)

    C = config.n_embd
    layers = tuple(
        Layer(
            of_layer(i, h["attn"]["c_attn"], C, h["ln_1"]),
            of_layer(i, h["attn"]["c_proj"], C),
            of_layer(i, h["mlp"]["c_fc"], C, h["ln_2"]),
            of_layer(i, h["mlp"]["c_proj"], 4 * C),
        )
        for i in range(config.n_layer)
    )
    return Weights(layers, product(params["wte"]["weight"], None, params["ln_f"]))


def unstack(cache: Cache) -> Cache:
    """Return a cache of (L, B, S, H, D) as one of L arrays, each of which is written in place."""
    return Cache(*(tuple(x[i] for i in range(x.shape[0])) for x in cache))  # pyright: ignore


def prepare(config: GPTConfig, params: Any, cache: Cache) -> tuple[Weights, Cache]:
    """Return what ``next_logits`` reads and writes: made once a text."""
    return lay_out(config, params), unstack(cache)


def next_logits(
    config: GPTConfig,
    params: Any,
    weights: Weights,
    tokens: Array,
    last: Array,
    positions: Array,
    cache: Cache,
) -> tuple[Array, Cache]:
    """Return GPT.next_logits of one token a row: logits float32 (B, V), and the cache.

    tokens and positions are int32 (B, 1), ``last`` is all zeros, the cache is ``prepare``'s.
    """
    tokens, positions = tokens[:, 0], positions[:, 0]
    product = product_for(len(tokens))
    # these are read a row at a time, so that float32 costs nothing
    x = params["wte"]["weight"][tokens] + params["wpe"]["weight"][positions]
    keys, values = [], []
    for layer, k, v in zip(weights.layers, *cache, strict=True):
        x, k, v = block(config, layer, x, k, v, positions)
        keys.append(k)
        values.append(v)
    cache = Cache(tuple(keys), tuple(values))  # pyright: ignore
    return product(x, weights.head, dtype=jnp.float32), cache


@partial(jax.jit, static_argnums=0)  # traced and lowered once, not once a layer
def block(
    config: GPTConfig, layer: Layer, x: Array, k: Array, v: Array, positions: Array
) -> tuple[Array, Array, Array]:
    """Return model.Block of one position a row: x float32 (B, C), and the layer's cache."""
    product = product_for(len(x))
    activation = "tanh" if config.activation == "gelu_tanh" else "erf"
    qkv = product(x, layer.c_attn)
    y, k, v = attend(qkv, k, v, positions)
    x = product(y, layer.attn_proj, residual=x)
    y = product(x, layer.c_fc, activation=activation)
    return product(y, layer.mlp_proj, residual=x), k, v


# ---- products ----


def product_for(rows: int) -> Any:
    """Return ``linear`` or ``plain_linear``, whichever is faster for that many rows."""
    return linear if rows <= FEW else plain_linear


class Parts(NamedTuple):
    """Attention's result in pieces, float32: sums (B, n, C), and their maxima and weights."""

    sums: Array
    maxima: Array  # (B, n, H)
    weights: Array  # (B, n, H)


def joined(parts: Parts) -> Array:
    """Return the attention, float32 (B, C), that the parts make up."""
    B, n, C = parts.sums.shape
    scale = jnp.exp(parts.maxima - parts.maxima.max(1, keepdims=True))
    sums = parts.sums.reshape(B, n, parts.maxima.shape[2], -1) * scale[..., None]
    return (sums.sum(1) / (parts.weights * scale).sum(1)[..., None]).reshape(B, C)


def plain_linear(
    x: Array | Parts,
    product: Product,
    activation: str = "",
    residual: Array | None = None,
    dtype: Any = None,
) -> Array:
    """Return a product of x, normalised or joined before it, as the network does it.

    Computed in the weight's dtype, and returned in ``dtype`` if there is one. A residual, float32
    (B, N), is added; the result is then float32 too.
    """
    weight, bias, sums = product
    x = joined(x) if isinstance(x, Parts) else x
    if sums is not None:
        x -= x.mean(-1, keepdims=True)
        x *= jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-5)
    exact = jax.lax.Precision.HIGHEST if weight.dtype == jnp.float32 else None
    y = jnp.einsum("bk,nk->bn", x.astype(weight.dtype), weight, precision=exact)
    y = y if bias is None else y + bias.astype(y.dtype)[None]
    y = gelu(y, activation == "tanh") if activation else y
    return y.astype(dtype or y.dtype) if residual is None else residual + y


def linear(
    x: Array | Parts,
    product: Product,
    activation: str = "",
    residual: Array | None = None,
    dtype: Any = None,
) -> Array:
    """Return plain_linear's result for a few rows, in one kernel that reads the weight once."""
    weight, *added = product
    N, K = weight.shape
    width = power_of_2(K)
    height = max(1, min(TILE // width, 1 << max(0, (N // PROGRAMS).bit_length() - 1)))
    inputs = list(x) if isinstance(x, Parts) else [x]
    B, n = inputs[0].shape[0], len(inputs)
    given = [*added, residual]
    kernel = partial(
        linear_kernel, inputs=n, given=[x is not None for x in given],
        width=width, height=height, activation=activation,
    )  # fmt: skip
    dtype = dtype or (weight.dtype if residual is None else jnp.float32)
    return launch(
        kernel,
        grid=(pl.cdiv(N, height),),
        out_shape=jax.ShapeDtypeStruct((B, N), dtype),
        warps=4,
        name=f"linear_{N}_of_{K}",
    )(weight, *inputs, *(x for x in given if x is not None))


def linear_kernel(weight, *refs, inputs, given, width, height, activation):
    """Compute ``height`` outputs of every row."""
    x, refs = refs[:inputs], list(refs[inputs:])
    out = refs.pop()
    bias, sums, residual = (refs.pop(0) if there else None for there in given)
    N, K = weight.shape
    rows, columns = pl.program_id(0) * height + jnp.arange(height), jnp.arange(width)
    inside, real = rows < N, columns < K
    # asked for before anything else is waited for; a weight is read once and by one program
    tile = triton.load(
        weight.at[rows[:, None], columns[None, :]], mask=inside[:, None] & real[None, :],
        other=0, eviction_policy="evict_first",
    ).astype(jnp.float32)  # fmt: skip
    bias, sums = (load_some(ref, (), rows, inside) for ref in (bias, sums))
    for b in range(x[0].shape[0]):
        more = load_some(residual, (b,), rows, inside)
        read = partial(join_parts, x, b) if inputs == 3 else partial(load_some, x[0], (b,))
        y = read(columns, real).astype(jnp.float32)
        if sums is None:
            y = (tile * y.astype(weight.dtype).astype(jnp.float32)[None, :]).sum(1)
        else:
            # less some number of its own: a mean far from 0 would leave its variance few digits
            y = jnp.where(real, y - x[0][b, 0], 0)
            mean, squares = y.sum() / K, (y * y).sum() / K
            y = (tile * y[None, :]).sum(1) - mean * sums
            y *= jax.lax.rsqrt(squares - mean * mean + 1e-5)
        y = finished(y, bias, activation, more, weight.dtype)
        triton.store(out.at[b, rows], y.astype(out.dtype), mask=inside)


def load_some(ref, at, places, there) -> Any:
    """Return a ref's values at ``(*at, places)``, zero where there are none; None for None."""
    return None if ref is None else triton.load(ref.at[*at, places], mask=there, other=0)


def finished(y, bias, activation, residual, dtype):
    """Return what becomes of a product y in float32, in ``dtype`` or with the residual added."""
    y = y if bias is None else y + bias
    if activation:
        y = 0.5 * y * (1 + (tanh_of_gelu(y) if activation == "tanh" else erf(y * 0.5**0.5)))
    return y.astype(dtype) if residual is None else y + residual


def join_parts(parts, b, columns, real) -> Any:
    """Return ``joined`` of row b, inside a kernel."""
    sums, maxima, weights = parts
    *_, n, C = sums.shape
    heads = columns // (C // maxima.shape[-1])
    load = partial(triton.load, mask=real)
    each = [  # all are asked for before the first is waited for
        (load(maxima.at[b, i, heads], other=0), load(sums.at[b, i, columns], other=0),
         load(weights.at[b, i, heads], other=1))
        for i in range(n)
    ]  # fmt: skip
    top = each[0][0]
    for maximum, _, _ in each[1:]:
        top = jnp.maximum(top, maximum)
    scales = [jnp.exp(maximum - top) for maximum, _, _ in each]
    total = sum(scale * part for scale, (_, part, _) in zip(scales, each, strict=True))
    return total / sum(scale * part for scale, (_, _, part) in zip(scales, each, strict=True))


def tanh_of_gelu(x):
    """Return the tanh in GELU's approximation (Hendrycks & Gimpel 2016)."""
    return jnp.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x))


def erf(x):
    """Compute the error function to 1.5e-7 (Abramowitz & Stegun 7.1.26).

    Pallas has no lowering of jax.lax.erf for Triton.
    """
    t = 1 / (1 + 0.3275911 * jnp.abs(x))
    p = ((1.061405429 * t - 1.453152027) * t + 1.421413741) * t - 0.284496736
    y = 1 - (p * t + 0.254829592) * t * jnp.exp(-x * x)
    return jnp.where(x < 0, -y, y)


# ---- attention ----


def attend(qkv: Array, k: Array, v: Array, positions: Array) -> tuple[Parts, Array, Array]:
    """Return cached attention of one position a row, in parts, and the cache with it written in.

    qkv is (B, 3C), k and v are (B, S, H, D), positions int32 (B,). A row's programs read the slots
    up to its position and no others; each takes a share of them (Dao et al. 2023, "Flash-Decoding
    for long-context inference").
    """
    B, S, H, D = k.shape
    blocks = pl.cdiv(S, SLOTS)
    n = min(SPLITS, blocks, pl.cdiv(4 * PROGRAMS, B * H))
    share = pl.cdiv(blocks, n) * SLOTS
    shapes = [(B, n, H * D), (B, n, H), (B, n, H)]
    *parts, k, v = launch(
        partial(attend_kernel, share=share, width=power_of_2(D)),
        grid=(H, n, B),
        out_shape=[
            *(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes),
            *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (k, v)),
        ],
        input_output_aliases={2: 3, 3: 4},
        warps=4,
        stages=2,
        name="attend",
    )(positions, qkv.reshape(B, 3, H, D), k, v)
    return Parts(*parts), k, v


def attend_kernel(positions, qkv, k_in, v_in, sums, maxima, weights, k_out, v_out, *, share, width):
    """Attend to a share of one row's slots, for one head."""
    h, s, b = (pl.program_id(i) for i in range(3))
    D = k_in.shape[-1]
    position, first, dims = positions[b], s * share, jnp.arange(width)
    real = dims < D
    q, *new = (load_some(qkv, (b, i, h), dims, real) for i in range(3))
    q = q.astype(jnp.float32) * (1 / math.sqrt(D))

    def block(i, carry):
        total, top, weight = carry
        slots = first + i * SLOTS + jnp.arange(SLOTS)
        seen = slots <= position
        index = (b, slots[:, None], h, dims[None, :])
        # the slot of this position may not be written yet
        old = ((slots < position)[:, None] & real[None, :], (slots == position)[:, None])
        k, v = (
            jnp.where(old[1], x[None, :], triton.load(ref.at[index], mask=old[0], other=0))
            for ref, x in zip((k_in, v_in), new, strict=True)
        )
        scores = (k.astype(jnp.float32) * q[None, :]).sum(1)
        scores = jnp.where(seen, scores, -1e30)
        new_top = jnp.maximum(top, scores.max())
        probs, scale = jnp.exp(scores - new_top), jnp.exp(top - new_top)
        total = total * scale + (v.astype(jnp.float32) * probs[:, None]).sum(0)
        return total, new_top, weight * scale + probs.sum()

    blocks = pl.cdiv(jnp.clip(position + 1 - first, 0, share), SLOTS)
    zero = jnp.float32(0)
    start = (jnp.zeros(width, jnp.float32), jnp.float32(-1e30), zero)
    total, top, weight = jax.lax.fori_loop(0, blocks, block, start)
    triton.store(sums.at[b, s, h * D + dims], total, mask=real)
    triton.store(maxima.at[b, s, h], top)
    triton.store(weights.at[b, s, h], weight)
    mine = real & (position >= first) & (position < first + share)
    for ref, x in zip((k_out, v_out), new, strict=True):
        triton.store(ref.at[b, position, h, dims], x, mask=mine)


# ---- sampling ----


def can_draw(keys: Array) -> bool:
    """Return whether ``noise`` is that of these keys, as JAX is set: by default it is."""
    c: Any = jax.config
    threefry = str(jax.random.key_impl(keys)) == "threefry2x32" and c.jax_threefry_partitionable
    return threefry and not c.jax_high_dynamic_range_gumbel


def draw_top_k(logits: Array, keys: Array, temperature: float, k: int, n_tokens: int = 0) -> Array:
    """Return sampling.next_token's tokens, int32 (B,), for a rule of a temperature and a top-k.

    logits are (B, V), keys (B,). Argmax of logits + Gumbel noise draws from the softmax: this is
    jax.random.categorical, with its bits. Nothing is sorted, and noise is made for a few: a value
    that k maxima of tiles reach is no higher than the k-th largest logit. What reaches it, little
    more than k, are the candidates. The best of them is the best of the k likeliest if it is one of
    those, which a count of the logits above it tells. If it is not, then nor is any below it, and
    the best of what is above is looked at next.
    """
    B, V = logits.shape
    tiles, settings = pl.cdiv(V, DRAWN), {"temperature": temperature, "known": n_tokens or V}
    maxima = launch(
        partial(maxima_kernel, **settings),
        grid=(pl.cdiv(tiles, TOGETHER), B),
        out_shape=jax.ShapeDtypeStruct((B, tiles), jnp.float32),
        warps=4,
        name="maxima",
    )(logits)
    shapes = [(B,), (B, tiles + 1), (B, V + 1)]
    return launch(
        partial(draw_kernel, k=k, **settings),
        grid=(B,),
        out_shape=[jax.ShapeDtypeStruct(shape, jnp.int32) for shape in shapes],
        warps=DRAW_WARPS,
        name="draw_top_k",
    )(logits, maxima, jax.random.key_data(keys))[0]


def load_logits(logits, row, places, there, temperature):
    """Return float32 logits / temperature of a row; where there are none, the lowest."""
    x = triton.load(logits.at[row, places], mask=there, other=0).astype(jnp.float32)
    return jnp.where(there, x / temperature, -jnp.inf)


def maxima_kernel(logits, maxima, *, temperature, known):
    """Find the largest logit of each of TOGETHER tiles."""
    row, numbers = pl.program_id(1), pl.program_id(0) * TOGETHER + jnp.arange(TOGETHER)
    places = numbers[:, None] * DRAWN + jnp.arange(DRAWN)[None, :]
    x = load_logits(logits, row, places, places < known, temperature)
    triton.store(maxima.at[row, numbers], x.max(1), mask=numbers < maxima.shape[1])


def draw_kernel(logits, maxima, keys, out, live, places, *, temperature, k, known):
    """Draw one row's token; ``live`` lists the tiles with candidates, ``places`` the candidates."""
    row, (_, tiles), V = pl.program_id(0), maxima.shape, logits.shape[1]
    key = keys[row, 0], keys[row, 1]
    numbers = jnp.arange(power_of_2(tiles))
    tops = triton.load(maxima.at[row, numbers], mask=numbers < tiles, other=-jnp.inf)
    least = reached_by(tops, k)
    n_live = append(live, row, 0, numbers, (tops >= least) & (numbers < tiles))
    barrier()

    def search(i, n):
        slots = i * SEARCHED + jnp.arange(SEARCHED)
        tile = slots // DRAWN
        tile = triton.load(live.at[row, tile], mask=tile < n_live, other=V)
        place = tile * DRAWN + slots % DRAWN
        x = load_logits(logits, row, place, place < known, temperature)
        return append(places, row, n, place, (x >= least) & (place < known))

    n = jax.lax.fori_loop(0, pl.cdiv(n_live * DRAWN, SEARCHED), search, jnp.int32(0))
    barrier()
    parts = pl.cdiv(n, CANDIDATES)  # one, but for ties, few tiles or a large k

    def part(i):
        slots = i * CANDIDATES + jnp.arange(CANDIDATES)
        place = triton.load(places.at[row, slots], mask=slots < n, other=V)
        return place, load_logits(logits, row, place, slots < n, temperature)

    def best_above(carry):
        _, below, _ = carry

        def best(i, carry):
            highest, best, value = carry
            place, x = part(i)
            score = jnp.where(x > below, x + noise(key, place), -jnp.inf)
            top = score.max()
            first = jnp.where(score == top, place, V).min()
            its = jnp.where(place == first, x, -jnp.inf).max()
            better = top > highest
            return tuple(
                jnp.where(better, new, old)
                for new, old in ((top, highest), (first, best), (its, value))
            )

        lowest = jnp.float32(-jnp.inf)
        _, best, value = jax.lax.fori_loop(0, parts, best, (lowest, jnp.int32(V), lowest))
        above = jax.lax.fori_loop(
            0, parts, lambda i, n: n + (part(i)[1] > value).astype(jnp.int32).sum(), jnp.int32(0)
        )
        return best, value, above

    start = (jnp.int32(0), jnp.float32(-jnp.inf), jnp.int32(k))
    best, _, _ = jax.lax.while_loop(lambda carry: carry[2] >= k, best_above, start)
    out[row] = jnp.where(best < V, best, 0)  # of NaNs, as argmax takes them


def reached_by(x, k):
    """Return a value that k or more of x reach, and as few more as two looks can tell."""
    low, width = jnp.where(x > -jnp.inf, x, jnp.inf).min(), x.max()
    width -= low
    for _ in range(2):
        steps = low + width / STEPS * jnp.arange(STEPS).astype(jnp.float32)
        enough = (x[None, :] >= steps[:, None]).astype(jnp.int32).sum(1) >= k
        low, width = jnp.where(enough, steps, low).max(), width / STEPS
    return jnp.where((x >= low).astype(jnp.int32).sum() >= k, low, -jnp.inf)


def append(array, row, n, values, chosen):
    """Write the chosen values behind the n that are there, in order; return how many are now."""
    up_to = jnp.cumsum(chosen.astype(jnp.int32))
    # interpreted, what is masked is written back: to the last slot, which nothing else uses
    slots = jnp.where(chosen, n + up_to - 1, array.shape[1] - 1)
    triton.store(array.at[row, slots], values, mask=chosen)
    return n + up_to.max()


def noise(key, places):
    """Return jax.random.gumbel's numbers at places of a row: Threefry-2x32, 20 rounds.

    Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".
    """
    keys = [*key, key[0] ^ key[1] ^ np.uint32(0x1BD11BDA)]
    a, b = (
        jnp.full_like(places, 0).astype(jnp.uint32) + keys[0],
        places.astype(jnp.uint32) + keys[1],
    )
    for i in range(5):
        for turn in ((13, 15, 26, 6), (17, 29, 16, 24))[i % 2]:
            a = a + b
            b = a ^ (b << np.uint32(turn) | b >> np.uint32(32 - turn))
        a, b = a + keys[(i + 1) % 3], b + keys[(i + 2) % 3] + np.uint32(i + 1)
    # 23 bits as a float from 1 to 2, less 1
    bits = (a ^ b) >> np.uint32(9) | np.uint32(0x3F800000)
    uniform = jax.lax.bitcast_convert_type(bits, jnp.float32) - 1
    return -jnp.log(-jnp.log(jnp.maximum(uniform, jnp.finfo(jnp.float32).tiny)))
