"""How a run starts: anew, where it stopped (or nanoGPT's did), or from others' weights."""

import itertools
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from gpt_jax import checkpoint
from gpt_jax.commandline import save_config, saved_run
from gpt_jax.config import TrainConfig
from gpt_jax.errors import DamageError, UserError
from gpt_jax.integrity import check_sizes
from gpt_jax.interop import gpt2, nanogpt_checkpoint
from gpt_jax.model import GPT
from gpt_jax.optimizer import make_optimizer
from gpt_jax.pretrained import load, model_config
from gpt_jax.reporting.terminal import waiting
from gpt_jax.runtime import barrier, is_first
from gpt_jax.runtime.running import LOCK
from gpt_jax.sharding import placed, state_sharding
from gpt_jax.tokenizer import Tokenizer, from_json
from gpt_jax.train_step import TrainState, init_state

SIZES = ("n_layer", "n_head", "n_embd", "block_size", "bias", "activation")


def first_state(config: TrainConfig, model: GPT) -> Callable[[], TrainState]:
    """Return the function that makes a model's first state from the seed."""

    def new() -> TrainState:
        init_key, dropout_key = jax.random.split(jax.random.key(config.seed))
        params = model.init(init_key, jnp.zeros((1, 1), jnp.int32))["params"]
        return init_state(params, make_optimizer(config), dropout_key)

    return new


def saved_meta(config: TrainConfig, before: float = math.inf) -> dict[str, Any] | None:
    """Return the JSON of the newest checkpoint ``before`` a step, None where a run starts anew.

    One that cannot be read is named and passed over. Raises UserError where it is another run's,
    where there must be one and is none, and for the first that is damaged if fallback=False.
    Of nanoGPT's ckpt.pt it is "iter" and "best_val_loss"; "saved", the iteration that out_dir has a
    checkpoint of, is 0.
    """
    if nanogpt_checkpoint.is_one(config.init_from):
        theirs = nanogpt_checkpoint.read(config.init_from)
        return {"iter": theirs.iter_num, "best_val_loss": theirs.best_val_loss, "saved": 0}
    if config.init_from not in ("resume", "auto"):
        return None
    have = checkpoint.steps(config.out_dir)
    for step in reversed(have):
        if step < before:
            try:
                meta = checkpoint.read_meta(config.out_dir, step)
            except DamageError as error:
                pass_over(config, error)
            else:
                refuse_another_run(config, meta["config"])
                return meta
    if have:
        raise UserError(
            f"no checkpoint in {config.out_dir} is whole: --init_from=scratch starts anew and sets "
            "what is there aside"
        )
    if config.init_from == "resume":
        theirs = Path(config.out_dir) / "ckpt.pt"
        hint = f": to go on from nanoGPT's, --init_from={theirs}" if theirs.is_file() else ""
        problem = f"init_from=resume: {config.out_dir} has no checkpoint to resume from"
        raise UserError(problem + hint)
    return None


def resume(
    config: TrainConfig,
    meta: dict[str, Any],
    dtype: str,
    tokenizer: Tokenizer,
    mesh: Mesh,
) -> tuple[GPT, TrainState, dict[str, Any]]:
    """Return model, state and JSON of the checkpoint of ``meta``, or of the last whole one before.

    Where that is nanoGPT's, init_from is its file. The state is restored to where it will stay.
    Steps that are passed over are moved to OUT_DIR/damaged-STEP.
    """
    if "saved" in meta:
        return *resume_nanogpt(config, dtype, tokenizer, mesh), meta
    while True:
        step, path = meta["iter"], checkpoint.folder(config.out_dir) / str(meta["iter"])
        refuse_another_tokenizer(config.out_dir, meta["tokenizer"], tokenizer)
        model = GPT(config.continued(model_config(meta, dtype, tokenizer)))
        try:
            check_sizes(path / "params", model.config)
            like = placed(mesh, jax.eval_shape(first_state(config, model)))
            with waiting(f"restoring iteration {step:,} from {config.out_dir}"):
                state = checkpoint.restore(config.out_dir, step, like, meta)
        except DamageError as error:
            pass_over(config, error)
            earlier = saved_meta(config, before=step)
            assert earlier is not None  # or it has raised
            if jax.process_count() > 1:  # the others may have read what this one could not
                move_damaged(config.out_dir, earlier["iter"])
                raise UserError(f"{error}: it is set aside, start the run again") from None
            meta = earlier
        else:
            if is_first() and not config.eval_only:
                move_damaged(config.out_dir, step)
            before = str(meta["model"].get("dtype"))
            if dtype != before:
                print(f"so far in {before:.20} products, from here in {dtype}")
            print(f"resuming from {config.out_dir}, iteration {step}")
            return model, state, meta


def resume_nanogpt(
    config: TrainConfig, dtype: str, tokenizer: Tokenizer, mesh: Mesh
) -> tuple[GPT, TrainState]:
    """Return model and state of nanoGPT's ckpt.pt: its parameters, moments and counts.

    One of the three trees of arrays after the other is in the host's memory. Raises UserError where
    the network or the tokenizer asked for is another.
    """
    theirs = nanogpt_checkpoint.read(config.init_from)
    for name in SIZES:
        if getattr(config, name) != (its := theirs.network.get(name, "gelu")):
            problem = f"{name}={getattr(config, name)!r}, but {theirs.path} has {name}={its!r}"
            raise UserError(f"{problem}: leave it out, the checkpoint says it")
    folder = Path(config.data_dir) / config.dataset
    nanogpt_checkpoint.refuse_other_ids(theirs, tokenizer, folder)
    model = GPT(config.continued(theirs.model_config(dtype, tokenizer.n_tokens)))
    count, *moments = theirs.moments()
    params, mu, nu = (
        nanogpt_checkpoint.place(mesh, theirs.tree(arrays)) for arrays in (theirs.model, *moments)
    )

    def rest() -> TrainState:
        key = jax.random.split(jax.random.key(config.seed))[1]
        state = init_state({}, make_optimizer(config), key)
        counted = nanogpt_checkpoint.with_adam(state.opt_state, count=jnp.int32(count))
        return state.replace(step=jnp.int32(theirs.iter_num), opt_state=counted)  # pyright: ignore

    state = jax.jit(rest, out_shardings=state_sharding(mesh, jax.eval_shape(rest)))()
    opt_state = nanogpt_checkpoint.with_adam(state.opt_state, mu=mu, nu=nu)
    print(f"resuming nanoGPT's run from {theirs.path}, iteration {theirs.iter_num}")
    return model, state.replace(params=params, opt_state=opt_state)  # pyright: ignore


def finetune(
    config: TrainConfig, dtype: str, tokenizer: Tokenizer, mesh: Mesh
) -> tuple[GPT, TrainState]:
    """Return a pretrained model, its context cropped to block_size, and a first state with it."""
    with waiting(f"loading the weights of {config.init_from}"):
        model, params, its = load(config.init_from, dtype=dtype, mesh=mesh)
    refuse_another_tokenizer(config.init_from, its.to_json(), tokenizer)
    params = crop_block_size(params, config.block_size)
    key = jax.random.split(jax.random.key(config.seed))[1]

    def first(params):
        return init_state(params, make_optimizer(config), key)

    sharding = state_sharding(mesh, jax.eval_shape(first, params))
    state = jax.jit(first, out_shardings=sharding)(params)
    return GPT(config.continued(model.config)), state


def crop_block_size(params: dict[str, Any], block_size: int) -> dict[str, Any]:
    """Return params for a shorter context: the first ``block_size`` rows of wpe.

    Raises UserError if the model's own context is shorter.
    """
    rows = params["wpe"]["weight"].shape[0]
    if block_size > rows:
        raise UserError(f"block_size={block_size} is more than the {rows} the model was made with")
    return {**params, "wpe": {"weight": params["wpe"]["weight"][:block_size]}}


def pass_over(config: TrainConfig, error: DamageError) -> None:
    """Say that a checkpoint is damaged; raise UserError where none may be passed over."""
    if not config.fallback:
        raise UserError(f"{error}; --fallback=True would go on from an earlier checkpoint")
    print(f"passed over: {error}", file=sys.stderr)


def move_damaged(out_dir: str, good: int) -> None:
    """Move the steps after a good one out of the way, to OUT_DIR/damaged-STEP."""
    for step in checkpoint.steps(out_dir):
        if step > good:
            move(checkpoint.folder(out_dir) / str(step), Path(out_dir), f"damaged-{step}")


def make_room(config: TrainConfig, meta: dict[str, Any]) -> None:
    """Write down the config of a run that begins; if it is new, an earlier one makes way.

    One that has come to max_iters before keeps the config that it was trained with. Raises
    UserError where out_dir is a model of Hugging Face's: its config.json would be lost.
    """
    if gpt2.is_theirs(Path(config.out_dir)):
        raise UserError(
            f"out_dir={config.out_dir} holds a model of Hugging Face's, whose config.json a run "
            "would replace: name another --out_dir"
        )
    if is_first():
        if config.init_from not in ("resume", "auto"):
            set_aside(config.out_dir, config.init_from)
        over = "config" in meta and meta["iter"] >= config.max_iters
        if over:
            print(finished(config, meta["iter"], meta["config"].get("max_iters")))
        if not (over and saved_run(config.out_dir)):
            save_config(config)
    barrier()


def finished(config: TrainConfig, iteration: int, its_own: Any) -> str:
    """Return why a run has nothing left to train, and how it would: ``its_own`` max_iters."""
    further = f"--max_iters={2 * max(iteration, 1)} trains on"
    if type(its_own) is int and its_own > iteration:
        further = f"--init_from=resume without a config goes on to its own max_iters={its_own}"
    return (
        f"{config.out_dir} is at iteration {iteration}, max_iters={config.max_iters}: nothing is "
        f"left to train; {further}"
    )


def set_aside(out_dir: str, source: str) -> None:
    """Move an earlier run's files out of the way of a new one: to OUT_DIR/previous-N.

    What the new one starts from, should its ``source`` lie there, stays.
    """
    if not checkpoint.steps(out_dir):
        return
    numbers = itertools.count(1)
    there = next(p for n in numbers if not (p := Path(out_dir) / f"previous-{n}").exists())
    there.mkdir()
    # the checkpoints last: cut off before that, it is a run still, and the rest follows it
    for path in sorted(Path(out_dir).iterdir(), key=lambda path: path.name == "checkpoints"):
        needed = Path(source).resolve().is_relative_to(path.resolve())
        needed |= path.suffix in (".pt", ".pth") or path.name == "meta.pkl"  # nanoGPT's
        if path.name != LOCK and not path.name.startswith("previous-") and not needed:
            path.rename(there / path.name)
    print(f"{out_dir} held a run: it is in {there} now")


def move(path: Path, folder: Path, name: str) -> None:
    """Move a folder to ``folder / name``, or where that is taken to the first free name-N."""
    names = itertools.chain([name], (f"{name}-{n}" for n in itertools.count(2)))
    path.rename(next(p for n in names if not (p := folder / n).exists()))


def refuse_another_run(config: TrainConfig, saved: dict[str, Any]) -> None:
    """Raise UserError for the first thing in which the saved run is not the one asked for."""
    names = [*SIZES] + ["dataset"] * (config.init_from == "auto")
    # "auto" is another dtype on other hardware; one that is named is meant
    names += ["dtype"] * ("auto" not in (config.dtype, saved.get("dtype", "auto")))
    for name in names:
        if getattr(config, name) != saved.get(name):
            raise UserError(
                f"{name}={getattr(config, name)!r}, but the run in {config.out_dir} has {name}="
                f"{saved.get(name)!r:.60}: give it that, or another --out_dir to start anew"
            )


def refuse_another_tokenizer(source: str, its: dict[str, Any], tokenizer: Tokenizer) -> None:
    """Raise UserError where a model's ids do not mean what the data set's ids mean."""
    if its != tokenizer.to_json() and from_json(its).spec != tokenizer.spec:
        raise UserError(
            f"{source} was trained with a {its.get('kind')!s:.20} tokenizer unlike this data set's "
            f"({tokenizer.spec['kind']}, {tokenizer.n_tokens} ids): take a --dataset made for it"
        )
