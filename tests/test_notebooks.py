"""Every notebook runs in a kernel of its own, and is stored without what it showed there."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

# its cache of fonts is made here and not in a kernel, which would say so
import matplotlib.font_manager  # noqa: F401
import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
REPOSITORY = "https://github.com/gpt-jax/gpt_jax"
INSTALL = f"""\
# Fetches gpt_jax on Colab and Kaggle. Where it is installed this does nothing.
import importlib.util

if importlib.util.find_spec("gpt_jax") is None:
    %pip install --quiet "git+{REPOSITORY}"
"""
# in a process of its own: pytest makes errors of the warnings of all that a kernel's client imports
RUN = """
import sys
import nbformat
from nbclient import NotebookClient

notebook = nbformat.read(sys.argv[1], as_version=4)
NotebookClient(notebook, timeout=600, kernel_name="python3").execute()
nbformat.write(notebook, sys.argv[2])
"""

each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
but_those_below = [path for path in NOTEBOOKS if path.stem not in ("sizing", "scaling_laws")]


def run(path, folder):
    """Run a notebook in an empty folder, and return what it printed."""
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "",  # one device, as a reader has
        "PYTHONPATH": str(ROOT),
        "IPYTHONDIR": str(folder / "ipython"),  # nobody's own settings
        "JUPYTER_CONFIG_DIR": str(folder / "jupyter"),
        "JUPYTER_RUNTIME_DIR": str(folder / "runtime"),
    }
    (folder / "empty").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(path), str(folder / path.name)],
        env=environment, cwd=folder / "empty", capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    cells = json.loads((folder / path.name).read_text("utf-8"))["cells"]
    outputs = [one for cell in cells for one in cell.get("outputs", [])]
    texts = {"stdout": "", "stderr": ""}
    for one in outputs:
        if one["output_type"] == "stream":
            texts[one["name"]] += "".join(one["text"])
    assert not texts["stderr"]
    return texts["stdout"]


@pytest.mark.parametrize("path", but_those_below, ids=lambda path: path.stem)
def test_a_notebook_runs_from_top_to_bottom_and_warns_of_nothing(path, tmp_path):
    run(path, tmp_path)


# what nanoGPT's transformer_sizing.ipynb, as it is stored, prints
NANOGPT_PARAMETERS = """
embedding/position      786432     0.6325
embedding/token        38597376    31.0424
embedding              39383808    31.6749
attention/ln                768     0.0006
attention/kqv           1769472     1.4231
attention/proj           589824     0.4744
attention               2360064     1.8981
mlp/ln                      768     0.0006
mlp/ffw                 2359296     1.8975
mlp/proj                2359296     1.8975
mlp                     4719360     3.7956
block                   7079424     5.6937
transformer            84953088    68.3245
ln_f                        768     0.0006
dense                         0     0.0000
total                 124337664   100.0000
"""
NANOGPT_FLOPS = """
attention/kqv            3623878656     1.2426
attention/scores         1610612736     0.5522
attention/reduce         1610612736     0.5522
attention/proj           1207959552     0.4142
attention                8053063680     2.7612
mlp/ffw1                 4831838208     1.6567
mlp/ffw2                 4831838208     1.6567
mlp                      9663676416     3.3135
block                   17716740096     6.0747
transformer            212600881152    72.8963
dense                   79047426048    27.1037
forward_total          291648307200   100.0000
backward_total         583296614400   200.0000
total                  874944921600   300.0000
"""


def test_sizing_runs_and_gives_nanogpts_numbers_to_the_digit(tmp_path):
    [path] = [path for path in NOTEBOOKS if path.stem == "sizing"]
    printed = run(path, tmp_path)
    tables = re.findall(r"share \(%\)\n(.*?\ntotal .*?)\n", printed, re.DOTALL)
    rows = [[line.split() for line in table.replace(",", "").splitlines()] for table in tables]
    for found, given in zip(rows, (NANOGPT_PARAMETERS, NANOGPT_FLOPS), strict=True):
        assert found == [line.split() for line in given.strip().splitlines()]
    for line in (
        "by formula 124,337,664, in gpt_jax 124,337,664, equal: True",
        "estimated size of a checkpoint: 1.49 GB",
        "measured over estimated: 103.38 %",
        "parameters and moments take 3.73 % of it",
        "palm_flops: 875062886400, flops: 874944921600, ratio: 1.0001",
        "in gpt_jax: 875062886400, equal: True",
        "fraction of the A100 used: 37.14 %",
        "time needed to train the model: 3.46 days",
    ):
        assert line in printed.splitlines()


def test_scaling_laws_runs_and_gives_nanogpts_numbers_to_the_digit(tmp_path):
    """Those that its scaling_laws.ipynb, as it is stored, prints."""
    [path] = [path for path in NOTEBOOKS if path.stem == "scaling_laws"]
    printed = run(path, tmp_path)
    for number in (
        "123.653376",
        "12296.1623M", "13124.4826M", "14614.4279M", "16037.5039M", "16184.4582M",
        "73,825,280 929,877,196,800 907,165,040,640 1.025036",
        "305,707,008 4,135,248,199,680 3,756,527,714,304 1.100817",
        "552,604,160 7,353,453,772,800 6,790,399,918,080 1.082919",
        "1,143,453,696 14,670,316,437,504 14,050,759,016,448 1.044094",
        "1,593,126,912 20,220,437,594,112 19,576,343,494,656 1.032902",
        "6,796,274,688 83,021,046,743,040 83,512,623,366,144 0.994114",
        "316.23M parameters, 11.65B tokens",
        "model size: 399.54M", "dataset size: 14.43B", "flops: 3.459892e+19", "loss: 2.76",
        "log10 D = 1.040957316999", "log10 N + 0.93538871523",
        "2304 budgets", "2.292426e+09 tokens",
    ):  # fmt: skip
        assert number in " ".join(printed.split())


@each
def test_a_notebook_stores_no_output_and_nothing_of_who_ran_it(path):
    notebook = json.loads(path.read_text("utf-8"))
    assert notebook["metadata"] == {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    for cell in notebook["cells"]:
        assert cell["metadata"] == {}
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            assert cell["execution_count"] is None


@each
def test_a_notebook_begins_with_a_title_its_badges_and_a_way_to_install(path):
    first, second, *_ = json.loads(path.read_text("utf-8"))["cells"]
    title, badges, paragraph, *_ = "".join(first["source"]).split("\n\n")
    assert first["cell_type"] == "markdown"
    assert title.startswith("# ")
    assert len(paragraph.split()) > 30
    place = f"gpt-jax/gpt_jax/blob/main/notebooks/{path.name}"
    assert f"(https://colab.research.google.com/github/{place})" in badges
    assert f"(https://kaggle.com/kernels/welcome?src=https://github.com/{place})" in badges
    assert "".join(second["source"]).startswith(INSTALL.rstrip())
