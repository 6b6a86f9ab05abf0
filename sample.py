"""Write text with a trained model: config -> weights -> text.

python sample.py --out_dir=out-shakespeare-char --start="FILE:prompt.txt" --num_samples=3
"""

import sys
from pathlib import Path

import jax

from gpt_jax.commandline import notes, read_prompt
from gpt_jax.config import SampleConfig, parse
from gpt_jax.errors import UserError, exit_code
from gpt_jax.pretrained import load
from gpt_jax.runtime import connected, use_platform
from gpt_jax.sampling import generate, stream
from gpt_jax.sharding import make_mesh
from gpt_jax.tokenizer import stream_decoder


@exit_code
def main(argv: list[str]) -> None:
    """Print samples as nanoGPT's sample.py does; on a terminal, as their tokens come."""
    config = parse(argv, SampleConfig)
    for note in notes(config):
        print(note, file=sys.stderr)
    prompt = read_prompt(config.start)
    with connected(config, "start sampling again"):
        write(config, prompt)


def write(config: SampleConfig, prompt: str) -> None:
    """Load the model and write what it makes of the prompt."""
    use_platform(config.device)
    mesh = make_mesh(config.device, config.data, config.fsdp, config.tensor)
    source = Path(config.out_dir) if config.init_from == "resume" else config.init_from
    where = {name: getattr(config, name) for name in ("step", "dtype", "data_dir")}
    model, params, tokenizer = load(source, mesh=mesh, **where)
    ids = tokenizer.encode(prompt)
    stop = tokenizer.encode(config.stop)
    if len(stop) > 1:
        raise UserError(f"stop={config.stop!r} is {len(stop)} tokens of this model: it must be one")
    names = ("max_new_tokens", "temperature", "top_k", "top_p")
    rule = {"stop_tokens": stop, **{name: getattr(config, name) for name in names}}
    # a key a sample: the same text whether they are written together or one after the other
    keys = jax.random.split(jax.random.key(config.seed), config.num_samples)
    if sys.stdout.isatty():
        for key in keys:
            text = stream_decoder(tokenizer)
            print(text(ids), end="", flush=True)
            for new in stream(model, params, ids, key=key, **rule):
                print(text(new), end="", flush=True)
            print(text([], final=True) + "\n---------------")
    else:
        for row in generate(model, params, [ids] * config.num_samples, key=keys, **rule):
            print(tokenizer.decode(row) + "\n---------------")


if __name__ == "__main__":
    sys.exit(main())
