"""The loss over a split, held to a plain mean over its windows."""

import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt_jax import GPT, GPTConfig
from gpt_jax.data import Split, evaluation_starts
from gpt_jax.errors import UserError
from gpt_jax.evaluate import perplexity
from gpt_jax.evaluation import Evaluation, evaluate, make_eval_step
from gpt_jax.integrity.token_file import open_file
from gpt_jax.sharding import batch_sharding, make_mesh, state_sharding
from gpt_jax.tokenizer import byte_tokenizer, char_tokenizer

SYMBOLS = "\n aé€🙂"  # 1, 1, 1, 2, 3 and 4 bytes
T = 8
MODEL = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=16, block_size=T, vocab_size=len(SYMBOLS)))
EVAL_STEP, FORWARD = make_eval_step(MODEL), jax.jit(MODEL.apply)
ONE, EIGHT = make_mesh("cpu:0"), make_mesh()


@pytest.fixture(scope="module")
def params():
    shapes = jax.eval_shape(MODEL.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    random = np.random.default_rng(0)
    # larger than a new model's, so that windows differ in their loss
    return jax.tree.map(lambda x: random.normal(0, 0.3, x.shape).astype(np.float32), shapes)


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    """21 windows and a tail: no batch size below divides them."""
    folder = tmp_path_factory.mktemp("data")
    ids = np.random.default_rng(0).integers(0, len(SYMBOLS), 21 * T + 5)
    ids.astype("<u2").tofile(folder / "val.bin")
    return Split((open_file(folder / "val.bin", "uint16"),), len(SYMBOLS), T)


def ids_of(split):
    [file] = split.files
    return file.tokens


def run(params, split, starts, batch_size, mesh=ONE, tokenizer=None):
    params = jax.device_put(params, state_sharding(mesh, params))
    return evaluate(EVAL_STEP, params, split, starts, batch_size, mesh, tokenizer)


@pytest.fixture(scope="module")
def naive(params, split):
    """Each window's summed loss, one at a time, from the logits, in float64."""
    losses, ids = [], ids_of(split)
    for start in range(0, len(ids) - T, T):
        x = np.asarray(ids[start : start + T], np.int32)
        logits = np.asarray(FORWARD({"params": params}, x[None])[0], np.float64)
        logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        losses.append(-logs[np.arange(T), ids[start + 1 : start + T + 1]].sum())
    return np.array(losses)


def test_the_loss_is_the_mean_over_windows_taken_one_by_one(params, split, naive):
    result = run(params, split, evaluation_starts(split), 4)
    assert result.loss == pytest.approx(naive.sum() / naive.size / T, rel=1e-6)
    assert naive.std() > 1  # the windows do differ


def test_a_whole_split_counts_every_target_but_the_tails(params, split):
    result = run(params, split, evaluation_starts(split), 4)
    assert result.tokens == 21 * T == (len(ids_of(split)) - 1) // T * T


@pytest.mark.parametrize("batch_size", [1, 4, 20, 1000])
def test_the_loss_does_not_depend_on_the_batch_size(params, split, naive, batch_size):
    """With 4 and 20 the last batch is partly filled: what fills it up does not count."""
    result = run(params, split, evaluation_starts(split), batch_size)
    assert result.loss == pytest.approx(naive.mean() / T, rel=1e-6)
    assert result.tokens == 21 * T


@pytest.mark.parametrize("batch_size", [5, 12])
def test_eight_devices_give_the_loss_of_one(params, split, naive, batch_size):
    """C12: rows are rounded up, to 8 and 16, and the last batch is partly filled."""
    result = run(params, split, evaluation_starts(split), batch_size, EIGHT)
    assert result.loss == pytest.approx(naive.mean() / T, rel=1e-6)
    assert result.tokens == 21 * T


def test_fewer_windows_than_devices_are_counted_once_each(params, split, naive):
    result = run(params, split, evaluation_starts(split, 3), 2, EIGHT)
    assert result.loss == pytest.approx(naive[[0, 7, 14]].mean() / T, rel=1e-6)
    assert result.tokens == 3 * T


def test_evaluating_twice_gives_the_same_bits(params, split):
    """T13: in nanoGPT each evaluation draws other batches."""
    starts = evaluation_starts(split, 10)
    assert run(params, split, starts, 4) == run(params, split, starts, 4)


def test_bits_per_byte_count_the_bytes_of_each_symbol(params, split, naive):
    sizes = np.array([1, 1, 1, 2, 3, 4])
    n_bytes = sizes[ids_of(split)[1 : 21 * T + 1]].sum()
    tokenizer = char_tokenizer(SYMBOLS)
    for batch_size in (4, 21):  # what fills the last batch up adds no bytes
        result = run(params, split, evaluation_starts(split), batch_size, tokenizer=tokenizer)
        assert result.bits_per_byte == pytest.approx(naive.sum() / math.log(2) / n_bytes, rel=1e-6)
    assert run(params, split, evaluation_starts(split), 4).bits_per_byte is None


def test_a_byte_is_a_byte_and_an_end_of_text_is_none(params, split, naive):
    """Id 0 of the byte tokenizer ends a document: it is predicted, but is no text."""
    n_bytes = (ids_of(split)[1 : 21 * T + 1] != 0).sum()
    assert 0 < n_bytes < 21 * T
    result = run(params, split, evaluation_starts(split), 4, tokenizer=byte_tokenizer())
    assert result.bits_per_byte == pytest.approx(naive.sum() / math.log(2) / n_bytes, rel=1e-6)
    assert result.loss == pytest.approx(naive.mean() / T, rel=1e-6)


def test_a_tokenizer_whose_files_are_absent_leaves_bits_per_byte_out(params, split, monkeypatch):
    tokenizer = char_tokenizer(SYMBOLS)

    def absent(self):
        raise UserError("no network")

    monkeypatch.setattr(type(tokenizer), "byte_lengths", absent)
    result = run(params, split, evaluation_starts(split, 3), 3, tokenizer=tokenizer)
    assert result.bits_per_byte is None
    assert result.tokens == 3 * T


def test_a_uniform_model_has_the_vocabulary_as_its_perplexity(params, split):
    zero = jax.tree.map(jnp.zeros_like, params)
    result = run(zero, split, evaluation_starts(split), 4)
    assert result.loss == pytest.approx(math.log(len(SYMBOLS)), rel=1e-6)
    assert perplexity(result) == pytest.approx(len(SYMBOLS), rel=1e-6)


def test_the_perplexity_of_a_diverged_model_is_a_number():
    assert math.isfinite(perplexity(Evaluation(1e6, 1)))


def test_targets_of_minus_one_are_not_counted(params):
    """M13."""
    x = np.zeros((4, T), np.int32)
    y = np.full((4, T), -1, np.int32)
    y[0, 3] = 2
    x, y = jax.device_put((x, y), batch_sharding(ONE, 2))
    nats, count = EVAL_STEP(jax.device_put(params, state_sharding(ONE, params)), x, y)
    logits = np.asarray(FORWARD({"params": params}, np.zeros((1, T), np.int32))[0, 3], np.float64)
    assert count == 1
    assert float(nats) == pytest.approx(np.log(np.exp(logits).sum()) - logits[2], rel=1e-5)


def test_devices_that_hold_all_parameters_evaluate_their_own_rows(params):
    """XLA cannot cut a kernel of ours: left to it, each device would do the whole batch's."""
    mesh = make_mesh()
    tokens = jnp.zeros((8, MODEL.config.block_size), jnp.int32)
    step = make_eval_step(MODEL, mesh)
    assert "shard_map" in str(jax.make_jaxpr(step)(params, tokens, tokens))


def test_evaluation_is_not_in_8_bits():
    config = GPTConfig(block_size=16, n_layer=1, n_head=1, n_embd=16, vocab_size=32, bias=False)
    config = replace(config, dtype="bfloat16", matmul_dtype="float8")
    tokens = jnp.zeros((1, 16), jnp.int32)
    params = GPT(config).init(jax.random.key(0), tokens)["params"]
    step = make_eval_step(GPT(config))
    assert "float8" not in str(jax.make_jaxpr(step)(params, tokens, tokens))
