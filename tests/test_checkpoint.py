"""What is saved comes back bit for bit, and nothing that was good is lost."""

import functools
from contextlib import closing
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from gpt_jax import GPT, checkpoint
from gpt_jax.checkpoint import Checkpoints
from gpt_jax.config import TrainConfig
from gpt_jax.errors import UserError
from gpt_jax.optimizer import make_optimizer
from gpt_jax.sharding import batch_sharding, make_mesh, placed, state_sharding
from gpt_jax.tokenizer import char_tokenizer
from gpt_jax.train_step import TrainState, init_state, make_train_step

CONFIG = TrainConfig(n_layer=1, n_head=2, n_embd=16, block_size=8, bias=True, device="cpu")
MODEL = GPT(CONFIG.model_config(20, "float32"))
TX = make_optimizer(CONFIG)
ONE, EIGHT = make_mesh("cpu:0"), make_mesh(fsdp=4)
MESHES = {
    "1": ONE,
    "data=8": make_mesh(),
    "fsdp=8": make_mesh(fsdp=8),
    "data=2": make_mesh(data=2),
    "fsdp=4": make_mesh(data=1, fsdp=4),
    "2x4": make_mesh(data=2, fsdp=4),
    "2x2x2": make_mesh(data=2, fsdp=2, tensor=2),
}
META = {
    "iter": 1,
    "best_val_loss": 1.5,
    "val_loss": None,
    "wandb_id": None,
    "config": vars(CONFIG),
    "model": vars(MODEL.config),
    "tokenizer": char_tokenizer("abc").to_json(),
}


@functools.cache
def shapes():
    def new():
        params = MODEL.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
        return init_state(params, TX)

    return jax.eval_shape(new)


def real_state(mesh, seed=0):
    """A TrainState as of a run under way: nothing in it is zero or as it was at the start."""
    random = np.random.default_rng(seed)

    def leaf(x):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.random.key(seed + 7)
        if jnp.issubdtype(x.dtype, jnp.integer):
            return np.asarray(random.integers(5, 1000, x.shape), x.dtype)
        return random.uniform(0.01, 0.1, x.shape).astype(x.dtype)

    state = jax.tree.map(leaf, shapes()).replace(loss_scale=np.float32(4096))
    return jax.device_put(state, state_sharding(mesh, state))


def small_state(number=0):
    zero = jnp.zeros(())
    return TrainState(
        {"a": jnp.full(3, number)}, (), zero, jax.random.key(0), zero, zero, zero, zero
    )


def plain(state):
    """A copy in plain numpy, the key as numbers."""
    state = state.replace(key=jax.random.key_data(state.key))
    return jax.tree.map(lambda x: np.array(x, copy=True), state)


def named(tree):
    """The leaves by their path, as in the digests."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): x for path, x in leaves}


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        assert x.shape == y.shape
        assert x.tobytes() == y.tobytes()


def save_all(out_dir, losses, keep=2, keep_every=0, **config):
    """Save a small checkpoint for each loss, at steps 10, 20, ..."""
    with closing(Checkpoints(str(out_dir), keep, keep_every)) as checkpoints:
        for i, loss in enumerate(losses, 1):
            meta = {**META, "iter": 10 * i, "val_loss": loss, "config": {**vars(CONFIG), **config}}
            checkpoints.save(small_state(i), meta)
    return str(out_dir)


def save_one(out_dir, state, meta):
    with closing(Checkpoints(str(out_dir), 2)) as checkpoints:
        checkpoints.save(state, meta)


def restored(out_dir, step, mesh):
    meta = checkpoint.read_meta(str(out_dir), step)
    return checkpoint.restore(str(out_dir), step, placed(mesh, shapes()), meta)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A real state, saved from eight devices."""
    out_dir = str(tmp_path_factory.mktemp("run"))
    state = real_state(EIGHT)
    save_one(out_dir, state, {**META, "iter": 600, "val_loss": 1.5})
    return out_dir, plain(state)


@pytest.mark.parametrize("mesh", MESHES.values(), ids=MESHES)
def test_a_state_comes_back_bit_for_bit_on_any_mesh(run, mesh):
    """T8, T11, C11: moments, counters, key and loss scale included, which nanoGPT loses."""
    out_dir, saved = run
    state = restored(out_dir, 600, mesh)
    assert_same(plain(state), saved)
    assert jnp.issubdtype(state.key.dtype, jax.dtypes.prng_key)
    assert float(state.loss_scale) == 4096
    layouts = jax.tree.leaves(state_sharding(mesh, state))
    for leaf, layout in zip(jax.tree.leaves(state), layouts, strict=True):
        assert leaf.sharding.is_equivalent_to(layout, leaf.ndim)


def test_a_run_saved_on_eight_devices_goes_on_alike_on_one_two_four_and_2x4(run):
    """C11: the losses of twenty steps from the checkpoint."""
    losses = {}
    for name in ("1", "data=2", "fsdp=4", "2x4"):
        mesh = MESHES[name]
        state = restored(run[0], 600, mesh)
        step = make_train_step(MODEL, TX, mesh)
        losses[name] = []
        for seed in range(20):
            ids = np.random.default_rng(seed).integers(0, 20, (2, 2, 8, 8), dtype=np.int32)
            state, metrics = step(state, *jax.device_put(tuple(ids), batch_sharding(mesh, 3)))
            losses[name].append(float(metrics["loss"]))
    for name, found in losses.items():
        assert np.abs(np.subtract(found, losses["1"])).max() <= 5e-6, name
    assert len(set(losses["1"])) == 20


def test_a_state_saved_from_one_device_comes_back_on_eight(tmp_path):
    """C11."""
    state = real_state(ONE, seed=3)
    save_one(tmp_path, state, META)
    back = restored(tmp_path, 1, EIGHT)
    assert_same(plain(back), plain(state))


def test_parameters_restore_in_three_lines_of_plain_orbax(run):
    out_dir, saved = run
    path = Path(out_dir) / "checkpoints" / "600" / "params"

    params = ocp.StandardCheckpointer().restore(path)

    assert set(params) == {"wte", "wpe", "h", "ln_f"}
    assert set(params["h"]) == {"ln_1", "attn", "ln_2", "mlp"}
    assert set(params["h"]["attn"]) == {"c_attn", "c_proj"}
    assert set(params["h"]["mlp"]) == {"c_fc", "c_proj"}
    assert_same(jax.tree.map(np.asarray, params), saved.params)


def test_no_file_ties_a_checkpoint_to_the_devices_it_was_saved_from(run):
    """Saved from eight, it is arrays in memory to plain Orbax, on a laptop with one as well."""
    path = Path(run[0]) / "checkpoints" / "600"
    assert not list(path.rglob("_sharding"))
    params = ocp.StandardCheckpointer().restore(path / "params")
    assert {type(leaf) for leaf in jax.tree.leaves(params)} == {np.ndarray}


def test_the_json_beside_it_says_what_was_said(run):
    out_dir, _ = run
    meta = checkpoint.read_meta(out_dir, 600)
    assert {name: meta[name] for name in META} == {**META, "iter": 600, "val_loss": 1.5}
    assert meta["digests"]["params"].keys() == named(shapes().params).keys()
    items = {path.name for path in (Path(out_dir) / "checkpoints" / "600").iterdir()}
    assert {"params", "optimizer", "meta"} <= items


def test_training_on_while_a_save_runs_does_not_change_what_is_saved(tmp_path):
    """C28, C35: the step donates the very arrays that are being written."""
    state = real_state(ONE, seed=5)
    saved = plain(state)
    step = make_train_step(MODEL, TX)
    tokens = jax.device_put(np.arange(16, dtype=np.int32).reshape(1, 2, 8), batch_sharding(ONE, 3))
    checkpoints = Checkpoints(str(tmp_path), 1)
    before = state
    checkpoints.save(state, META)
    for _ in range(3):
        state, _ = step(state, tokens, tokens)
    assert before.params["wte"]["weight"].is_deleted()
    assert not np.array_equal(state.params["wte"]["weight"], saved.params["wte"]["weight"])
    checkpoints.close()
    back = restored(tmp_path, 1, ONE)
    assert_same(plain(back), saved)


@pytest.mark.parametrize(
    ("losses", "keep", "kept"),
    [
        ([3.0, 1.0, 2.0, 2.5], 1, [20, 40]),
        ([3.0, 1.0, 2.0, 2.5, 2.6], 2, [20, 40, 50]),
        ([3.0, 2.0, 1.0], 1, [30]),  # the newest is the best
        ([float("nan"), 2.0, 3.0], 3, [10, 20, 30]),
        ([3.0, 1.0, None, None], 1, [20, 40]),  # saves between evaluations have no loss
        ([None, None, None], 2, [20, 30]),
        ([2.0, float("nan"), float("nan"), float("nan")], 1, [10, 40]),
        ([float("nan"), 2.0, 3.0, float("inf")], 1, [20, 40]),
    ],
)
def test_the_newest_and_the_best_are_kept(tmp_path, losses, keep, kept):
    """T18; a run that diverges to nan does not lose its best."""
    out_dir = save_all(tmp_path, losses, keep)
    assert checkpoint.steps(out_dir) == kept
    finite = [loss for loss in losses if loss is not None and np.isfinite(loss)]
    best = 10 * (1 + losses.index(min(finite))) if finite else kept[-1]
    assert checkpoint.choose(out_dir, "best")[0] == best
    params = checkpoint.folder(out_dir) / str(best) / "params"
    assert ocp.StandardCheckpointer().restore(params)["a"].tolist() == [best // 10] * 3


def test_a_resumed_run_still_knows_which_checkpoint_is_the_best(tmp_path):
    """T18: over a restart of the process that writes."""
    out_dir = save_all(tmp_path, [3.0, 1.0, 2.0], 1)
    with closing(Checkpoints(out_dir, 1)) as checkpoints:
        for number, loss in ((40, 2.5), (50, 1.5)):
            checkpoints.save(small_state(), {**META, "iter": number, "val_loss": loss})
    assert checkpoint.steps(out_dir) == [20, 50]
    assert checkpoint.choose(out_dir, "best") == [20, 50]


def test_a_step_is_chosen_by_number_latest_best_or_as_nanogpt_would(tmp_path):
    """S1, T18."""
    out_dir = save_all(tmp_path / "all", [3.0, 1.0, 2.0], 3)
    assert checkpoint.steps(out_dir) == [10, 20, 30]
    assert checkpoint.choose(out_dir, "latest") == [30, 20, 10]
    assert checkpoint.choose(out_dir, "best") == [20, 30, 10]
    assert checkpoint.choose(out_dir, "10") == [10]
    assert checkpoint.choose(out_dir, "")[0] == 30  # ckpt.pt is overwritten at each evaluation
    improved = save_all(tmp_path / "best", [3.0, 1.0, 2.0], 3, always_save_checkpoint=False)
    assert checkpoint.choose(improved, "") == [20, 30, 10]
    assert checkpoint.choose(improved, "latest") == [30, 20, 10]


def test_a_step_that_is_not_there_is_refused_with_those_that_are(tmp_path):
    out_dir = save_all(tmp_path / "run", [3.0, 1.0])
    with pytest.raises(UserError, match=r"has no checkpoint of step 15, only of \[10, 20\]"):
        checkpoint.choose(out_dir, "15")
    for empty in (tmp_path / "nothing", tmp_path / "run" / "checkpoints" / "10"):
        for step in ("", "latest", "best", "10"):
            with pytest.raises(UserError, match=r"no checkpoint in .*: train first") as error:
                checkpoint.choose(str(empty), step)
            assert str(empty) in str(error.value)


def test_what_an_interrupted_save_left_is_no_checkpoint_and_is_in_nobodys_way(tmp_path):
    """C14."""
    out_dir = save_all(tmp_path, [3.0])
    left = checkpoint.folder(out_dir) / "20.orbax-checkpoint-tmp"
    (left / "params").mkdir(parents=True)
    assert checkpoint.steps(out_dir) == [10]
    assert checkpoint.choose(out_dir, "latest") == [10]
    save_one(out_dir, small_state(2), {**META, "iter": 20})
    assert not left.exists()
    assert checkpoint.steps(out_dir) == [10, 20]
    params = checkpoint.folder(out_dir) / "20" / "params"
    assert ocp.StandardCheckpointer().restore(params)["a"].tolist() == [2, 2, 2]


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", "{}", "5", "[" * 100_000, '{"iter": 1}', b"\xff\xfe", None],
    ids=["empty", "cut", "list", "null", "bare", "number", "deep", "half", "bytes", "gone"],
)
def test_a_damaged_json_is_refused_by_name_and_blocks_no_other_checkpoint(tmp_path, text):
    """C18, C26."""
    out_dir = save_all(tmp_path, [3.0, 1.0])
    path = checkpoint.folder(out_dir) / "10" / "meta" / "metadata"
    path.unlink() if text is None else path.write_bytes(
        text if isinstance(text, bytes) else text.encode()
    )
    with pytest.raises(UserError) as error:
        checkpoint.read_meta(out_dir, 10)
    assert str(error.value).startswith(f"{path} cannot be read")
    assert "\n" not in str(error.value)
    assert checkpoint.choose(out_dir, "latest") == checkpoint.choose(out_dir, "") == [20, 10]
