"""``python -m gpt_jax``: the command ``gpt-jax``, also where that is not on the path."""

import sys

from gpt_jax.scripts.__main__ import main

if __name__ == "__main__":
    sys.exit(main())
