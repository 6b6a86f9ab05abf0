"""``python -m gpt_jax.export``."""

import sys

from gpt_jax.export import main

if __name__ == "__main__":
    sys.exit(main())
