"""Train a GPT: the whole run, top to bottom.

python train.py                                                # the quickstart
python train.py config/train_shakespeare_char.py --max_iters=2000
python train.py train_gpt2 --dataset=openwebtext
"""

import math
import sys
from contextlib import closing
from dataclasses import replace
from typing import Any

import jax

from gpt_jax import reporting
from gpt_jax.checkpoint import Checkpoints
from gpt_jax.commandline import compact, notes
from gpt_jax.config import TrainConfig, parse
from gpt_jax.data import batches, evaluation_starts
from gpt_jax.errors import RunError, Stopped, UserError, exit_code
from gpt_jax.evaluation import Evaluation, evaluate, make_eval_step
from gpt_jax.model import GPT
from gpt_jax.optimizer import learning_rate, make_optimizer
from gpt_jax.prepare.checked import open_dataset, sizes
from gpt_jax.prepare.mixture import prepare_sets
from gpt_jax.pretrained import product_dtype
from gpt_jax.reporting.bad_numbers import why
from gpt_jax.reporting.norms import gradient_norms
from gpt_jax.reporting.sinks import check_installed, start_wandb
from gpt_jax.reporting.summary import resuming, summary
from gpt_jax.runtime import Stop, agree, connected, in_turn, use_platform
from gpt_jax.runtime.running import running
from gpt_jax.sharding import batch_sharding, make_mesh, micro_batches, state_sharding
from gpt_jax.start import finetune, first_state, make_room, resume, saved_meta
from gpt_jax.train_step import make_train_step


@exit_code
def main(argv: list[str]) -> None:
    """Run a training run from its command line, as one of its processes if it has several."""
    config = parse(argv)
    with connected(config, "start the run again with --init_from=resume"), running(config) as stop:
        train(config, stop)


def train(config: TrainConfig, stop: Stop) -> None:
    """Train, from the config to the last checkpoint, or to where a signal stops it."""
    # ---- 1. What is asked for -------------------------------------------------------------------
    print(compact(config), *notes(config), sep="\n")
    check_installed(config)
    saved = saved_meta(config)  # of the checkpoint to go on from
    meta: dict[str, Any] = saved or {"iter": 0, "best_val_loss": None}

    # ---- 2. What it reads -----------------------------------------------------------------------
    in_turn(lambda: prepare_sets(config.data_dir, config.dataset))
    tokenizer, vocab_size, splits = open_dataset(
        config.data_dir, config.dataset, config.block_size, log=print
    )
    agree({"the checkpoint to resume from": meta["iter"], **sizes(splits)})

    # ---- 3. Where it runs -----------------------------------------------------------------------
    use_platform(config.device, config.deterministic)
    mesh = make_mesh(config.device, config.data, config.fsdp, config.tensor)
    dtype = product_dtype(config.dtype)
    A, B = micro_batches(config, mesh)
    tokens_per_iter = A * B * config.block_size
    print(f"{reporting.describe(mesh)}, {dtype} products{reporting.kernels(config, mesh, dtype)}")
    print(f"tokens per iteration will be: {tokens_per_iter:,}")

    # ---- 4. What it trains ----------------------------------------------------------------------
    if saved:
        model, state, meta = resume(config, saved, dtype, tokenizer, mesh)
    elif config.init_from in ("scratch", "auto"):
        model = GPT(config.model_config(vocab_size, dtype, tokenizer.n_tokens))
        first = first_state(config, model)
        state = jax.jit(first, out_shardings=state_sharding(mesh, jax.eval_shape(first)))()
    else:
        model, state = finetune(config, dtype, tokenizer, mesh)
    splits = {name: replace(s, vocab_size=model.config.vocab_size) for name, s in splits.items()}
    print(reporting.describe_params(state.params))

    # ---- 5. What an iteration and an evaluation are ----------------------------------------------
    train_step = make_train_step(
        model, make_optimizer(config), mesh, config.spike_zscore, gradient_norms(config)
    )
    eval_step = make_eval_step(model, mesh)
    starts = {
        name: evaluation_starts(split, config.eval_iters * config.batch_size)
        for name, split in splits.items()
    }

    def loss_of(name: str, counting_bytes: bool = False) -> Evaluation:
        with reporting.evaluating(name, len(starts[name]) / B, stop.now) as stopped:
            return evaluate(
                eval_step, state.params, splits[name], starts[name], B, mesh,
                tokenizer if counting_bytes else None, stopped,
            )  # fmt: skip

    if config.eval_only:
        train, val = loss_of("train"), loss_of("val")
        print(f"step {meta['iter']}: train loss {train.loss:.4f}, val loss {val.loss:.4f}")
        return

    # ---- 6. The loop ----------------------------------------------------------------------------
    wandb = start_wandb(config, meta.get("wandb_id"))  # first: it may refuse
    make_room(config, meta)
    report = reporting.Report(config, mesh, model, state.params, tokens_per_iter, meta, wandb)
    checkpoints = Checkpoints(config.out_dir, config.keep, config.keep_every)
    best, at = meta["best_val_loss"], meta.get("saved", meta["iter"])  # at: the one saved last

    def save(iteration: int, val_loss: float | None = None) -> None:
        nonlocal at
        losses = {"best_val_loss": best, "val_loss": val_loss}
        if iteration != at:
            report.saving(iteration)
            checkpoints.save(
                state,
                {"iter": iteration, **losses, "wandb_id": report.wandb_id, "config": vars(config),
                 "model": vars(model.config), "tokenizer": tokenizer.to_json()},
            )  # fmt: skip
        elif iteration and val_loss is not None:
            checkpoints.note(iteration, losses)  # it was stopped, and saved, before its evaluation
        at = iteration

    def evaluation(iteration: int, last: bool) -> Evaluation:
        nonlocal best
        train, val = loss_of("train"), loss_of("val", last)
        report.evaluation(iteration, train.loss, val.loss, learning_rate(config, iteration))
        improved = val.loss < (math.inf if best is None else best)  # which nan is not
        best = val.loss if improved else best
        if improved or config.always_save_checkpoint or last:
            save(iteration, val.loss)
        report.resume_clock()
        return val

    def tell(pending: tuple | None) -> None:
        if pending and report.step(*pending) >= config.max_skipped:
            raise RunError(why(config, model, mesh, state, splits["train"], (A, B), pending[0]))
        checkpoints.check()

    pending = None  # the metrics of the iteration before: read while the device does this one
    with closing(report), report.watching(checkpoints):
        stream = batches(
            splits["train"], (A, B), config.seed, meta["iter"], batch_sharding(mesh, 3)
        )
        end = max(config.max_iters, meta["iter"])  # a finished run is evaluated once more
        try:
            for iteration in range(meta["iter"], end + 1):
                last, stopped = iteration == end, stop.at(iteration)
                evaluates = not stopped and (last or iteration % config.eval_interval == 0)
                saves = stopped or (config.save_interval and iteration % config.save_interval == 0)
                if evaluates or saves:
                    tell(pending)  # first: what is saved has been told of
                    pending = None
                try:
                    if evaluates:
                        val = evaluation(iteration, last)
                except Stopped:
                    stopped = saves = True
                if saves:
                    save(iteration)
                if last or stopped:
                    break
                state, metrics = train_step(state, *next(stream))
                metrics |= report.norms(iteration, state.params)
                stop.wait_for_save()
                tell(pending)
                pending = (iteration, metrics, learning_rate(config, iteration))
        except UserError:  # a file that is not what it was
            if jax.process_count() == 1:  # the others know nothing of it
                tell(pending)
                save(iteration)
            raise

    # ---- 7. The end -----------------------------------------------------------------------------
    if stopped and not at:
        print("stopped before the first iteration: there is nothing to save yet")
    elif stopped:
        print(f"stopped at iteration {at} and saved; next:\n  {resuming(config)}")
    else:
        summary(report, val, model, state.params, tokenizer)


if __name__ == "__main__":
    sys.exit(main())
