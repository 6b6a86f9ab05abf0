"""``python -m gpt_jax.plot``."""

import sys

from gpt_jax.plot import main

if __name__ == "__main__":
    sys.exit(main())
