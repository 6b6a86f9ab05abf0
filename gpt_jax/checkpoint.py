"""Checkpoints by Orbax: asynchronous, whole or not at all, readable without this package.

In OUT_DIR/checkpoints/STEP lie

- params: the parameters, as in model.py
- optimizer: the rest of the TrainState
- meta: JSON with config, model, tokenizer, iteration and losses, and the digest of every array

To Orbax a bit that has flipped in an array's file is as good as any. Here each array that comes
back is held against its digest, and the JSON against its own.
"""

import math
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from gpt_jax import integrity
from gpt_jax.errors import DamageError, RunError, UserError
from gpt_jax.train_step import TrainState


class Checkpoints:
    """The checkpoints of a run that writes: the newest ``keep``, the best, each ``keep_every``-th.

    Only one process may hold it: it clears away what an interrupted save has left. Every method
    raises RunError where a save has failed, also one that began long before.
    """

    def __init__(self, out_dir: str, keep: int, keep_every: int = 0):
        self.path, self.keep, self.keep_every = folder(out_dir), keep, keep_every or math.inf
        self.losses = val_losses(out_dir)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=self, cleanup_tmp_directories=True
        )
        handlers = {"params": arrays(), "optimizer": arrays(), "meta": ocp.JsonCheckpointHandler()}
        integrity.quiet()
        with integrity.written(self.path):
            self.manager = ocp.CheckpointManager(self.path, options=options, item_handlers=handlers)
        self.thread = ThreadPoolExecutor(1, "checkpoints")
        self.saving: Future | None = None

    def save(self, state: TrainState, meta: dict[str, Any]) -> None:
        """Start saving ``state`` as the step ``meta["iter"]``; training may go on at once.

        The best is the one of the lowest ``meta["val_loss"]``, where that is a number. A state
        that holds nan or inf is not saved.
        """
        self.check(wait=True)
        self.losses[meta["iter"]] = meta["val_loss"]
        trees = {"params": state.params, "optimizer": without_params(state)}
        if integrity.room_for_a_copy(trees):
            # of a copy the device can go on to the next update while the host still fetches it
            trees = integrity.copied(trees)
            pending = {item: integrity.digests(tree) for item, tree in trees.items()}
            self.saving = self.thread.submit(self.write, trees, pending, meta, wait=True)
        else:
            self.write(trees, {i: integrity.digests(tree) for i, tree in trees.items()}, meta)
            self.saving = self.thread.submit(self.manager.wait_until_finished)

    def write(self, trees: Any, digests: Any, meta: dict[str, Any], wait: bool = False) -> None:
        """Save trees whose digests are under way; ``wait`` until all is written."""
        found = {item: digest() for item, digest in digests.items()}
        broken = [f"{item}/{name}" for item in found for name, x in found[item].items() if not x]
        if broken:
            raise RunError(
                f"iteration {meta['iter']} is not saved, {broken[0]} holds nan or inf: go on from "
                "the checkpoint before by --init_from=resume, with a lower --learning_rate"
            )
        items: Any = {item: ocp.args.PyTreeSave(tree) for item, tree in trees.items()}
        items["meta"] = ocp.args.JsonSave(integrity.sealed({**meta, "digests": found}))
        with integrity.written(self.path):
            self.manager.save(meta["iter"], args=ocp.args.Composite(**items))
            if wait:
                self.manager.wait_until_finished()
                jax.tree.map(lambda x: x.delete(), trees)  # Orbax may still refer to them

    def check(self, wait: bool = False) -> None:
        """Raise what the last save has met with, if it has ended; ``wait`` until it has."""
        if self.saving and (wait or self.saving.done()):
            saving, self.saving = self.saving, None
            with integrity.written(self.path):
                saving.result()

    def note(self, step: int, losses: dict[str, Any]) -> None:
        """Add to the JSON of a step what an evaluation has found since it was saved."""
        self.losses[step] = losses["val_loss"]
        if jax.process_index() == 0:
            integrity.amend(self.path / str(step) / "meta" / "metadata", losses)

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Answer Orbax which checkpoints, the oldest first, to keep."""
        have = [checkpoint.step for checkpoint in checkpoints]
        kept = {*have[-self.keep :], lowest({n: self.losses.get(n) for n in have})}
        return [n in kept or n % self.keep_every == 0 for n in have]

    def close(self) -> None:
        """Wait until the last save is whole."""
        with integrity.written(self.path), closing(self.manager), self.thread:
            self.check(wait=True)


def arrays() -> ocp.PyTreeCheckpointHandler:
    """Return a handler that does not note down which devices held an array.

    With the note, Orbax alone restores a checkpoint only where there are the same devices.
    """
    handler = ocp.type_handlers.ArrayHandler(enable_write_sharding_file=False)
    registry = ocp.type_handlers.create_type_handler_registry((jax.Array, handler))
    return ocp.PyTreeCheckpointHandler(type_handler_registry=registry)


def restore(out_dir: str, step: int, state: Any, meta: dict[str, Any]) -> TrainState:
    """Return the state of a step; ``state`` gives shapes, dtypes and layouts (sharding.placed).

    ``meta`` is its JSON. Raises DamageError for what is not as it was saved.
    """
    path = folder(out_dir) / str(step)
    rest = restore_tree(path, "optimizer", without_params(state), meta)
    key = jax.random.wrap_key_data(rest.pop("key"))
    params = restore_tree(path, "params", state.params, meta)
    return state.replace(params=params, key=key, **rest)


def restore_tree(path: Path, item: str, like: Any, meta: dict[str, Any]) -> Any:
    """Return "params" or "optimizer" of the step at ``path``, laid out as ``like``.

    Raises DamageError: before anything is allocated where other shapes or dtypes are stored, or
    more than the files can hold, and where an array is not the one whose digest ``meta`` has.
    """
    integrity.check_stored(path / item, like)
    with integrity.reading(path / item), ocp.StandardCheckpointer() as checkpointer:
        tree = checkpointer.restore(path / item, like)
    integrity.check_digests(path / item, tree, meta["digests"])
    return tree


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


def steps(out_dir: str) -> list[int]:
    """Return the steps of which a run holds whole checkpoints, in order."""
    path = folder(out_dir)
    names = [p.name for p in path.iterdir() if p.is_dir()] if path.is_dir() else []
    return sorted(int(name) for name in names if name.isdecimal() and str(int(name)) == name)


def read_meta(out_dir: str, step: int) -> dict[str, Any]:
    """Return the JSON of a checkpoint; DamageError if it is not what was written."""
    return integrity.read_sealed(folder(out_dir) / str(step) / "meta" / "metadata", step)


def val_losses(out_dir: str) -> dict[int, Any]:
    """Return the val_loss of each checkpoint whose JSON can be read."""
    losses = {}
    for step in steps(out_dir):
        with suppress(DamageError):
            losses[step] = read_meta(out_dir, step)["val_loss"]
    return losses


def lowest(losses: dict[int, Any]) -> int | None:
    """Return the step of the lowest loss that is a number, None where there is none."""
    rated = [n for n, x in losses.items() if isinstance(x, float) and math.isfinite(x)]
    return min(rated, key=lambda n: losses[n], default=None)


def choose(out_dir: str, step: str) -> list[int]:
    """Return the steps meant by "latest", "best" or a number, in the order in which to try them.

    "" means what nanoGPT's ckpt.pt holds: the best if the run kept only improvements
    (always_save_checkpoint=False), else the latest. UserError if there is none such.
    """
    have = steps(out_dir)
    if not have:
        advice = "train first, or name the folder of a run, train.py's --out_dir"
        if (nanogpts := Path(out_dir) / "ckpt.pt").is_file():
            advice = f"nanoGPT's is taken by --init_from={nanogpts}"
        raise UserError(f"no checkpoint in {out_dir}: {advice}")
    if step.isdecimal():
        if int(step) not in have:
            raise UserError(f"{out_dir} has no checkpoint of step {step}, only of {have}")
        return [int(step)]
    losses = val_losses(out_dir)
    order = sorted(have, reverse=True)
    newest = next((n for n in order if n in losses), have[-1])
    latest = step == "latest" or (
        not step and read_meta(out_dir, newest)["config"].get("always_save_checkpoint")
    )
    best = None if latest else lowest(losses)
    return sorted(order, key=lambda n: n != best)
