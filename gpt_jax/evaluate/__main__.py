"""``python -m gpt_jax.evaluate``."""

import sys

from gpt_jax.evaluate import main

if __name__ == "__main__":
    sys.exit(main())
