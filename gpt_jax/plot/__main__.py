"""The command ``python -m gpt_jax.plot OUT_DIR [PICTURE]``."""

import sys
from pathlib import Path

from gpt_jax.errors import UserError, exit_code
from gpt_jax.plot import plot

USAGE = """usage: python -m gpt_jax.plot OUT_DIR [PICTURE]

Draw the losses of a run, by default to OUT_DIR/loss.png; PICTURE may end in .png, .svg or .pdf."""


@exit_code
def main(argv: list[str]) -> None:
    """Draw the picture of a run."""
    if {"-h", "--help"} & set(argv):
        print(USAGE)
        return
    if not 1 <= len(argv) <= 2 or argv[0].startswith("-"):
        raise UserError(USAGE.splitlines()[0])
    try:
        print(plot(argv[0], Path(argv[1]) if len(argv) == 2 else None))
    except (OSError, ValueError) as error:
        raise UserError(f"no picture could be written: {error}") from None


if __name__ == "__main__":
    sys.exit(main())
