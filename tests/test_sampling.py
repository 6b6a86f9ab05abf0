"""Text from a model, held to nanoGPT's loop: the whole window read anew for each token."""

from dataclasses import replace
from functools import partial
from itertools import chain

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt_jax import GPT, GPTConfig, generate
from gpt_jax.errors import UserError
from gpt_jax.model import new_cache
from gpt_jax.sampling import Rule, decode, next_token, prefill, start, stream

S, V, KNOWN = 64, 50, 48  # the last two ids only pad the vocabulary
MODEL = GPT(
    GPTConfig(n_layer=2, n_head=2, n_embd=16, block_size=S, vocab_size=V, bias=True, n_tokens=KNOWN)
)
RAGGED = [[7], list(range(9)), [(i * i + 3) % KNOWN for i in range(40)]]
LONG = [[(3 * i * i + i) % KNOWN for i in range(100)], [5, 6, 7], list(range(KNOWN)) * 2]
NEW = 200  # every row of RAGGED passes block_size


@pytest.fixture(scope="module")
def params():
    shapes = jax.eval_shape(MODEL.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    random = np.random.default_rng(1)

    def leaf(path, x):
        """Much larger than a new model's: texts then wander, also once they are long."""
        *_, module, name = (key.key for key in path)
        if name == "bias" or module.startswith("ln_"):
            return random.normal(name == "weight", 0.1, x.shape).astype(np.float32)
        return random.normal(0, 0.3 if module in ("wte", "wpe") else 1, x.shape).astype(np.float32)

    params = jax.tree_util.tree_map_with_path(leaf, shapes)
    params["wte"]["weight"][KNOWN:] *= 1.5  # padding that would be drawn if it could be
    return jax.tree.map(jnp.asarray, params)


@jax.jit
def full_forward(params, window, length):
    """The logits after `length` tokens of one window (S,), with no cache."""
    return MODEL.apply({"params": params}, window[None])[0, length - 1]


def logits_after(params, ids):
    """nanoGPT's crop; what fills a short window up comes later, where causality hides it."""
    crop = ids[-S:]
    window = np.zeros(S, np.int32)
    window[: len(crop)] = crop
    return np.asarray(full_forward(params, window, len(crop)))


def naive_greedy(params, prompt, n):
    ids = list(prompt)
    for _ in range(n):
        ids.append(int(logits_after(params, ids)[:KNOWN].argmax()))
    return ids


@pytest.fixture(scope="module")
def expected(params):
    return [naive_greedy(params, prompt, NEW) for prompt in RAGGED]


@pytest.fixture(scope="module")
def greedy(params):
    key = jax.random.key(0)
    return generate(MODEL, params, RAGGED, key=key, max_new_tokens=NEW, temperature=0.0)


def test_the_loop_that_the_others_are_held_to_is_a_plain_forward(params):
    ids = LONG[0][:13]
    plain = jax.jit(MODEL.apply)({"params": params}, np.array([ids], np.int32))[0, -1]
    np.testing.assert_allclose(logits_after(params, ids), plain, atol=1e-5)


def test_cached_greedy_text_is_the_uncached_one_for_a_ragged_batch(expected, greedy):
    """C31, M19: 200 tokens each, through the cache and then past block_size."""
    assert greedy == expected
    for prompt, text in zip(RAGGED, greedy, strict=True):
        assert text[: len(prompt)] == prompt
        assert len(text) == len(prompt) + NEW > S
        assert len(set(text[-100:])) > 10  # a loop over one token would prove little


def test_cached_greedy_text_is_the_uncached_one_for_each_prompt_alone(params, expected):
    """C31."""
    for prompt, text in zip(RAGGED, expected, strict=True):
        alone = generate(
            MODEL, params, prompt, key=jax.random.key(0), max_new_tokens=NEW, temperature=0.0
        )
        assert alone == text


def test_logits_along_the_way_are_those_of_a_full_forward(params, expected):
    """C31: within 1e-4, from the prompts' ends to the crop."""
    keys = jax.random.split(jax.random.key(0), len(RAGGED))
    state = start(MODEL, params, RAGGED, keys, NEW)
    for n in range(S + 10):
        for row, (prompt, text) in enumerate(zip(RAGGED, expected, strict=True)):
            full = logits_after(params, text[: len(prompt) + n])
            np.testing.assert_allclose(state.logits[row], full, atol=1e-4)
        state = decode(MODEL, params, state, jnp.int32(1), Rule(temperature=0.0))


def test_one_position_through_the_cache_is_that_position_of_a_full_forward(params):
    """C31: next_logits itself, without the loop."""
    ids = np.array([LONG[0][:20]], np.int32)
    read = jax.jit(partial(MODEL.apply, method="next_logits"))
    first, cache = np.array([0]), new_cache(MODEL.config, 1)
    for n in range(20):
        position = np.array([[n]])
        logits, cache = read({"params": params}, ids[:, n : n + 1], first, position, cache)
        np.testing.assert_allclose(logits[0], logits_after(params, LONG[0][: n + 1]), atol=1e-4)


def test_prompts_longer_than_block_size_are_read_through_nanogpts_crop(params):
    """C31, M19, Appendix A 11: beside a short one, which is not disturbed."""
    keys = jax.random.split(jax.random.key(0), 3)
    state = start(MODEL, params, LONG, keys, 192)  # room for more: a shape compiled for already
    state = decode(MODEL, params, state, jnp.int32(20), Rule(temperature=0.0))
    for row, prompt in enumerate(LONG):
        text = state.tokens[row, : len(prompt) + 20].tolist()
        assert text == naive_greedy(params, prompt, 20)


def test_a_prompt_of_exactly_block_size_goes_on_past_it(params):
    prompt = LONG[0][:S]
    keys = jax.random.split(jax.random.key(0), 1)
    state = start(MODEL, params, [prompt], keys, NEW)
    np.testing.assert_allclose(state.logits[0], logits_after(params, prompt), atol=1e-4)
    state = decode(MODEL, params, state, jnp.int32(10), Rule(temperature=0.0))
    assert state.tokens[0, : S + 10].tolist() == naive_greedy(params, prompt, 10)


def test_stop_tokens_end_a_row_which_keeps_them_while_others_go_on(params, expected):
    new = [text[len(prompt) :] for prompt, text in zip(RAGGED, expected, strict=True)]
    stops = (new[0][3], new[1][20])
    assert any(stop in prompt for stop in stops for prompt in RAGGED)  # there it stops nothing
    cut = []
    for prompt, text in zip(RAGGED, new, strict=True):
        ends = [i + 1 for i, token in enumerate(text[:60]) if token in stops]
        cut.append(prompt + text[: ends[0] if ends else 60])
    assert len({len(text) - len(prompt) for prompt, text in zip(RAGGED, cut, strict=True)}) > 1
    texts = generate(
        MODEL, params, RAGGED, key=jax.random.key(0), max_new_tokens=60, temperature=0.0,
        stop_tokens=stops,
    )  # fmt: skip
    assert texts == cut


# with these keys the last row comes upon the stop token and the others do not
STOP = 9
DRAW = {
    "max_new_tokens": 80, "temperature": 0.8, "top_k": 20, "top_p": 0.95, "stop_tokens": (STOP,)
}  # fmt: skip


@pytest.fixture(scope="module")
def drawn(params):
    keys = jax.random.split(jax.random.key(5), 3)
    return generate(MODEL, params, RAGGED, key=keys, **DRAW)


def test_the_same_seed_gives_the_same_text_and_another_seed_another(params, drawn):
    """C32; the keys passed in can be used again."""
    keys = jax.random.split(jax.random.key(5), 3)
    assert generate(MODEL, params, RAGGED, key=keys, **DRAW) == drawn
    assert generate(MODEL, params, RAGGED, key=keys, **DRAW) == drawn
    others = generate(MODEL, params, RAGGED, key=jax.random.split(jax.random.key(6), 3), **DRAW)
    assert all(a != b for a, b in zip(others, drawn, strict=True))


def test_a_row_of_a_batch_is_the_text_its_key_gives_alone(params, drawn):
    """C32: at any place in a batch of any size, as a list of one or as one prompt."""
    keys = jax.random.split(jax.random.key(5), 3)
    for row, prompt in enumerate(RAGGED):
        alone = generate(MODEL, params, prompt, key=keys[row], **DRAW)
        assert alone == drawn[row]
        assert generate(MODEL, params, [prompt], key=keys[row : row + 1], **DRAW) == [alone]
    back = generate(MODEL, params, RAGGED[::-1], key=keys[::-1], **DRAW)
    assert back[::-1] == drawn


def test_rows_of_one_key_are_drawn_independently(params):
    """S4: samples of one prompt differ."""
    texts = generate(MODEL, params, [RAGGED[0]] * 3, key=jax.random.key(5), **DRAW)
    assert len({tuple(text) for text in texts}) == 3


def test_streaming_yields_exactly_the_ids_that_generate_returns(params, drawn):
    """A few at a time, also to a stop token: a terminal shows the text that a file would get."""
    assert len(drawn[0]) == len(RAGGED[0]) + 80
    assert len(drawn[2]) < len(RAGGED[2]) + 80
    assert drawn[2][-1] == STOP
    keys = jax.random.split(jax.random.key(5), 3)
    for row in (0, 2):
        parts = list(stream(MODEL, params, RAGGED[row], key=keys[row], **DRAW))
        assert [*RAGGED[row], *chain(*parts)] == drawn[row]
        assert len(parts) > 5
        assert all(parts)


def test_streaming_takes_generates_settings_none_included(params, expected):
    rule = {"max_new_tokens": NEW, "temperature": 0.0, "top_k": None}
    parts = stream(MODEL, params, RAGGED[0], key=jax.random.key(0), **rule)
    assert [*RAGGED[0], *chain(*parts)] == expected[0]


def test_the_loop_is_compiled_once_for_prompts_of_any_content(params, drawn):
    """C27: and runs on the device, with no Python between tokens."""
    compiled = decode._cache_size(), prefill._cache_size()
    for seed in range(3):
        prompts = np.random.default_rng(seed).integers(0, KNOWN, (3, 30 + seed)).tolist()
        keys = jax.random.split(jax.random.key(seed), 3)
        generate(MODEL, params, prompts, key=keys, **DRAW | {"max_new_tokens": 70 + seed})
    assert (decode._cache_size(), prefill._cache_size()) == compiled


def test_texts_are_lists_of_plain_ints(greedy):
    assert {type(token) for text in greedy for token in text} == {int}


# ---- next_token ----


def draws(logits, rule, n=400, n_tokens=0):
    """n tokens for each row of logits."""
    keys = jax.random.split(jax.random.key(0), n)
    return np.stack(
        [
            next_token(jnp.tile(jnp.array([row], jnp.float32), (n, 1)), keys, rule, n_tokens)
            for row in logits
        ]
    )


def test_temperature_0_takes_the_likeliest_token():
    """C32: whatever the key; nanoGPT divides by zero."""
    logits = jax.random.normal(jax.random.key(3), (100, V))
    keys = jax.random.split(jax.random.key(0), 100)
    rule = Rule(temperature=0.0, top_k=3, top_p=0.5)
    np.testing.assert_array_equal(next_token(logits, keys, rule), logits.argmax(-1))


@pytest.mark.parametrize(
    ("rule", "scale"),
    [(Rule(), 1.0), (Rule(temperature=0.5), 2.0), (Rule(temperature=2.0, top_k=8), 0.5)],
)
def test_draws_follow_the_softmax_of_logits_over_temperature(rule, scale):
    """M19."""
    n, logits = 20_000, np.array([2.0, 1.0, 0.0, 0.5, -1.0, 1.5, -3.0, 0.0])
    probs = np.exp(logits * scale) / np.exp(logits * scale).sum()
    counts = np.bincount(draws([logits], rule, n)[0], minlength=8)
    chi_square = ((counts - n * probs) ** 2 / (n * probs)).sum()
    assert chi_square < 30  # 7 degrees of freedom: chance gives more once in ten thousand


def test_draws_within_top_k_keep_the_ratios_they_had():
    """M19: the softmax is taken over what is left."""
    n, logits = 20_000, np.array([2.0, 1.0, 0.0, 0.5, -1.0])
    counts = np.bincount(draws([logits], Rule(top_k=2), n)[0], minlength=5)
    assert counts[2:].sum() == 0
    assert counts[0] / n == pytest.approx(np.e / (np.e + 1), abs=0.02)


def test_top_k_never_leaves_the_set_of_the_k_likeliest():
    """C32."""
    logits = np.asarray(jax.random.normal(jax.random.key(3), (5, V)))
    for k in (1, 2, 5):
        for row, tokens in zip(logits, draws(logits, Rule(top_k=k)), strict=True):
            assert set(tokens.tolist()) == set(np.argsort(row)[-k:].tolist())


def test_top_k_keeps_every_token_that_ties_with_the_kth():
    """M19, Appendix A 12: lax.top_k alone would keep two of these."""
    logits = [3.0, 1.0, 2.0, 2.0, 2.0, 0.0]
    assert set(draws([logits], Rule(top_k=2))[0].tolist()) == {0, 2, 3, 4}


@pytest.mark.parametrize("k", [6, 7, 10**6])
def test_top_k_beyond_the_vocabulary_keeps_all(k):
    """C32, M19: nanoGPT takes min(top_k, V)."""
    logits = [[0.5, 0.0, 0.2, 0.1, 0.3, 0.4]]
    np.testing.assert_array_equal(draws(logits, Rule(top_k=k)), draws(logits, Rule()))
    assert set(draws(logits, Rule(top_k=k))[0].tolist()) == set(range(6))


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [
        (0.3, {2}),
        (0.49, {2}),
        (0.51, {2, 0}),
        (0.79, {2, 0}),
        (0.81, {2, 0, 3}),
        (0.96, {0, 1, 2, 3}),
    ],
)
def test_top_p_keeps_the_fewest_tokens_that_hold_that_much(top_p, kept):
    probs = np.array([0.3, 0.05, 0.5, 0.15])
    assert set(draws([np.log(probs)], Rule(top_p=top_p))[0].tolist()) == kept


def test_top_p_counts_what_temperature_and_top_k_have_left():
    """nanoGPT's order goes on: of the two likeliest, 0.625 and 0.375, 0.6 needs one alone."""
    probs = np.array([0.3, 0.05, 0.5, 0.15])
    assert set(draws([np.log(probs)], Rule(top_k=2, top_p=0.6))[0].tolist()) == {2}
    warm = Rule(temperature=10.0, top_p=0.6)  # 0.28, 0.26, 0.24, 0.22
    assert set(draws([np.log(probs)], warm)[0].tolist()) == {2, 0, 3}
    assert set(draws([np.log(probs)], Rule(top_p=1e-9))[0].tolist()) == {2}


@pytest.mark.parametrize(
    "rule",
    [Rule(), Rule(temperature=0.0), Rule(top_k=5), Rule(top_p=0.999), Rule(temperature=9.0)],
)
def test_ids_that_only_pad_the_vocabulary_are_never_drawn(rule):
    """M16: nanoGPT can draw them, and tiktoken then cannot decode them."""
    logits = [[0.0, 0.1, 0.2, 9.0, 9.0, 9.0]]
    assert draws(logits, rule, n_tokens=3).max() <= 2
    assert draws(logits, rule).max() > 2


def test_generate_never_draws_padding(params, greedy, drawn):
    """M16: by the config's n_tokens, where the padding would often have been the likeliest."""
    likeliest = [logits_after(params, text[:n]).argmax() for text in greedy for n in range(9, 99)]
    assert max(likeliest) >= KNOWN
    assert max(chain(*greedy, *drawn)) < KNOWN


# ---- what is refused ----


@pytest.mark.parametrize("prompts", [[], [[]], [[1, 2], []]])
def test_an_empty_prompt_is_refused(prompts, params):
    with pytest.raises(UserError, match="the prompt has no tokens"):
        generate(MODEL, params, prompts, key=jax.random.key(0), max_new_tokens=3)


@pytest.mark.parametrize("bad", [-1, KNOWN, V, 10**6, 2**40])
def test_an_id_the_model_does_not_know_is_refused_by_number(bad, params):
    """C20, M16: one that only pads the vocabulary included."""
    with pytest.raises(UserError, match=f"the prompt holds token {bad}, .* 0 to {KNOWN - 1}"):
        generate(MODEL, params, [[1], [2, bad]], key=jax.random.key(0), max_new_tokens=3)


def test_without_n_tokens_every_row_of_the_embedding_is_known(params):
    model = GPT(replace(MODEL.config, n_tokens=0))
    with pytest.raises(UserError, match=f"token {V}, the model knows 0 to {V - 1}"):
        generate(model, params, [V], key=jax.random.key(0), max_new_tokens=3)


@pytest.mark.parametrize(
    "rule",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_p": float("nan")},
    ],
)
def test_a_rule_out_of_range_is_refused_with_its_values(rule, params):
    [(name, value)] = rule.items()
    with pytest.raises(UserError, match=f"{name}={value}"):
        generate(MODEL, params, [1], key=jax.random.key(0), max_new_tokens=3, **rule)
