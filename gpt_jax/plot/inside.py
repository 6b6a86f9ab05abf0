"""Inside a model at work on a prompt: what attends to what, and which token comes next.

For notebooks: begin them with ``%matplotlib inline``, and a Figure shows itself.
"""

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from gpt_jax.attention import causal_mask, reference
from gpt_jax.errors import UserError
from gpt_jax.model import GPT, Block
from gpt_jax.plot.figure import BLUE, legible, new_figure
from gpt_jax.tokenizer import Tokenizer

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIGNS = str.maketrans({" ": "\N{OPEN BOX}", "\n": "\u21b5", "\t": "\u21e5"})  # ␣ ↵ ⇥


def attention_maps(model: GPT, params: Any, tokens: Sequence[int]) -> np.ndarray:
    """Return what each position attends to: probabilities (L, H, T, S), float32, S = T.

    ``tokens`` are the T ids of a prompt, at most block_size. Row t sums to 1 and is 0 after
    column t. The numbers are the model's own, in its dtype: times v they are what its attention
    puts out. Raises UserError for a prompt that the model cannot take.
    """
    maps, _ = walk(model, params, checked(model, tokens))
    return np.asarray(maps, np.float32)


def checked(model: GPT, tokens: Sequence[int]) -> np.ndarray:
    """Return the ids of a prompt as int32 (T,); UserError where the model cannot take them."""
    ids, c = np.asarray(tokens), model.config
    if ids.ndim != 1 or not 1 <= len(ids) <= c.block_size:
        raise UserError(f"tokens of shape {ids.shape}: give one row of 1 to {c.block_size} ids")
    known = c.n_tokens or c.vocab_size
    if ids.min() < 0 or ids.max() >= known:
        bad = ids.min() if ids.min() < 0 else ids.max()
        raise UserError(f"the prompt holds token {bad}, the model knows 0 to {known - 1}")
    return ids.astype(np.int32)


@partial(jax.jit, static_argnums=0)
def walk(model: GPT, params: Any, tokens: Array) -> tuple[Array, Array]:
    """Return the attention maps (L, H, T, S) of a prompt (T,), and the stream after the last block.

    The blocks run one by one, for flax to show their q and k: out of GPT's loop over them nothing
    but the stream comes.
    """
    c, T = model.config, len(tokens)
    x = (params["wte"]["weight"][tokens] + params["wpe"]["weight"][:T])[None]
    x = x.astype("bfloat16" if c.dtype == "bfloat16" else "float32")
    maps = []
    for layer in range(c.n_layer):
        weights = jax.tree.map(lambda w, i=layer: w[i], params["h"])
        done: Any = Block(c).apply(
            {"params": weights}, x, None, [None] * 3, jnp.arange(T)[None],
            capture_intermediates=lambda module, _: module.name == "c_attn",
            mutable=["intermediates"],
        )  # fmt: skip
        (x, _), seen = done
        q, k, _ = seen["intermediates"]["attn"]["c_attn"]["__call__"][0]  # (1, T, H, D) each
        # probabilities times the identity are the probabilities
        identity = jnp.broadcast_to(jnp.eye(T, dtype=q.dtype)[None, :, None], (1, T, c.n_head, T))
        maps.append(reference(q, k, identity, causal_mask(T))[0].transpose(1, 0, 2))
    return jnp.stack(maps), x


def next_tokens(model: GPT, params: Any, tokens: Sequence[int]) -> np.ndarray:
    """Return the probabilities (V,) of the token after a prompt, float32; 0 for padding ids.

    They are those of temperature 1, with nothing cut off. Raises UserError as attention_maps does.
    """
    ids, n = checked(model, tokens), model.config.n_tokens or model.config.vocab_size
    logits = np.array(jax.jit(model.apply)({"params": params}, ids[None])[0, -1])
    logits[n:] = -np.inf
    return np.asarray(jax.nn.softmax(logits))


def token_labels(tokenizer: Tokenizer, tokens: Sequence[int]) -> list[str]:
    """Return each token as a picture can show it: spaces as ␣, newlines as ↵, tabs as ⇥.

    Bytes that are no whole character are escaped, \\xe2, and so is what the font lacks.
    """
    texts = [tokenizer.token_bytes(int(i)).decode("utf-8", "backslashreplace") for i in tokens]
    return [legible(text.translate(SIGNS)) for text in texts]


def attention_picture(
    maps: np.ndarray, labels: Sequence[str], layer: int | None = None, head: int = 0
) -> "Figure":
    """Return a picture of attention maps (L, H, T, S): all of them, or one with its tokens.

    ``labels`` are the T tokens' (token_labels); ``layer`` and ``head`` count from 0. A row is a
    position, and its colours say how it spreads its attention over those up to it. Raises UserError
    where the maps have no such layer or head, or other than T labels.
    """
    from matplotlib.colors import PowerNorm

    L, H, T, _ = maps.shape
    if len(labels) != T:
        raise UserError(f"{len(labels)} labels for maps of {T} tokens: give one a token")
    if not (layer is None or 0 <= layer < L) or not 0 <= head < H:
        raise UserError(f"layer={layer} head={head}: there are {L} layers and {H} heads, from 0")
    # viridis grows evenly brighter, in grey and to the colour-blind too; a linear scale would show
    # the little that each of many tokens gets as nothing
    look = {"cmap": "viridis", "norm": PowerNorm(0.5, 0, 1)}
    hidden = np.where(np.tri(T, dtype=bool), maps, np.nan)  # what comes later is not looked at
    if layer is None:
        across, down = max(6.5, 1.1 * H + 1.7), max(2.2, 1.1 * L + 0.9)
        figure = new_figure(
            across, down, left=0.75 / across, right=1 - 1.1 / across, bottom=0.25 / down,
            top=1 - 0.6 / down, wspace=0.08, hspace=0.08,
        )  # fmt: skip
        panels = figure.subplots(L, H, squeeze=False)
        for i, row in enumerate(panels):
            for j, axes in enumerate(row):
                image = axes.imshow(hidden[i, j], **look)
                axes.set(xticks=[], yticks=[])
                if i == 0:
                    axes.set_title(f"head {j}", fontsize="medium")
            row[0].set_ylabel(f"layer {i}")
        bar = figure.add_axes((1 - 0.85 / across, 0.25 / down, 0.15 / across, 1 - 0.85 / down))
        figure.colorbar(image, cax=bar)
        bar.set_ylabel("attention probability")
        return figure
    size = min(max(4.0, 0.2 * T), 14)
    margin = 0.35 + 0.085 * min(max(map(len, labels)), 12)
    across, down = size + margin + 1.3, size + margin + 0.9
    figure = new_figure(across, down)
    area = ((margin + 0.25) / across, 0.3 / down, size / across, size / down)
    axes = figure.add_axes(area)
    image = axes.imshow(hidden[layer, head], **look)
    axes.xaxis.tick_top()
    axes.xaxis.set_label_position("top")
    axes.set_xticks(range(T), labels, rotation=90, fontsize=9)
    axes.set_yticks(range(T), labels, fontsize=9)
    axes.set(xlabel="attends to", ylabel="token", title=f"layer {layer}, head {head}")
    bar = figure.add_axes((area[0] + area[2] + 0.15 / across, area[1], 0.15 / across, area[3]))
    figure.colorbar(image, cax=bar)
    bar.set_ylabel("attention probability")
    return figure


def next_token_picture(
    model: GPT, params: Any, tokenizer: Tokenizer, tokens: Sequence[int], most: int = 10
) -> "Figure":
    """Return a picture of the ``most`` likely tokens after a prompt, ids, and how likely each is.

    Raises UserError for a prompt that the model cannot take.
    """
    probs = next_tokens(model, params, tokens)
    best = np.argsort(-probs, kind="stable")[:most].tolist()
    prompt = "".join(token_labels(tokenizer, tokens[-20:]))
    figure = new_figure(6.5, 0.8 + 0.28 * len(best))
    figure.subplots_adjust(left=0.16, right=0.96, bottom=0.55 / figure.get_figheight(),
                           top=1 - 0.35 / figure.get_figheight())  # fmt: skip
    axes = figure.subplots()
    axes.barh(range(len(best)), probs[best], color=BLUE)
    for i, p in enumerate(probs[best]):
        axes.text(p, i, f" {p:.1%}", va="center")
    axes.set_yticks(range(len(best)), token_labels(tokenizer, best))
    axes.invert_yaxis()
    # wide enough for the label behind the longest bar
    axes.set(xlim=(0, 1.2 * float(probs[best[0]]) or 1), xlabel="probability of the next token")
    axes.set_xticks([tick for tick in axes.get_xticks() if tick <= 1])
    start = "" if len(tokens) <= 20 else "\N{HORIZONTAL ELLIPSIS}"
    axes.set_title(f"after {start}{prompt}", fontsize="medium")
    return figure
