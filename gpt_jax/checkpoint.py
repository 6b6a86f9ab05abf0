"""Checkpoints by Orbax: asynchronous, whole or not at all, readable without this package.

In OUT_DIR/checkpoints/STEP lie

- params: the parameters, as in model.py
- optimizer: the rest of the TrainState
- meta: JSON with config, model, tokenizer, iteration and losses
"""

import itertools
import json
import math
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from gpt_jax.errors import UserError
from gpt_jax.train_step import TrainState

NEEDED = ("iter", "val_loss", "config", "model", "tokenizer")  # of the JSON


def open_checkpoints(out_dir: str, keep: int) -> ocp.CheckpointManager:
    """Return the manager of a run that writes: it keeps the newest ``keep`` and the best.

    Only one process may hold it: it clears away what an interrupted save has left.
    """
    policies = ocp.checkpoint_managers

    def loss(metrics: dict[str, float]) -> float:
        return metrics["val_loss"]

    best = policies.BestN(
        get_metric_fn=loss, reverse=True, n=1, keep_checkpoints_without_metrics=False
    )
    options = ocp.CheckpointManagerOptions(
        best_fn=loss,  # or the losses would not be stored, and a resumed run drop its best
        best_mode="min",
        preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(keep), best]),
        cleanup_tmp_directories=True,
    )
    handlers = {"params": arrays(), "optimizer": arrays(), "meta": ocp.JsonCheckpointHandler()}
    return ocp.CheckpointManager(folder(out_dir), options=options, item_handlers=handlers)


def arrays() -> ocp.PyTreeCheckpointHandler:
    """Return a handler that does not note down which devices held an array.

    With the note, Orbax alone restores a checkpoint only where there are the same devices.
    """
    handler = ocp.type_handlers.ArrayHandler(enable_write_sharding_file=False)
    registry = ocp.type_handlers.create_type_handler_registry((jax.Array, handler))
    return ocp.PyTreeCheckpointHandler(type_handler_registry=registry)


def save(
    manager: ocp.CheckpointManager, state: TrainState, meta: dict[str, Any], val_loss: float | None
) -> None:
    """Start saving ``state`` as the checkpoint of ``meta["iter"]``; training may go on at once.

    The best checkpoint is the one of the lowest ``val_loss``, where one is given.
    """
    items = ocp.args.Composite(
        params=ocp.args.PyTreeSave(state.params),
        optimizer=ocp.args.PyTreeSave(without_params(state)),
        meta=ocp.args.JsonSave(meta),
    )
    # nan, of a run that diverged, would rank as the best and push out the real one
    rank = val_loss if val_loss is not None and math.isfinite(val_loss) else math.inf
    manager.save(meta["iter"], args=items, metrics={"val_loss": rank})


def restore(out_dir: str, step: int, state: Any) -> TrainState:
    """Return the state of a step; ``state`` gives shapes, dtypes and layouts (sharding.placed)."""
    path = folder(out_dir) / str(step)
    rest = restore_tree(path / "optimizer", without_params(state))
    key = jax.random.wrap_key_data(rest.pop("key"))
    params = restore_tree(path / "params", state.params)
    return state.replace(params=params, key=key, **rest)


def restore_tree(path: Path, like: Any) -> Any:
    """Return the tree saved at ``path``, with the shapes, dtypes and layouts of ``like``.

    Raises UserError, before anything is allocated, where other shapes are stored.
    """
    stored = ocp.PyTreeCheckpointHandler().metadata(path)  # pyright: ignore[reportArgumentType]
    shapes = [sorted(x.shape for x in jax.tree.leaves(tree)) for tree in (stored, like)]
    if shapes[0] != shapes[1]:
        raise UserError(f"{path} holds arrays of other shapes than its JSON says: take another")
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(path, like)


def without_params(state: Any) -> dict[str, Any]:
    """Return the fields of a TrainState but its parameters, with the key as plain numbers."""
    fields = {name: x for name, x in vars(state).items() if name != "params"}
    if isinstance(state.key, jax.Array):
        return {**fields, "key": jax.random.key_data(state.key)}
    data = jax.eval_shape(jax.random.key_data, state.key)
    return {**fields, "key": data.update(sharding=state.key.sharding)}


def folder(out_dir: str) -> Path:
    """Return the folder of a run's checkpoints; Orbax wants it absolute."""
    return Path(out_dir).absolute() / "checkpoints"


def set_aside(out_dir: str) -> None:
    """Move an earlier run's files out of the way of a new one: to OUT_DIR/previous-N."""
    old = [path for path in Path(out_dir).glob("*") if not path.name.startswith("previous-")]
    if steps(out_dir):
        places = (Path(out_dir) / f"previous-{n}" for n in itertools.count(1))
        there = next(place for place in places if not place.exists())
        there.mkdir()
        for path in old:
            path.rename(there / path.name)
        print(f"{out_dir} held a run: it is in {there} now")


def steps(out_dir: str) -> list[int]:
    """Return the steps of which a run holds whole checkpoints, in order."""
    path = folder(out_dir)
    names = [p.name for p in path.iterdir() if p.is_dir()] if path.is_dir() else []
    return sorted(int(name) for name in names if name.isdecimal())


def read_meta(out_dir: str, step: int) -> dict[str, Any]:
    """Return the JSON of a checkpoint; UserError if it cannot be read."""
    path = folder(out_dir) / str(step) / "meta" / "metadata"
    try:
        meta = json.loads(path.read_text("utf-8"))
        if not isinstance(meta, dict) or not {*NEEDED} <= meta.keys():
            raise ValueError(f"not a JSON object with {', '.join(NEEDED)}")
        return meta
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({error}): take another checkpoint") from None


def choose(out_dir: str, step: str) -> int:
    """Return the step meant by "latest", "best" or a number; UserError if there is none such.

    "" means what nanoGPT's ckpt.pt holds: the best if the run kept only improvements
    (always_save_checkpoint=False), else the latest.
    """
    have = steps(out_dir)
    if not have:
        raise UserError(f"no checkpoint in {out_dir}: train first, or name a run with --out_dir")
    if step.isdecimal():
        if int(step) not in have:
            raise UserError(f"{out_dir} has no checkpoint of step {step}, only of {have}")
        return int(step)
    if step == "latest" or (
        not step and read_meta(out_dir, have[-1])["config"]["always_save_checkpoint"]
    ):
        return have[-1]
    losses = {n: read_meta(out_dir, n)["val_loss"] for n in have}
    losses = {n: loss for n, loss in losses.items() if loss is not None and math.isfinite(loss)}
    return min(losses, key=lambda n: losses[n]) if losses else have[-1]
