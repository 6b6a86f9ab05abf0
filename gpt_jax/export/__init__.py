"""The command ``python -m gpt_jax.export``: a trained model in the form of other programs."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import jax

from gpt_jax.commandline import keys
from gpt_jax.config import Checked, key, parse
from gpt_jax.errors import UserError, exit_code
from gpt_jax.export import hugging_face, own
from gpt_jax.integrity import free_bytes, refuse_to_overwrite
from gpt_jax.interop import nanogpt_checkpoint
from gpt_jax.model import count_params
from gpt_jax.pretrained import load, load_run
from gpt_jax.runtime import use_platform
from gpt_jax.sharding import make_mesh

USAGE = "usage: python -m gpt_jax.export --out_dir=RUN --to=hf|safetensors|nanogpt DEST"


@dataclass(frozen=True)
class ExportConfig(Checked):
    """Write a trained GPT for other programs: to DEST, which must not be there yet.

    hf           a folder for transformers, vLLM and lm-eval: config.json, model.safetensors
    safetensors  a file of our parameters by our names, with the config as its metadata
    nanogpt      a ckpt.pt for nanoGPT, with the optimizer's state: the file, or an out_dir for it
    """

    command = "python -m gpt_jax.export"
    init_from: str = key("resume", "resume (out_dir)|gpt2|OWNER/NAME|PATH", "Model", name=True)
    out_dir: str = key("out", "folder of the run", name=True)
    data_dir: str = key("data", "folder of the datasets, where a ckpt.pt's tokenizer is", name=True)
    step: str = key("", "'': best if only those were kept, or latest", choices="|best|latest|N")
    to: str = key("hf", "the form", "Form", choices="hf|safetensors|nanogpt")
    dtype: str = key("float32", "of what is written", choices="float32|bfloat16|float16")
    keep_padding: bool = key(False, "hf: keep rows of the embedding that no token has")
    optimizer: bool = key(False, "safetensors: AdamW's moments too, as mu.NAME and nu.NAME")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.optimizer and (self.to, self.dtype, self.init_from) != (
            "safetensors", "float32", "resume",
        ):  # fmt: skip
            raise UserError(
                "optimizer=True is for --to=safetensors --dtype=float32 --init_from=resume, "
                f"here it is --to={self.to} --dtype={self.dtype} --init_from={self.init_from}"
            )
        if self.to == "nanogpt" and (self.dtype, self.init_from) != ("float32", "resume"):
            raise UserError(
                "to=nanogpt is for --dtype=float32 --init_from=resume, here it is "
                f"--dtype={self.dtype} --init_from={self.init_from}"
            )


@exit_code
def main(argv: list[str]) -> None:
    """Write the model; what interrupts it leaves nothing at its destination."""
    if {"-h", "--help"} & set(argv):
        print("\n".join([USAGE, "", ExportConfig.__doc__ or "", *keys(ExportConfig)]))
        return
    flags = [item for item in argv if item.startswith("-") or "=" in item]
    config = parse(flags, ExportConfig)
    if len(argv) != len(flags) + 1:
        raise UserError(f"{len(argv) - len(flags)} destinations are named, not one; {USAGE}")
    [destination] = (Path(item) for item in argv if item not in flags)
    if config.to == "safetensors" and destination.suffix != ".safetensors":
        raise UserError(f"to=safetensors makes a file: let {destination} end in .safetensors")
    use_platform("cpu")
    print(export(config, destination))


def export(config: ExportConfig, destination: Path) -> str:
    """Write a model to a destination that is not there yet; return what to say of it."""
    if config.to == "nanogpt":
        return "\n".join(nanogpt_checkpoint.export(config.out_dir, config.step, destination))
    refuse_to_overwrite(destination)
    mesh = make_mesh(devices=jax.local_devices()[:1])
    if config.init_from == "resume":
        model, params, tokenizer, meta = load_run(config.out_dir, config.step, "float32", mesh)
        source = f"{config.out_dir}, iteration {meta['iter']}"
    else:
        model, params, tokenizer = load(
            config.init_from, dtype="float32", mesh=mesh, data_dir=config.data_dir
        )
        source, meta = config.init_from, {}
    notes = [f"{destination}: {source}, {count_params(params, False):,} parameters"]
    with whole(destination) as path:
        if config.to == "hf":
            notes += hugging_face.write(
                path, model.config, params, tokenizer, config.dtype, config.keep_padding
            )
        else:
            trees = own.moments(config.out_dir, model, meta, mesh) if config.optimizer else {}
            own.write(path, model.config, {"": params, **trees}, tokenizer, config.dtype)
    return "\n".join(notes)


@contextmanager
def whole(destination: Path) -> Iterator[Path]:
    """Yield a path beside ``destination``; what is written there is moved to it once all is.

    Else nothing is left of it. Raises UserError for whatever the disk refuses.
    """
    there = next(path for path in destination.absolute().parents if path.exists())
    if not there.is_dir():
        raise UserError(f"{destination} cannot be written ({there} is a file): name another place")
    temporary = destination.with_name(f".{destination.name}.exporting")
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        remove(temporary)  # of an export that was killed
        yield temporary
        refuse_to_overwrite(destination)
        temporary.rename(destination)
    except OSError as error:
        free = free_bytes(destination, error)
        raise UserError(
            f"{destination} cannot be written ({error.strerror or error}{free}): "
            f"{'make room, or ' * bool(free)}name another place"
        ) from None
    finally:
        remove(temporary)


def remove(path: Path) -> None:
    """Remove a file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    elif os.path.lexists(path):
        path.unlink()
