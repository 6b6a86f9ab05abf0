"""``python -m gpt_jax.train``."""

from gpt_jax.scripts import run

if __name__ == "__main__":
    run("train")
