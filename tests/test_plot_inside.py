"""Attention maps and next tokens are the model's own numbers, drawn with readable labels."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gpt_jax.model
from gpt_jax.config import GPTConfig
from gpt_jax.errors import UserError
from gpt_jax.model import GPT, new_cache
from gpt_jax.plot import inside
from gpt_jax.plot.inside import (
    attention_maps,
    attention_picture,
    next_token_picture,
    next_tokens,
    token_labels,
    walk,
)
from gpt_jax.tokenizer import byte_tokenizer, char_tokenizer

CONFIG = GPTConfig(
    n_layer=2, n_head=2, n_embd=16, block_size=12, vocab_size=16, n_tokens=10, dropout=0.1
)
TOKENIZER = char_tokenizer("\n $_abcdef")
TOKENS = [4, 1, 5, 0, 6, 6, 9, 2]  # a␣b↵ccf$
T = len(TOKENS)


def model_of(**changes) -> tuple[GPT, dict]:
    """A model whose attention is far from even: its weights are 30 times those of a fresh one."""
    model = GPT(replace(CONFIG, **changes))
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    return model, jax.tree.map(lambda x: 30 * x if x.ndim > 2 else x, params)


@pytest.fixture(scope="module")
def model():
    return model_of()


@pytest.mark.parametrize(
    "changes", [{}, {"bias": False, "dtype": "bfloat16", "scan_layers": True}], ids=str
)
def test_maps_times_v_are_what_the_models_own_attention_puts_out(changes, monkeypatch):
    """In its place they give the same logits; those of another layer do not."""
    model, params = model_of(**changes)
    tokens = jnp.array([TOKENS])
    cache = new_cache(model.config, 1, T)
    features = jax.jit(partial(model.apply, method="features"))
    _, cache = features({"params": params}, tokens, None, cache)
    maps = attention_maps(model, params, TOKENS)
    assert (maps.shape, maps.dtype) == ((2, 2, T, T), np.float32)

    expected = jax.jit(model.apply)({"params": params}, tokens)

    @jax.jit
    def logits(maps):
        def by_maps(q, k, v, **_):
            here = jnp.abs(cache.v - v[None]).sum((1, 2, 3, 4)).argmin()  # which layer has this v
            return jnp.einsum("hts,bshd->bthd", maps.astype(v.dtype)[here], v)

        monkeypatch.setattr(gpt_jax.model, "attention", by_maps)
        return model.apply({"params": params}, tokens)

    rounding = 1e-4 if model.config.dtype == "float32" else 0.03
    np.testing.assert_allclose(logits(maps), expected, atol=rounding)
    even = np.float32(np.tri(T) / (1 + np.arange(T))[:, None] + 0 * maps)
    for other in (maps[::-1], maps[:, ::-1], even):
        assert np.abs(logits(other) - expected).max() > 5 * rounding


def test_a_map_is_a_probability_over_what_came_before(model):
    maps = attention_maps(*model, TOKENS)
    np.testing.assert_allclose(maps.sum(-1), 1, rtol=1e-6)
    assert not maps[:, :, ~np.tri(T, dtype=bool)].any()


def test_the_walk_through_the_blocks_ends_where_the_model_does(model):
    model, params = model
    _, x = walk(model, params, np.array(TOKENS, np.int32))
    logits = jax.jit(model.apply)({"params": params}, jnp.array([TOKENS]))
    norm = gpt_jax.model.LayerNorm(model.config)
    _, features = norm.apply({"params": params["ln_f"]}, x)
    np.testing.assert_allclose(features @ params["wte"]["weight"].T, logits, atol=1e-5)


def test_next_tokens_are_the_softmax_of_the_last_logits_without_padding(model):
    model, params = model
    logits = np.asarray(jax.jit(model.apply)({"params": params}, jnp.array([TOKENS])))[0, -1, :10]
    probs = next_tokens(model, params, TOKENS)
    np.testing.assert_allclose(probs[:10], np.exp(logits) / np.exp(logits).sum(), rtol=1e-5)
    assert probs[10:].tolist() == [0] * 6


@pytest.mark.parametrize(
    ("tokens", "said"),
    [
        ([], r"shape \(0,\): give one row of 1 to 12 ids"),
        ([0] * 13, "1 to 12 ids"),
        ([[1]], "one row"),
        ([3, 10], "holds token 10, the model knows 0 to 9"),
        ([-1], "holds token -1"),
    ],
    ids=str,
)
def test_a_prompt_that_the_model_cannot_take_is_refused(model, tokens, said):
    for look in (attention_maps, next_tokens):
        with pytest.raises(UserError, match=said):
            look(*model, tokens)


def test_labels_show_spaces_newlines_and_half_characters():
    assert token_labels(TOKENIZER, TOKENS) == ["a", "␣", "b", "↵", "c", "c", "f", r"\$"]
    assert token_labels(byte_tokenizer(), "ä\t".encode()) == [r"\xc3", r"\xa4", "⇥"]


def test_a_picture_of_all_maps_has_a_panel_a_head_and_one_scale(model):
    maps = attention_maps(*model, TOKENS)
    *panels, bar = attention_picture(maps, token_labels(TOKENIZER, TOKENS)).axes
    assert bar.get_ylabel() == "attention probability"
    assert [axes.get_title() for axes in panels] == ["head 0", "head 1", "", ""]
    assert [axes.get_ylabel() for axes in panels[::2]] == ["layer 0", "layer 1"]
    for axes, its in zip(panels, maps.reshape(4, T, T), strict=True):
        drawn = axes.images[0].get_array()
        np.testing.assert_array_equal(drawn.filled(0), its)
        assert drawn.mask.tolist() == (~np.tri(T, dtype=bool)).tolist()
        assert axes.images[0].get_clim() == (0, 1)


def test_a_picture_of_one_map_names_its_tokens_on_both_axes(model):
    maps, labels = attention_maps(*model, TOKENS), token_labels(TOKENIZER, TOKENS)
    axes, bar = attention_picture(maps, labels, layer=1, head=0).axes
    np.testing.assert_array_equal(axes.images[0].get_array().filled(0), maps[1, 0])
    for axis in (axes.xaxis, axes.yaxis):
        assert [label.get_text() for label in axis.get_ticklabels()] == labels
    assert axes.get_title() == "layer 1, head 0"
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("attends to", "token")
    assert bar.get_ylabel() == "attention probability"


@pytest.mark.parametrize(
    ("labels", "layer", "head", "said"),
    [(7, 0, 0, "7 labels for maps of 8 tokens"), (8, 2, 0, "layer=2 head=0: there are 2 layers"),
     (8, None, 2, "2 heads, from 0")],
)  # fmt: skip
def test_maps_and_labels_that_do_not_fit_are_refused(labels, layer, head, said):
    with pytest.raises(UserError, match=said):
        attention_picture(np.zeros((2, 2, T, T)), ["x"] * labels, layer, head)


def test_the_picture_of_next_tokens_has_the_likeliest_on_top(model):
    probs = next_tokens(*model, TOKENS)
    [axes] = next_token_picture(*model, TOKENIZER, TOKENS, most=4).axes
    assert [bar.get_width() for bar in axes.patches] == pytest.approx(sorted(probs)[:-5:-1])
    best = np.argsort(-probs)[:4].tolist()
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels == token_labels(TOKENIZER, best)
    assert axes.yaxis_inverted()
    assert axes.get_xlabel() == "probability of the next token"
    assert axes.get_title() == r"after a␣b↵ccf\$"


def test_the_label_of_a_token_that_is_all_but_certain_is_inside_the_picture(model, monkeypatch):
    certain = np.eye(len(next_tokens(*model, TOKENS)))[0]
    monkeypatch.setattr(inside, "next_tokens", lambda *_: certain)
    figure = next_token_picture(*model, TOKENIZER, TOKENS, most=4)
    [axes] = figure.axes
    label = axes.texts[0].get_window_extent(figure.canvas.get_renderer())
    assert axes.texts[0].get_text() == " 100.0%"
    assert label.x1 < axes.get_window_extent().x1
    assert max(axes.get_xticks()) == pytest.approx(1)
