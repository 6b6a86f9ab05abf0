"""How a command line becomes a config, and what a config looks like printed.

One layer over another: defaults < the saved run (when it is resumed) < config files < flags. Of
nanoGPT's ckpt.pt the network's sizes lie over the config files, as in nanoGPT's own resume.
"""

import json
import os
import shutil
import sys
import textwrap
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

from gpt_jax.commandline.files import PRESETS, read_config, suggest
from gpt_jax.config import Checked, Hardware, LoadConfig, T, TrainConfig, typed
from gpt_jax.errors import UserError
from gpt_jax.integrity import replace_file, written
from gpt_jax.interop import nanogpt_checkpoint
from gpt_jax.scripts import as_typed

LONGEST_PROMPT = 10**7  # characters: a device in place of a file has no end
LONGEST_CONFIG = 10**6  # bytes
BOOLS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
READERS = {int: float, float: float, bool: lambda text: BOOLS[text.lower()], str: str}


def saved_run(out_dir: str) -> dict[str, Any]:
    """Return the config that `out_dir` was trained with, nothing if no run was saved there.

    Where its config.json is gone, that is what the newest checkpoint that can be read says.
    """
    path = os.path.join(out_dir, "config.json")
    if not os.path.isfile(path):
        saved = of_checkpoint(out_dir)
        return saved and known_keys(saved, f"a checkpoint in {out_dir}: ", out_dir)
    try:
        if os.path.getsize(path) > LONGEST_CONFIG:
            raise ValueError(f"it has more than {LONGEST_CONFIG:,} bytes")
        saved = dict(json.loads(Path(path).read_text("utf-8")))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        remedy = "move it away, for checkpoints hold it too, or use another --out_dir"
        raise UserError(f"{path!r} is not a saved run ({error}): {remedy}") from None
    return known_keys(saved, f"{path}: ", out_dir)


def of_checkpoint(out_dir: str) -> dict[str, Any]:
    """Return the config that the newest readable checkpoint was saved with, {} if there is none."""
    from gpt_jax.checkpoint import read_meta, steps  # a second, with Orbax

    for step in reversed(steps(out_dir)):
        with suppress(UserError):  # a damaged one, which the start names
            return read_meta(out_dir, step)["config"]
    return {}


def known_keys(saved: dict[str, Any], where: str, out_dir: str) -> dict[str, Any]:
    """Return of a saved config what this version knows, as it is to go on in ``out_dir``."""
    kinds = {f.name: f.type for f in fields(TrainConfig)}
    # What to do now is not for the saved run to say, nor where it is now: it may have been moved.
    for now in ("eval_only", "out_dir", "coordinator_address", "num_processes", "process_id"):
        del kinds[now]
    saved = {k: typed(k, v, kinds[k], where) for k, v in saved.items() if k in kinds}
    return saved | {"out_dir": out_dir}


def parse(argv: list[str], kind: type[T]) -> T:
    """Return the config of a command line, UserError if it has none; --help prints and leaves."""
    if {"-h", "--help"} & set(argv):
        print(usage(kind))
        raise SystemExit(0)
    kinds = {f.name: f.type for f in fields(kind)}
    files, flags = [], {}
    for item in argv:
        name, equals, text = item.removeprefix("--").partition("=")
        if not item.startswith("-") and not equals:
            files.append(item)
        elif not item.startswith("--"):
            raise UserError(f"{item!r:.60} is neither a config file nor a key: write --key=value")
        elif name not in kinds:
            raise UserError(f"unknown key {suggest(name, kinds)} (--help lists all keys)")
        elif not equals and kinds[name] is not bool:
            raise UserError(f"--{name} has no value: write --{name}=VALUE")
        else:
            flags[name] = text if equals else "True"
            with suppress(ValueError, KeyError):  # left as text, which the config then refuses
                flags[name] = READERS[kinds[name]](flags[name])
    configs = files or ([kind.preset] if kind.preset else [])
    values = layers({}, configs, flags, kind)
    source = values.get("init_from", "")
    if kind == TrainConfig and isinstance(source, str) and nanogpt_checkpoint.is_one(source):
        # a config file may be the run's, made for other sizes by flags: the checkpoint's hold
        saved, network = nanogpt_checkpoint.settings(source)
        return kind(**{**layers(saved, files, {}, kind), **network, **flags})
    resumes = kind == TrainConfig and values.get("init_from") in ("resume", "auto")
    if resumes and (saved := saved_run(values.get("out_dir", TrainConfig.out_dir))):
        # A run asked for by name needs no config to go on. Otherwise quickstart lies over what was
        # saved, so that `python train.py` never silently goes on with some other run: the
        # checkpoint will not fit, and says so.
        asked = not files and "init_from" in flags
        values = layers(saved, [] if asked else configs, flags, kind)
    return kind(**values)


def layers(values: dict, configs: list[str], flags: dict, kind: type[Checked]) -> dict[str, Any]:
    """Return the values with those of the config files over them, and the flags over those."""
    known = {f.name: f for f in (*fields(TrainConfig), *fields(kind))}
    for config in configs:
        names = {name: f.default for name, f in known.items()} | values
        for name, (value, place) in read_config(config, names).items():
            if name not in known:
                raise UserError(f"{place}: unknown key {suggest(name, known)} (--help lists keys)")
            value = typed(name, value, known[name].type, f"{place}: ")
            # sample.py takes the config of a training run too: its out_dir is what counts
            fresh = kind != TrainConfig and name == "init_from" and value in ("scratch", "auto")
            if hasattr(kind, name) and not fresh:
                values = values | {name: value}
    return values | flags


def usage(kind: type[Checked]) -> str:
    """Return the text of --help: every key, its default and its meaning."""
    called, configs = as_typed(kind.command), ", ".join(PRESETS)
    return "\n".join([
        f"usage: {called} [CONFIG ...] [--key=value ...]", "",
        *wrapped(kind.__doc__ or ""), "",
        *wrapped(f"CONFIG: a file of assignments, or one of {configs}."),
        f"Without one: {kind.preset or 'the defaults'}.",
        *keys(kind),
    ])  # fmt: skip


def wrapped(text: str, first: str = "") -> list[str]:
    """Return the lines of a text, whole words each, that fit the terminal, and 100 columns.

    Where nobody knows how wide it is, as in a pipe, that is 80. Of ``first``, which begins the
    first line, the others have the width.
    """
    width = min(100, shutil.get_terminal_size().columns)
    return textwrap.wrap(
        text, width, initial_indent=first, subsequent_indent=" " * len(first),
        break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip


def keys(kind: type[Checked]) -> list[str]:
    """Return the lines of --help on the keys of a command."""
    lines = []
    for f in in_order(kind):
        if f.metadata["group"]:
            lines += ["", f.metadata["group"]]
        shown = repr(f.default) if f.default in ("", "\n") else f.default
        choices = f" ({f.metadata['choices']})" if "choices" in f.metadata else ""
        lines += wrapped(f.metadata["help"] + choices, f"  {f'--{f.name}={shown}':34} ")
    return lines


def in_order(kind: type[Checked]) -> list[Any]:
    """Return the fields of a config, those that all commands share last."""
    return sorted(fields(kind), key=lambda f: f.name in Hardware.__annotations__)


def notes(config: TrainConfig | LoadConfig) -> list[str]:
    """Return a line for each key whose value means something else here than in nanoGPT."""
    lines = [] if config.compile else ["compile=False: JAX always compiles; nothing to switch off"]
    backend = getattr(config, "backend", "nccl")
    if backend != "nccl":
        lines += [f"backend={backend}: JAX picks the transport itself (NCCL on GPUs, ICI on TPUs)"]
    return lines


def read_prompt(start: str) -> str:
    """Return the prompt that ``--start`` gives: a text, or FILE: and where the text is."""
    if not start.startswith("FILE:"):
        return start
    try:
        with open(start[5:], encoding="utf-8") as file:
            prompt = file.read(LONGEST_PROMPT + 1)
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        why = "it is not UTF-8" if isinstance(error, UnicodeError) else why
        raise UserError(
            f"the prompt's file {start[5:]!r:.100} cannot be read ({why}): give a text by its "
            "path, --start=FILE:prompt.txt"
        ) from None
    if len(prompt) > LONGEST_PROMPT:
        raise UserError(f"start={start!r:.99} is longer than {LONGEST_PROMPT:,} characters: cut it")
    return prompt


def compact(config: Checked) -> str:
    """Return the keys that differ from their defaults, in lines that fit the terminal, or 100."""
    width = (
        min(100, shutil.get_terminal_size().columns) if sys.stdout and sys.stdout.isatty() else 100
    )
    pairs = [(f, getattr(config, f.name)) for f in in_order(type(config))]
    return textwrap.fill(" ".join(f"{f.name}={v!r}" for f, v in pairs if v != f.default), width)


def save_config(config: TrainConfig) -> None:
    """Write the resolved config to OUT_DIR/config.json."""
    with written(config.out_dir):
        path = Path(config.out_dir) / "config.json"
        replace_file(path, json.dumps(vars(config), indent=1) + "\n")
