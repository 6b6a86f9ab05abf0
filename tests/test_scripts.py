import os
import subprocess
import sys
from pathlib import Path

import pytest

from gpt_jax import __version__, scripts
from gpt_jax.scripts import as_typed, run, script
from gpt_jax.scripts.__main__ import COMMANDS, main

ROOT = Path(__file__).parents[1]


def gpt_jax(monkeypatch, *argv):
    monkeypatch.setattr(sys, "argv", ["gpt-jax", *argv])
    return main()


def test_gpt_jax_has_every_command_that_python_m_has(monkeypatch, capsys):
    folders = {path.parent.name for path in (ROOT / "gpt_jax").glob("*/__main__.py")}
    assert set(COMMANDS) == folders - {"scripts"}
    for argv in ((), ("--help",), ("-h",)):
        assert gpt_jax(monkeypatch, *argv) == 0
        lines = capsys.readouterr().out.splitlines()
        assert [line.split()[0] for line in lines if line.startswith("  ")] == list(COMMANDS)
        assert max(map(len, lines)) <= 80


def test_gpt_jax_says_its_version(monkeypatch, capsys):
    assert gpt_jax(monkeypatch, "--version") == 0
    assert capsys.readouterr().out == f"gpt_jax {__version__}\n"


@pytest.mark.parametrize(
    ("argv", "code", "said"),
    [
        ([], 0, "usage: gpt-jax COMMAND [...]"),
        (["--version"], 0, f"gpt_jax {__version__}"),
        (["plot"], 2, "error: no run is named; usage: python -m gpt_jax.plot "),
    ],
)
def test_python_m_gpt_jax_is_the_command_gpt_jax(argv, code, said, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "gpt_jax", *argv],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == code
    assert (done.stdout + done.stderr).startswith(said)


def test_gpt_jax_refuses_what_is_no_command_and_says_which_it_may_have_meant(monkeypatch, capsys):
    assert gpt_jax(monkeypatch, "trian", "--max_iters=2") == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: unknown command 'trian', did you mean 'train'?")


@pytest.mark.parametrize("name", COMMANDS)
def test_gpt_jax_gives_a_command_its_arguments_and_its_exit_code_back(name, monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, f"gpt_jax.{name}.__main__", raising=False)  # other tests'
    with pytest.raises(SystemExit) as left:
        gpt_jax(monkeypatch, name, "--max_itres=2")
    assert left.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(("error: ", "usage: ")), line


@pytest.mark.parametrize("name", ["train", "sample"])
def test_python_m_runs_the_script_of_the_checkout_from_any_folder(name, tmp_path):
    assert script(name) == ROOT / f"{name}.py"
    done = subprocess.run(
        [sys.executable, "-m", f"gpt_jax.{name}", "--help"],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"usage: python {name}.py ")


def test_a_script_runs_as_the_main_program(tmp_path, monkeypatch):
    (tmp_path / "train.py").write_text("import sys; sys.exit(__name__ == '__main__' and 5)")
    monkeypatch.setattr(scripts, "FOLDER", tmp_path)
    with pytest.raises(SystemExit) as left:
        run("train")
    assert left.value.code == 5


def test_commands_are_shown_as_they_can_be_typed_here(monkeypatch):
    lines = "next: python train.py a\n  python sample.py b\n  python -m gpt_jax.plot; python x.py"
    assert as_typed(lines) == lines
    monkeypatch.setattr(scripts, "INSTALLED", True)
    assert as_typed(lines) == (
        "next: gpt-jax train a\n  gpt-jax sample b\n  python -m gpt_jax.plot; python x.py"
    )
