"""Where train.py and sample.py are, and how they are called.

In a checkout, and in an editable install of it, they lie beside the package for all to read. A
wheel has them in this folder (pyproject.toml): the names train and sample at the top of
site-packages are not ours to take.
"""

import re
import runpy
from pathlib import Path

INSTALLED = Path(__file__).with_name("train.py").is_file()
FOLDER = Path(__file__).parents[0 if INSTALLED else 2]


def script(name: str) -> Path:
    """Return the path of the script train or sample."""
    return FOLDER / f"{name}.py"


def run(name: str) -> None:
    """Run train or sample with the command line of this process, as ``python train.py`` would."""
    runpy.run_path(str(script(name)), run_name="__main__")


def as_typed(command: str) -> str:
    """Return a command line as it is typed here: by ``gpt-jax`` where a wheel is installed."""
    if not INSTALLED:
        return command
    return re.sub(r"\bpython (train|sample)\.py\b", r"gpt-jax \1", command)
