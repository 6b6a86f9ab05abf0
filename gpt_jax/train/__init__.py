"""``python -m gpt_jax.train``: the script train.py, from any folder."""
