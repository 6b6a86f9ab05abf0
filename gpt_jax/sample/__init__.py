"""``python -m gpt_jax.sample``: the script sample.py, from any folder."""
