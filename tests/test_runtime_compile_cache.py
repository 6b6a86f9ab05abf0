"""Where compiled programs wait for the next process, and whom that folder trusts."""

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from gpt_jax.runtime import compile_cache
from gpt_jax.runtime.compile_cache import Mender, default_folder, drop_the_oldest, not_ours

ROOT = Path(__file__).parents[1]
COMPILE = """
import jax, jax.numpy as jnp
from gpt_jax.runtime import use_platform
use_platform("cpu")
print(jax.jit(lambda x: jnp.tanh(x) @ x)(jnp.ones((8, 8)))[0, 0])
print(jax.config.values["jax_compilation_cache_dir"])
"""


@pytest.fixture
def start(tmp_path):
    """Start a process that compiles something; its home is a folder of its own."""

    def run(program=COMPILE, **environment):
        clean = {name: x for name, x in os.environ.items() if "CACHE" not in name}
        home = {"HOME": str(tmp_path / "home"), "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [sys.executable, "-c", program],
            env={**clean, **home, **environment},
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines(), done.stderr.splitlines()

    (tmp_path / "home").mkdir()
    return run


def test_what_a_process_compiles_the_next_one_finds_in_the_users_cache_folder(start, tmp_path):
    folder = tmp_path / "home" / ".cache" / "gpt_jax" / "xla"
    first, said = start()
    assert not said
    assert first[1] == str(folder)
    assert folder.stat().st_mode & 0o777 == folder.parent.stat().st_mode & 0o777 == 0o700
    entries = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert any(path.name.startswith("jit__lambda") for path in entries)
    hits = """
from jax import monitoring
events = []
monitoring.register_event_listener(lambda name, **_: events.append(name.split("/")[-1]))
"""
    again, said = start(hits + COMPILE + "print(events.count('cache_misses'), len(events))")
    assert not said
    assert again[:2] == first
    assert again[2].startswith("0 ")
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == entries


def test_xdg_cache_home_moves_the_folder_unless_it_is_relative(start, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    assert start(XDG_CACHE_HOME=str(elsewhere))[0][1] == str(elsewhere / "gpt_jax" / "xla")
    assert start(XDG_CACHE_HOME="caches")[0][1].endswith("home/.cache/gpt_jax/xla")
    assert not (tmp_path / "caches").exists()


@pytest.mark.parametrize(
    ("environment", "folder"),
    [
        ({"JAX_COMPILATION_CACHE_DIR": "mine"}, "mine"),
        ({"JAX_COMPILATION_CACHE_DIR": ""}, "None"),
        ({"JAX_ENABLE_COMPILATION_CACHE": "0"}, "None"),
    ],
)
def test_jaxs_own_variables_win(start, tmp_path, environment, folder):
    out, said = start(**environment)
    assert out[1] == folder
    assert not said
    assert not (tmp_path / "home" / ".cache").exists()
    assert {path.name for path in tmp_path.iterdir()} <= {"home", "mine"}


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="Windows has access lists instead")
@pytest.mark.parametrize("level", ["gpt_jax", "gpt_jax/xla"])
@pytest.mark.parametrize("mode", [0o770, 0o707])
def test_a_folder_that_others_can_write_to_is_not_used_and_that_is_said_once(
    start, tmp_path, level, mode
):
    folder = tmp_path / "home" / ".cache" / "gpt_jax" / "xla"
    folder.mkdir(parents=True, mode=0o700)
    planted = tmp_path / "home" / ".cache" / level
    planted.chmod(mode)
    out, [said] = start()
    assert out[1] == "None"
    assert said.startswith(f"note: compiled programs are not kept ({planted} can be written by ot")
    assert "JAX_COMPILATION_CACHE_DIR" in said
    assert not list(folder.iterdir())


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="Windows has access lists instead")
def test_a_folder_of_another_user_is_not_used(tmp_path, monkeypatch):
    folder = tmp_path / "gpt_jax" / "xla"
    folder.mkdir(parents=True, mode=0o700)
    folder.parent.chmod(0o700)
    assert not not_ours(folder)
    real, owner = Path.stat, tmp_path.stat().st_uid
    monkeypatch.setattr(os, "getuid", lambda: owner + 1)
    if owner:  # root's folders are trusted
        assert not_ours(folder) == f"{folder} belongs to another user"
    foreign = os.stat_result([0o40700, 0, 0, 0, owner + 2, 0, 0, 0, 0, 0])
    for path in (folder, folder.parent, tmp_path):
        monkeypatch.setattr(
            Path,
            "stat",
            lambda self, path=path, **kw: foreign if self == path else real(self, **kw),
        )
        monkeypatch.setattr(os, "getuid", lambda: owner)
        assert not_ours(folder) == f"{path} belongs to another user"


def test_a_world_writable_folder_above_is_borne_only_if_it_is_sticky(tmp_path):
    shared, folder = tmp_path / "shared", tmp_path / "shared" / "gpt_jax" / "xla"
    folder.mkdir(parents=True, mode=0o700)
    folder.parent.chmod(0o700)
    shared.chmod(0o1777)
    assert not not_ours(folder)
    shared.chmod(0o777)
    assert not_ours(folder) == f"{shared} can be written by others"


@pytest.mark.parametrize("home", ["file", "/proc/nowhere"])
def test_a_home_that_cannot_be_written_ends_no_run(start, tmp_path, home):
    (tmp_path / "file").touch()
    out, [said] = start(HOME=str(tmp_path / home))
    assert out[1] == "None"
    assert said.startswith("note: compiled programs are not kept (")


def test_a_full_disk_is_noticed_before_the_first_program(tmp_path, monkeypatch, capsys):
    class Full:
        def __init__(self, **_):
            raise OSError(28, "No space left on device")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_folder() == tmp_path / "gpt_jax" / "xla"
    monkeypatch.setattr(compile_cache.tempfile, "TemporaryFile", Full)
    assert default_folder() is None
    assert "No space left on device" in capsys.readouterr().err


def test_an_entry_cut_short_is_told_of_in_a_line_and_made_again(start, tmp_path):
    start()
    folder = tmp_path / "home" / ".cache" / "gpt_jax" / "xla"
    whole = {path: path.stat().st_size for path in folder.iterdir()}
    for path in whole:
        path.write_bytes(path.read_bytes()[:100])
    out, [said] = start()
    assert out[1] == str(folder)
    assert said.startswith(f"note: a compiled program is not kept, or made again ({folder}: ")
    assert not start()[1]
    assert all(path.stat().st_size > 100 for path in whole)


def test_other_warnings_are_shown_as_ever(tmp_path):
    shown = []
    mender = Mender(tmp_path, lambda *args, **_: shown.append(args))
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = mender
        warnings.warn("another", UserWarning, stacklevel=1)
    assert str(shown[0][0]) == "another"


def test_the_oldest_entries_make_way(tmp_path, monkeypatch):
    for n in range(6):
        path = tmp_path / f"jit_{n}-cache"
        path.write_bytes(bytes(10))
        os.utime(path, (n, n))
    monkeypatch.setattr(compile_cache, "ENTRIES", 5)
    drop_the_oldest(tmp_path)
    assert sorted(p.name[4] for p in tmp_path.iterdir()) == list("12345")
    monkeypatch.setattr(compile_cache, "BYTES", 30)
    drop_the_oldest(tmp_path)
    assert sorted(p.name[4] for p in tmp_path.iterdir()) == list("345")


def test_what_is_compiled_for_devices_that_are_not_there_is_not_kept(start, tmp_path):
    out, said = start(COMPILE.replace('"cpu")', '"cpu", keep_compiled=False)', 1))
    assert out[1] == "None"
    assert not said
    assert not (tmp_path / "home" / ".cache").exists()
