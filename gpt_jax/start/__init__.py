"""How a run starts that is not new: where it stopped, if that is whole, or from others' weights."""

import itertools
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from gpt_jax import checkpoint
from gpt_jax.commandline import save_config
from gpt_jax.config import TrainConfig
from gpt_jax.errors import DamageError, UserError
from gpt_jax.integrity import check_sizes
from gpt_jax.model import GPT
from gpt_jax.optimizer import make_optimizer
from gpt_jax.pretrained import load, model_config
from gpt_jax.runtime import barrier, is_first
from gpt_jax.runtime.running import LOCK
from gpt_jax.sharding import placed, state_sharding
from gpt_jax.tokenizer import Tokenizer, from_json
from gpt_jax.train_step import TrainState, init_state

SIZES = ("n_layer", "n_head", "n_embd", "block_size", "bias", "activation")


def saved_meta(config: TrainConfig, before: float = math.inf) -> dict[str, Any] | None:
    """Return the JSON of the newest checkpoint ``before`` a step, None where a run starts anew.

    One that cannot be read is named and passed over. Raises UserError where it is another run's,
    where there must be one and is none, and for the first that is damaged if fallback=False.
    """
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
        raise UserError(f"init_from=resume: {config.out_dir} has no checkpoint to resume from")
    return None


def resume(
    config: TrainConfig,
    meta: dict[str, Any],
    dtype: str,
    tokenizer: Tokenizer,
    mesh: Mesh,
    first_state: Callable[[TrainConfig, GPT], Callable[[], TrainState]],
) -> tuple[GPT, TrainState, dict[str, Any]]:
    """Return model, state and JSON of the checkpoint of ``meta``, or of the last whole one before.

    ``first_state`` makes the function that makes a new state, for its shapes. The state is restored
    to where it will stay. Steps that are passed over are moved to OUT_DIR/damaged-STEP.
    """
    while True:
        step, path = meta["iter"], checkpoint.folder(config.out_dir) / str(meta["iter"])
        refuse_another_tokenizer(config.out_dir, meta["tokenizer"], tokenizer)
        model = GPT(config.continued(model_config(meta, dtype, tokenizer)))
        try:
            check_sizes(path / "params", model.config)
            like = placed(mesh, jax.eval_shape(first_state(config, model)))
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
            return model, state, meta


def finetune(
    config: TrainConfig, dtype: str, tokenizer: Tokenizer, mesh: Mesh
) -> tuple[GPT, TrainState]:
    """Return a pretrained model, its context cropped to block_size, and a first state with it."""
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


def make_room(config: TrainConfig, new: bool) -> None:
    """Write down the config of a run that begins; if it is ``new``, an earlier one makes way."""
    if is_first():
        if new:
            set_aside(config.out_dir)
        save_config(config)
    barrier()


def set_aside(out_dir: str) -> None:
    """Move an earlier run's files out of the way of a new one: to OUT_DIR/previous-N."""
    if not checkpoint.steps(out_dir):
        return
    numbers = itertools.count(1)
    there = next(p for n in numbers if not (p := Path(out_dir) / f"previous-{n}").exists())
    there.mkdir()
    # the checkpoints last: cut off before that, it is a run still, and the rest follows it
    for path in sorted(Path(out_dir).iterdir(), key=lambda path: path.name == "checkpoints"):
        if path.name != LOCK and not path.name.startswith("previous-"):
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
