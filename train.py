"""Train a GPT: the whole run, top to bottom.

python train.py                                                # the quickstart
python train.py config/train_shakespeare_char.py --max_iters=2000
python train.py train_gpt2 --dataset=openwebtext
"""

import sys
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from gpt_jax import checkpoint, reporting
from gpt_jax.commandline import compact, make_writable, notes, save_config
from gpt_jax.config import TrainConfig, parse
from gpt_jax.data import batches, evaluation_starts, open_split
from gpt_jax.errors import UserError, exit_code
from gpt_jax.evaluation import Evaluation, evaluate, make_eval_step
from gpt_jax.metrics import flops_per_token
from gpt_jax.model import GPT, count_params, crop_block_size
from gpt_jax.optimizer import decay_groups, learning_rate, make_optimizer
from gpt_jax.prepare import prepare_on_first_use
from gpt_jax.prepare.dataset import for_dataset
from gpt_jax.pretrained import load, model_config, product_dtype
from gpt_jax.reporting.peak import peak_flops
from gpt_jax.reporting.summary import summary
from gpt_jax.runtime import Stop, agree, barrier, connected, in_turn, is_first, use_platform
from gpt_jax.sharding import (
    batch_sharding,
    make_mesh,
    micro_batches,
    placed,
    state_sharding,
)
from gpt_jax.tokenizer import Tokenizer
from gpt_jax.train_step import TrainState, init_state, make_train_step


@exit_code
def main(argv: list[str]) -> None:
    """Run a training run from its command line, as one of its processes if it has several."""
    config = parse(argv)
    with connected(config, "start the run again with --init_from=resume"):
        train(config)


def train(config: TrainConfig) -> None:
    """Train, from the config to the last checkpoint."""
    # ---- 1. What is asked for -------------------------------------------------------------------
    print(compact(config), *notes(config), sep="\n")
    resumed = latest_step(config)
    meta = {"iter": 0, "best_val_loss": None}
    if resumed is not None:
        meta = checkpoint.read_meta(config.out_dir, resumed)
        refuse_another_run(config, meta["config"])
    if not config.eval_only:
        make_writable(config.out_dir)

    # ---- 2. What it reads -----------------------------------------------------------------------
    folder = Path(config.data_dir) / config.dataset
    in_turn(lambda: prepare_on_first_use(config.dataset, folder))
    tokenizer, vocab_size, token_dtype = for_dataset(folder)
    splits = {
        name: open_split(folder, name, vocab_size, token_dtype, config.block_size)
        for name in ("train", "val")
    }
    agree({"the checkpoint to resume from": resumed,
           **{f"tokens in {s.path}": len(s.tokens) for s in splits.values()}})  # fmt: skip

    # ---- 3. Where it runs -----------------------------------------------------------------------
    use_platform(config.device)
    mesh = make_mesh(config.device, config.data, config.fsdp, config.tensor)
    dtype = product_dtype(config.dtype)
    A, B = micro_batches(config, mesh)
    tokens_per_iter = A * B * config.block_size
    print(f"{reporting.describe(mesh)}, {dtype} products")
    print(f"tokens per iteration will be: {tokens_per_iter:,}")

    # ---- 4. What it trains ----------------------------------------------------------------------
    if resumed is not None:
        print(f"resuming from {config.out_dir}, iteration {resumed}")
        model, state = resume(config, resumed, meta, tokenizer, dtype, mesh)
    elif config.init_from in ("scratch", "auto"):
        model = GPT(config.model_config(vocab_size, dtype, tokenizer.n_tokens))
        first = first_state(config, model)
        state = jax.jit(first, out_shardings=state_sharding(mesh, jax.eval_shape(first)))()
    else:
        model, state = finetune(config, tokenizer, dtype, mesh)
    splits = {name: replace(s, vocab_size=model.config.vocab_size) for name, s in splits.items()}
    (decayed, n_decayed), (others, n_others) = decay_groups(state.params)
    print(f"number of parameters: {count_params(state.params) / 1e6:.2f}M")
    print(f"num decayed parameter tensors: {decayed}, with {n_decayed:,} parameters")
    print(f"num non-decayed parameter tensors: {others}, with {n_others:,} parameters")

    # ---- 5. What an iteration and an evaluation are ----------------------------------------------
    train_step = make_train_step(model, make_optimizer(config), mesh)
    eval_step = make_eval_step(model, mesh)
    starts = {
        name: evaluation_starts(split, config.eval_iters * config.batch_size)
        for name, split in splits.items()
    }

    def loss_of(name: str, counting_bytes: bool = False) -> Evaluation:
        return evaluate(
            eval_step, state.params, splits[name], starts[name], B, mesh,
            tokenizer if counting_bytes else None,
        )  # fmt: skip

    if config.eval_only:
        train, val = loss_of("train"), loss_of("val")
        print(f"step {meta['iter']}: train loss {train.loss:.4f}, val loss {val.loss:.4f}")
        return

    # ---- 6. The loop ----------------------------------------------------------------------------
    if is_first():
        if resumed is None:
            checkpoint.set_aside(config.out_dir)
        save_config(config)
    barrier()
    flops = flops_per_token(model.config, count_params(state.params)) * tokens_per_iter
    peak = (config.peak_flops or peak_flops(mesh.devices.flat[0]) or 0) * mesh.size or None
    report = reporting.Report(
        config, meta["iter"], tokens_per_iter, flops, peak, meta.get("wandb_id")
    )
    manager = checkpoint.open_checkpoints(config.out_dir, config.keep)
    best, saved = meta["best_val_loss"], resumed

    def save(iteration: int, val_loss: float | None) -> None:
        nonlocal saved
        if saved == iteration or iteration == 0:
            return
        checkpoint.save(
            manager, state,
            {"iter": iteration, "best_val_loss": best, "val_loss": val_loss,
             "wandb_id": report.wandb_id, "config": vars(config), "model": vars(model.config),
             "tokenizer": tokenizer.to_json()},
            val_loss,
        )  # fmt: skip
        saved = iteration

    pending = None  # the metrics of the iteration before: read while the device does this one
    with closing(report), closing(manager), Stop() as stop:
        stream = batches(
            splits["train"], (A, B), config.seed, meta["iter"], batch_sharding(mesh, 3)
        )
        end = max(config.max_iters, meta["iter"])  # a finished run is evaluated once more
        for iteration in range(meta["iter"], end + 1):
            last, stopped = iteration == end, stop.at(iteration)
            if iteration % config.eval_interval == 0 or last or stopped:
                if pending:
                    report.step(*pending)
                    pending = None
                if stopped:
                    save(iteration, None)
                    break
                train, val = loss_of("train"), loss_of("val", last)
                lr = learning_rate(config, iteration)
                report.evaluation(iteration, train.loss, val.loss, lr)
                improved = best is None or val.loss < best
                best = val.loss if improved else best
                if improved or config.always_save_checkpoint or last:
                    if iteration:
                        report.say(f"saving checkpoint to {config.out_dir}")
                    save(iteration, val.loss)
                report.resume_clock()
            elif config.save_interval and iteration % config.save_interval == 0:
                save(iteration, None)
            if last:
                break
            state, metrics = train_step(state, *next(stream))
            if pending:
                report.step(*pending)
            pending = (iteration, metrics, learning_rate(config, iteration))

    # ---- 7. The end -----------------------------------------------------------------------------
    if stopped and saved is None:
        print("stopped before the first iteration: there is nothing to save yet")
    elif stopped:
        print(f"stopped at iteration {iteration} and saved: --init_from=resume goes on from there")
    else:
        summary(config, val, model, state.params, tokenizer)


def latest_step(config: TrainConfig) -> int | None:
    """Return the step to resume from, None to start anew; UserError where there must be one."""
    if config.init_from not in ("resume", "auto"):
        return None
    have = checkpoint.steps(config.out_dir)
    if config.init_from == "resume" and not have:
        raise UserError(f"init_from=resume: {config.out_dir} has no checkpoint to resume from")
    return have[-1] if have else None


def refuse_another_run(config: TrainConfig, saved: dict[str, Any]) -> None:
    """Raise UserError for the first thing in which the saved run is not the one asked for."""
    names = ["n_layer", "n_head", "n_embd", "block_size", "bias", "activation"]
    for name in names + ["dataset"] * (config.init_from == "auto"):
        if getattr(config, name) != saved[name]:
            raise UserError(
                f"{name}={getattr(config, name)!r}, but the run in {config.out_dir} has {name}="
                f"{saved[name]!r}: give it that, or another --out_dir to start anew"
            )


def refuse_another_tokenizer(source: str, its: dict[str, Any], tokenizer: Tokenizer) -> None:
    """Raise UserError where a model's ids do not mean what the data set's ids mean."""
    if its != tokenizer.to_json():
        raise UserError(
            f"{source} was trained with a {its['kind']} tokenizer unlike this data set's "
            f"({tokenizer.spec['kind']}, {tokenizer.n_tokens} ids): take a --dataset made for it"
        )


def first_state(config: TrainConfig, model: GPT) -> Callable[[], TrainState]:
    """Return the function that makes a model's first state from the seed."""

    def new() -> TrainState:
        init_key, dropout_key = jax.random.split(jax.random.key(config.seed))
        params = model.init(init_key, jnp.zeros((1, 1), jnp.int32))["params"]
        return init_state(params, make_optimizer(config), dropout_key)

    return new


def resume(
    config: TrainConfig,
    step: int,
    meta: dict[str, Any],
    tokenizer: Tokenizer,
    dtype: str,
    mesh: Mesh,
) -> tuple[GPT, TrainState]:
    """Return the model and the state of a checkpoint, restored to where it will stay."""
    refuse_another_tokenizer(config.out_dir, meta["tokenizer"], tokenizer)
    model = GPT(config.continued(model_config(meta, dtype, tokenizer)))
    shapes = jax.eval_shape(first_state(config, model))
    return model, checkpoint.restore(config.out_dir, step, placed(mesh, shapes))


def finetune(
    config: TrainConfig, tokenizer: Tokenizer, dtype: str, mesh: Mesh
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


if __name__ == "__main__":
    sys.exit(main())
