"""``python -m gpt_jax.sample``."""

from gpt_jax.scripts import run

if __name__ == "__main__":
    run("sample")
