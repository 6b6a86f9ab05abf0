"""One update: what it computes, on one device and on eight, and what it leaves alone."""

import hashlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gpt_jax import train_step as module
from gpt_jax.config import GPTConfig, TrainConfig
from gpt_jax.model import GPT
from gpt_jax.optimizer import make_optimizer
from gpt_jax.sharding import batch_sharding, make_mesh, state_sharding
from gpt_jax.train_step import init_state, make_train_step, rescale

SIZES = {"block_size": 8, "vocab_size": 32, "n_layer": 1, "n_head": 2, "n_embd": 16}
MODEL = GPT(GPTConfig(**SIZES, bias=False))
DROPPING = GPT(GPTConfig(**SIZES, bias=False, dropout=0.2))
HALF = GPT(GPTConfig(**SIZES, bias=False, dtype="float16"))
CONFIG = TrainConfig(
    learning_rate=1e-2, warmup_iters=2, lr_decay_iters=40, min_lr=1e-3, grad_clip=0.1
)
ADAMW = make_optimizer(CONFIG)


@pytest.fixture(autouse=True, scope="module")
def compiled_in_haste():
    jax.config.update("jax_disable_most_optimizations", True)  # half the time, the same sums
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def made_up_params():
    tokens, rng = jnp.zeros((1, 1), jnp.int32), np.random.default_rng(0)
    params = jax.eval_shape(MODEL.init, jax.random.key(0), tokens)["params"]

    def leaf(path, x):
        norm = path[-2].key.startswith("ln_")
        return np.float32(1 if norm else 0) + np.float32(rng.normal(0, 0.1, x.shape))

    return jax.tree_util.tree_map_with_path(leaf, params)


PARAMS = made_up_params()


def state_of(tx, **changes):
    """Return a fresh state: a step donates the one it is given."""
    state = init_state(jax.tree.map(jnp.array, PARAMS), tx, jax.random.key(5))
    return state.replace(**{k: jnp.array(x, getattr(state, k).dtype) for k, x in changes.items()})


def batch(A, B, seed=0):
    """Return made-up tokens and targets, (A, B, T); the same ones however they are divided."""
    ids = np.random.default_rng(seed).integers(0, 32, (2, A * B, 8), dtype=np.int32)
    return tuple(ids.reshape(2, A, B, 8))


def moments(state):
    return [optax.tree.get(state.opt_state, name) for name in ("mu", "nu")]


def floats(tree):
    return {
        jax.tree_util.keystr(path): np.asarray(x)
        for path, x in jax.tree_util.tree_leaves_with_path(tree)
    }


# plain gradient descent: what it changes is the gradient itself, AdamW would hide its length
SGD = optax.sgd(1.0)
STEP = make_train_step(MODEL, ADAMW)
SGD_STEP = make_train_step(MODEL, SGD)


# --- what an update computes


def test_a_state_starts_with_no_moments_and_step_0():
    state = init_state(PARAMS, ADAMW)
    assert (state.step, state.step.dtype) == (0, jnp.int32)
    assert (state.loss_scale, state.good_steps) == (2.0**16, 0)
    assert state.params is PARAMS
    assert all((x == 0).all() for x in jax.tree.leaves(moments(state)))


def test_loss_is_the_mean_over_micro_batches_and_grad_norm_is_the_means_norm():  # T20, T22
    tokens, targets = batch(2, 8)
    state, metrics = SGD_STEP(state_of(SGD), tokens, targets)

    @jax.jit
    @jax.value_and_grad
    def loss(params, x, y):
        return MODEL.apply({"params": params}, x, y, method="loss")

    (first, one), (second, two) = (loss(PARAMS, tokens[i], targets[i]) for i in (0, 1))
    assert abs(first - second) > 1e-2
    np.testing.assert_allclose(metrics["loss"], (first + second) / 2, rtol=1e-6)
    mean = floats(jax.tree.map(lambda a, b: (a + b) / 2, one, two))
    norm = np.sqrt(sum((np.float64(g) ** 2).sum() for g in mean.values()))
    np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-5)
    for name, before in floats(PARAMS).items():
        after = floats(state.params)[name]
        np.testing.assert_allclose(after, before - mean[name], rtol=1e-5, atol=1e-6, err_msg=name)


def test_metrics_are_scalars():
    _, metrics = STEP(state_of(ADAMW), *batch(2, 8))
    kinds = {name: (x.shape, x.dtype) for name, x in metrics.items()}
    assert kinds == {
        "loss": ((), jnp.float32),
        "grad_norm": ((), jnp.float32),
        "skipped": ((), jnp.int32),
        "skipped_in_a_row": ((), jnp.int32),
    }


def test_accumulation_over_1_2_and_8_micro_batches_is_the_same_update():  # C13, T20
    results = {}
    for A in (1, 2, 8):
        state, metrics = SGD_STEP(state_of(SGD), *batch(A, 16 // A))
        results[A] = floats(state.params), metrics
    for A in (2, 8):
        for name in ("loss", "grad_norm"):
            np.testing.assert_allclose(results[A][1][name], results[1][1][name], rtol=1e-5)
        for name, x in results[1][0].items():
            np.testing.assert_allclose(results[A][0][name], x, rtol=1e-5, atol=1e-6, err_msg=name)


def test_grad_norm_is_taken_before_clipping():  # T21
    _, plain = SGD_STEP(state_of(SGD), *batch(2, 8))
    state, metrics = STEP(state_of(ADAMW), *batch(2, 8))
    np.testing.assert_allclose(metrics["grad_norm"], plain["grad_norm"], rtol=1e-6)
    assert metrics["grad_norm"] > 2 * CONFIG.grad_clip
    taken_in = optax.tree.norm(optax.tree.get(state.opt_state, "mu")) / (1 - CONFIG.beta1)
    np.testing.assert_allclose(taken_in, CONFIG.grad_clip, rtol=1e-5)


def test_the_step_counter_advances_and_the_key_stays():
    state, key = state_of(ADAMW), jax.random.key_data(state_of(ADAMW).key)
    for step in range(1, 4):
        state, _ = STEP(state, *batch(2, 8, seed=step))
        assert (state.step, state.step.dtype) == (step, jnp.int32)
    np.testing.assert_array_equal(jax.random.key_data(state.key), key)
    # without float16 there is no scale to move
    assert (state.loss_scale, state.good_steps) == (2.0**16, 0)


def test_the_state_is_donated():  # C28
    state = state_of(ADAMW)
    compiled = STEP.lower(state, *batch(2, 8)).compile()
    size = sum(x.nbytes for x in jax.tree.leaves(state))
    assert size > 3 * sum(x.nbytes for x in jax.tree.leaves(PARAMS))  # with both moments
    assert compiled.memory_analysis().alias_size_in_bytes >= 0.99 * size
    STEP(state, *batch(2, 8))
    assert all(x.is_deleted() for x in jax.tree.leaves((state.params, state.opt_state)))


# --- dropout

FROZEN = optax.set_to_zero()  # parameters stay, so that only dropout can change the loss
FROZEN_STEP = make_train_step(DROPPING, FROZEN)


def test_dropout_differs_from_step_to_step():  # M6
    tokens, targets = batch(2, 4)
    losses, state = [], state_of(FROZEN)
    for _ in range(3):
        state, metrics = FROZEN_STEP(state, tokens, targets)
        losses.append(float(metrics["loss"]))
    assert len(set(losses)) == 3
    # and follows from the step and the key alone
    _, metrics = FROZEN_STEP(state_of(FROZEN, step=1), tokens, targets)
    assert float(metrics["loss"]) == losses[1]
    other = state_of(FROZEN).replace(key=jax.random.key(6))
    assert float(FROZEN_STEP(other, tokens, targets)[1]["loss"]) != losses[0]


def test_dropout_differs_from_micro_batch_to_micro_batch():
    tokens, targets = (np.concatenate([x, x]) for x in batch(1, 4))
    losses = []
    for counted in (0, 1):  # the same tokens, once as the first micro-batch, once as the second
        only = np.full_like(targets, -1)
        only[counted] = targets[counted]
        losses.append(float(FROZEN_STEP(state_of(FROZEN), tokens, only)[1]["loss"]))
    assert abs(losses[0] - losses[1]) > 1e-4


# --- eight devices


def run(model, mesh, steps):
    """Return (state, losses) of a run whose batches are spread over a mesh."""
    step = make_train_step(model, ADAMW, mesh)
    state = state_of(ADAMW)
    state = jax.device_put(state, state_sharding(mesh, state))
    losses = []
    for seed in range(steps):
        tokens, targets = jax.device_put(batch(2, 8, seed), batch_sharding(mesh, 3))
        state, metrics = step(state, tokens, targets)
        losses.append(metrics["loss"])
    return state, np.array(losses)


def digest(state):
    leaves = floats(state.replace(key=jax.random.key_data(state.key)))
    parts = b"".join(name.encode() + x.tobytes() for name, x in sorted(leaves.items()))
    return hashlib.sha256(parts).hexdigest()


def test_the_same_seed_makes_the_same_bits_on_eight_devices_with_dropout():  # C8
    mesh = make_mesh()
    assert mesh.size == 8
    first, losses = run(DROPPING, mesh, 40)
    assert all(len(x.sharding.device_set) == 8 for x in jax.tree.leaves(first.params))
    again, losses_again = run(DROPPING, mesh, 40)
    assert digest(first) == digest(again)
    np.testing.assert_array_equal(losses, losses_again)


@pytest.fixture(scope="module")
def one():
    """The losses of twenty steps on one device."""
    losses, state = [], state_of(ADAMW)
    for seed in range(20):
        state, metrics = STEP(state, *batch(2, 8, seed))
        losses.append(float(metrics["loss"]))
    return losses


@pytest.mark.parametrize(
    "sizes", [(8, 1, 1), (1, 8, 1), (4, 2, 1), (2, 2, 2), (4, 1, 2), (1, 1, 2)], ids=str
)
def test_any_mesh_makes_the_losses_of_one_device(one, sizes):  # C12, T2
    mesh = make_mesh("auto", *sizes)
    state, losses = run(MODEL, mesh, 20)
    assert np.abs(losses - one).max() <= 5e-6
    for leaf, layout in zip(
        jax.tree.leaves(state), jax.tree.leaves(state_sharding(mesh, state)), strict=True
    ):
        assert leaf.sharding.is_equivalent_to(layout, leaf.ndim)
    assert one[0] - one[-1] > 1e-3  # it did learn, so a wrong update would have shown


def test_the_function_compiles_once(caplog):  # C27
    with jax.log_compiles():
        run(MODEL, make_mesh(), 4)
    compiled = [text for text in caplog.messages if text.startswith("Compiling jit(train_step)")]
    assert len(compiled) == 1


# --- float16


@pytest.fixture(scope="module")
def half_step():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "SCALE_DOUBLES_AFTER", 3)
        yield make_train_step(HALF, ADAMW)


def test_float16_scales_the_loss_and_takes_the_scale_off_again(half_step):  # T11
    state, metrics = half_step(state_of(ADAMW, loss_scale=2.0**10), *batch(2, 8))
    _, exact = STEP(state_of(ADAMW), *batch(2, 8))
    np.testing.assert_allclose(metrics["loss"], exact["loss"], rtol=1e-3)
    np.testing.assert_allclose(metrics["grad_norm"], exact["grad_norm"], rtol=1e-2)
    assert (state.loss_scale, state.good_steps) == (2.0**10, 1)


def test_an_overflow_skips_the_update_halves_the_scale_and_keeps_the_moments(half_step):  # T11, C22
    # two good steps first, so that there are moments to keep
    state = state_of(ADAMW, loss_scale=2.0**8)
    for seed in range(2):
        state, _ = half_step(state, *batch(2, 8, seed))
    assert state.good_steps == 2
    state = state.replace(loss_scale=jnp.float32(2.0**24))  # above float16's largest, 65504
    before = floats((state.params, moments(state)))
    state, metrics = half_step(state, *batch(2, 8, seed=2))
    assert not np.isfinite(metrics["grad_norm"])
    assert np.isfinite(metrics["loss"])
    after = floats((state.params, moments(state)))
    for name, x in before.items():
        np.testing.assert_array_equal(after[name], x, err_msg=name)
    assert (state.loss_scale, state.good_steps, state.step) == (2.0**23, 0, 3)


def test_a_scale_that_is_too_high_comes_down_until_training_goes_on(half_step):  # T11
    state = state_of(ADAMW, loss_scale=2.0**24)
    for seed in range(24):
        state, metrics = half_step(state, *batch(2, 8, seed))
        if np.isfinite(metrics["grad_norm"]):
            break
    assert state.loss_scale < 2.0**23
    assert state.good_steps == 1
    assert any((floats(state.params)[name] != x).any() for name, x in floats(PARAMS).items())


def test_the_scale_doubles_after_enough_good_steps(half_step):  # T11
    state = state_of(ADAMW, loss_scale=2.0**4)
    seen = []
    for seed in range(7):
        state, _ = half_step(state, *batch(2, 8, seed))
        seen.append((float(state.loss_scale), int(state.good_steps)))
    assert seen == [(16, 1), (16, 2), (32, 0), (32, 1), (32, 2), (64, 0), (64, 1)]


@pytest.mark.parametrize(
    ("finite", "scale", "expected"),
    [(True, 2.0**24, 2.0**24), (True, 2.0**23, 2.0**24), (False, 1.0, 1.0), (False, 2.0, 1.0)],
)
def test_the_scale_stays_between_1_and_its_largest(monkeypatch, finite, scale, expected):
    monkeypatch.setattr(module, "SCALE_DOUBLES_AFTER", 1)
    state = init_state({}, SGD).replace(loss_scale=jnp.float32(scale))
    assert rescale(state, jnp.bool_(finite)).loss_scale == expected


def test_an_overflow_is_in_a_row_only_where_the_scale_cannot_come_down(half_step):
    """Coming down from 2**24 takes more updates in a row than a run may leave out."""
    state, metrics = half_step(state_of(ADAMW, loss_scale=2.0**24), *batch(2, 8))
    assert (metrics["skipped"], metrics["skipped_in_a_row"]) == (1, 0)
    broken = {**state.params, "ln_f": {"weight": jnp.full(16, jnp.inf)}}
    state = state.replace(params=broken, loss_scale=jnp.float32(1))
    for n in (1, 2):
        state, metrics = half_step(state, *batch(2, 8))
        assert (metrics["skipped"], metrics["skipped_in_a_row"]) == (1 + n, n)


# --- updates that are left out


def poisoned_gradient(name, number):
    """A GPT whose gradient, but not its loss, has ``number`` in the leaf of this name."""

    @jax.custom_vjp
    def poison(x):
        return x

    poison.defvjp(lambda x: (x, None), lambda _, g: (g.at[(0,) * g.ndim].set(number),))

    class Poisoned(GPT):
        def total_loss(self, *batch, **kwargs):
            total, n = super().total_loss(*batch, **kwargs)
            path = name.split("/")
            leaf = self.variables["params"]
            for part in path:
                leaf = leaf[part]
            return total + 0 * poison(leaf).sum(), n

    return Poisoned(MODEL.config)


def poison_loss(state, tokens, targets, number):
    params = {**state.params, "ln_f": {"weight": jnp.full(16, number, jnp.float32)}}
    return state.replace(params=params), tokens, targets


def poison_data(state, tokens, targets, _):
    """An id that the vocabulary does not have: its loss is nan."""
    return state, tokens, np.where(np.arange(8) == 3, 99, targets).astype(np.int32)


def assert_left_out(step, state, tokens, targets):
    """The next update changes nothing but the counters; return the state after it."""
    before = floats((state.params, state.opt_state))
    counter, skipped = int(state.step), int(state.skipped[0])
    state, metrics = step(state, tokens, targets)
    after = floats((state.params, state.opt_state))
    for name, x in before.items():
        assert x.tobytes() == after[name].tobytes(), name
    assert (state.step, metrics["skipped"]) == (counter + 1, skipped + 1)
    return state


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("poison", [poison_loss, poison_data])
def test_a_loss_that_is_no_number_leaves_the_update_out(poison, number):  # C22
    state = state_of(ADAMW)
    for seed in range(2):
        state, _ = STEP(state, *batch(2, 8, seed))
    poisoned, tokens, targets = poison(state, *batch(2, 8, 2), number)
    assert_left_out(STEP, poisoned, tokens, targets)


@pytest.mark.parametrize("number", [np.nan, np.inf, 1e38])
@pytest.mark.parametrize("name", ["wte/weight", "h/mlp/c_fc/weight"])
def test_one_bad_number_in_a_gradient_leaves_the_update_out(name, number):  # C22
    """Of 1e38 the norm overflows."""
    state, _ = STEP(state_of(ADAMW), *batch(2, 8))
    step = make_train_step(poisoned_gradient(name, number), ADAMW)
    state = assert_left_out(step, state, *batch(2, 8, 1))
    assert np.isfinite(step(state, *batch(2, 8, 1))[1]["loss"])


def test_updates_left_out_are_counted_and_training_goes_on_as_if_they_had_not_been():  # C22
    """But for the schedule of the learning rate, which follows the iteration."""
    state, bad = state_of(ADAMW), poison_data(None, *batch(2, 8), 0)[1:]
    counts = []
    for seed in (0, None, None, 1, None, 2):
        state, metrics = STEP(state, *(bad if seed is None else batch(2, 8, seed)))
        counts.append((int(metrics["skipped"]), int(metrics["skipped_in_a_row"])))
    assert counts == [(0, 0), (1, 1), (2, 2), (2, 0), (3, 1), (3, 0)]
    assert state.step == 6

    tx = make_optimizer(TrainConfig(**{**vars(CONFIG), "decay_lr": False}))
    step, with_bad, without = make_train_step(MODEL, tx), state_of(tx), state_of(tx)
    for seed in (0, None, 1):
        with_bad, _ = step(with_bad, *(bad if seed is None else batch(2, 8, seed)))
    for seed in (0, 1):
        without, _ = step(without, *batch(2, 8, seed))
    for name, x in floats((with_bad.params, moments(with_bad))).items():
        assert x.tobytes() == floats((without.params, moments(without)))[name].tobytes(), name


def test_the_learning_rate_follows_the_iteration_past_updates_left_out():
    bad, rates = poison_data(None, *batch(2, 8), 0)[1:], []
    for first in (batch(2, 8), bad):
        tx = optax.scale_by_schedule(lambda step: -(1.0 + step))
        step, state = make_train_step(MODEL, tx), state_of(tx)
        for tokens, targets in (first, bad):
            state, _ = step(state, tokens, targets)
        state = state.replace(params=jax.tree.map(jnp.array, PARAMS))
        state, _ = step(state, *batch(2, 8, 7))
        rates.append(floats(state.params))
    for name, x in rates[0].items():
        np.testing.assert_array_equal(x, rates[1][name], err_msg=name)
        assert (x != floats(PARAMS)[name]).any()


def history(losses, norms):
    """As many of the last losses and norms, nothing before them."""
    recent = np.full((2, module.WINDOW), -1, np.float32)
    recent[:, module.WINDOW - len(losses) :] = losses, norms
    return recent


SPREAD = np.random.default_rng(0).normal(0, 1, 128)


@pytest.mark.parametrize(
    ("loss", "norm", "n", "zscore", "spike"),
    [
        (3 + 0.9, 1.0, 128, 6, True),  # of losses around 3, 0.1 apart
        (3 + 0.3, 1.0, 128, 6, False),
        (3 + 0.3, 1.0, 128, 2, True),
        (3 - 0.9, 1.0, 128, 6, False),  # only what is above
        (3.0, 1 + 0.9, 128, 6, True),  # of norms around 1, 0.1 apart
        (3.0, 1 + 0.3, 128, 6, False),
        (9.0, 9.0, 31, 6, False),  # too few to tell
        (9.0, 9.0, 32, 6, True),
    ],
)
def test_a_spike_stands_out_from_the_last_updates(loss, norm, n, zscore, spike):  # C23
    recent = history(3 + 0.1 * SPREAD[:n], 1 + 0.1 * SPREAD[:n])
    found = module.is_spike(jnp.array(recent), jnp.float32(loss), jnp.float32(norm), zscore)
    assert bool(found) == spike


def test_a_spike_of_ten_sigma_is_left_out_and_counted_when_asked_for():  # C23
    """And the next ones too: it does not come into what they are held against."""
    plain, guarded = STEP, make_train_step(MODEL, ADAMW, spike_zscore=6.0)
    _, found = STEP(state_of(ADAMW), *batch(2, 8))
    loss, norm = float(found["loss"]), float(found["grad_norm"])

    def state_after(sigmas):
        """As of a run whose losses have been ``sigmas`` deviations below this one's."""
        losses, norms = loss - 0.1 * sigmas + 0.1 * SPREAD, norm + 0.1 * SPREAD
        return state_of(ADAMW, recent=history(losses, np.maximum(norms, 0)))

    state = assert_left_out(guarded, state_after(10), *batch(2, 8))
    assert state.recent.tobytes() == state_after(10).recent.tobytes()
    assert_left_out(guarded, state, *batch(2, 8))

    calm, metrics = guarded(state_after(0), *batch(2, 8))
    assert metrics["skipped"] == 0
    np.testing.assert_allclose(calm.recent[:, -1], [loss, norm], rtol=1e-6)
    np.testing.assert_array_equal(calm.recent[:, :-1], state_after(0).recent[:, 1:])

    untouched, metrics = plain(state_after(10), *batch(2, 8))
    without, _ = plain(state_of(ADAMW), *batch(2, 8))
    assert metrics["skipped"] == 0
    for name, x in floats((without.params, without.opt_state)).items():
        assert x.tobytes() == floats((untouched.params, untouched.opt_state))[name].tobytes()
