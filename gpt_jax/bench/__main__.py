"""``python -m gpt_jax.bench``."""

import sys

from gpt_jax.bench import main

if __name__ == "__main__":
    sys.exit(main())
