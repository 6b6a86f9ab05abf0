"""The last lines of a run."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax

from gpt_jax.config import TrainConfig
from gpt_jax.evaluation import Evaluation
from gpt_jax.model import GPT
from gpt_jax.runtime import is_first
from gpt_jax.sampling import generate
from gpt_jax.scripts import as_typed
from gpt_jax.tokenizer import Tokenizer


def summary(
    config: TrainConfig, val: Evaluation, model: GPT, params: Any, tokenizer: Tokenizer
) -> None:
    """Say how a run ended: the loss, a sample if one is asked for, where things lie, what next."""
    bits = "" if val.bits_per_byte is None else f", {val.bits_per_byte:.4f} bits/byte"
    print(f"\nval loss {val.loss:.4f} nats/token{bits}")
    start = "def " if config.dataset == "pystdlib" else "\n"
    if config.sample_tokens:
        key = jax.random.key(config.seed)
        ids = generate(
            GPT(replace(model.config, matmul_dtype="auto")),  # float8 is for training
            params,
            tokenizer.encode(start),
            key=key,
            max_new_tokens=config.sample_tokens,
            temperature=0.8,
        )
        print(f"a sample:\n---------------\n{tokenizer.decode(ids).strip()}\n---------------")
    if not is_first():
        return
    out = Path(config.out_dir)
    print(f"checkpoints: {out / 'checkpoints'}")
    print(f"metrics:     {out / 'metrics.jsonl'}")
    if (out / "loss.png").is_file():
        print(f"picture:     {out / 'loss.png'}")
    flag = "" if config.out_dir == "out" else f" --out_dir={config.out_dir}"
    print("next:")
    prompt = f' --start="{start}"' if start.strip() else ""
    print(as_typed(f"  python sample.py{flag}{prompt} --num_samples=3"))
    more = f"--init_from=resume{flag} --max_iters={2 * config.max_iters}"
    print(as_typed(f"  python train.py {more}"))
