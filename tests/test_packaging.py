"""What is published, and the files by which: the wheel, the sdist, CI, the citation."""

import itertools
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml  # flax brings it

import gpt_jax

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
WORKFLOWS = {
    path.stem: yaml.safe_load(path.read_text("utf-8"))
    for path in (ROOT / ".github" / "workflows").glob("*.yml")
}
CI = WORKFLOWS["ci"]["jobs"]
NAME = f"gpt_jax-{gpt_jax.__version__}"
QUICK = [
    "--max_iters=2", "--n_layer=1", "--n_head=2", "--n_embd=16", "--block_size=16",
    "--batch_size=8", "--eval_iters=1", "--sample_tokens=0",
]  # fmt: skip


def build(source, kind, folder):
    """Build a wheel or an sdist with the backend alone, which needs no network."""
    command = [sys.executable, "-m", "hatchling", "build", "-t", kind, "-d", str(folder)]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    [path] = folder.glob(f"{NAME}*.{'whl' if kind == 'wheel' else 'tar.gz'}")
    return path


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    return build(ROOT, "wheel", tmp_path_factory.mktemp("wheel"))


def contents(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def files(folder):
    """What is kept of a folder, by its path from the root."""
    return {
        path.relative_to(ROOT).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and not {"__pycache__", ".ipynb_checkpoints"} & set(path.parts)
    }


def test_the_wheel_is_the_package_with_the_two_scripts_in_it_and_nothing_else(wheel):
    found = contents(wheel)
    expected = files(ROOT / "gpt_jax")
    for name in ("train.py", "sample.py"):
        expected[f"gpt_jax/scripts/{name}"] = (ROOT / name).read_bytes()
    about = {name for name in found if name.startswith(f"{NAME}.dist-info/")}
    assert {name: found[name] for name in found.keys() - about} == expected
    assert {"gpt_jax/py.typed", "gpt_jax/configs/quickstart.py"} <= expected.keys()
    assert found[f"{NAME}.dist-info/licenses/LICENSE"] == (ROOT / "LICENSE").read_bytes()


def test_the_sdist_has_what_the_tests_need_and_makes_the_same_wheel(wheel, tmp_path):
    sdist = build(ROOT, "sdist", tmp_path)
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    source = tmp_path / NAME
    for name, data in {**files(ROOT / "tests"), **files(ROOT / "docs")}.items():
        assert (source / name).read_bytes() == data, name
    for name in ("train.py", "README.md", ".github/workflows/ci.yml", "CITATION.cff"):
        assert (source / name).is_file(), name
    assert contents(build(source, "wheel", tmp_path)) == contents(wheel)


def test_the_installed_wheel_trains_and_samples_in_an_empty_folder(wheel, tmp_path):
    """Its dependencies are those of this environment: there may be no network."""
    pytest.importorskip("pip")
    site, empty = tmp_path / "site", tmp_path / "empty"
    empty.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(site), "XLA_FLAGS": ""}  # one device

    def run(*command):
        done = subprocess.run(
            command, cwd=empty, env=environment, capture_output=True, encoding="utf-8"
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    run(sys.executable, "-m", "pip", "--isolated", "install", "--quiet", "--no-deps", "--no-index",
        f"--target={site}", str(wheel))  # fmt: skip
    assert {path.name for path in site.iterdir()} == {"gpt_jax", f"{NAME}.dist-info", "bin"}
    out = run(sys.executable, "-m", "gpt_jax.train", *QUICK)
    assert "step 2: train loss" in out
    assert "  gpt-jax sample --start" in out  # there is no sample.py to be named
    command = shutil.which("gpt-jax", path=str(site / "bin"))
    assert run(command, "sample", "--start=def ", "--num_samples=1", "--max_new_tokens=4") > "def "
    assert (empty / "out" / "loss.png").is_file()
    assert {path.name for path in empty.iterdir()} == {"data", "out"}


def test_the_python_versions_of_ci_are_those_of_the_project():
    named = [
        name.rsplit(" ", 1)[1]
        for name in PROJECT["classifiers"]
        if re.fullmatch(r"Programming Language :: Python :: 3\.\d+", name)
    ]
    assert CI["test"]["strategy"]["matrix"]["python"] == named
    assert PROJECT["requires-python"] == f">={named[0]}"


def test_the_oldest_versions_of_ci_are_the_bounds_of_the_project():
    lines = (ROOT / ".github" / "oldest.txt").read_text("utf-8").splitlines()
    oldest = dict(
        re.split("==", line.split(";")[0]) for line in lines if line and not line.startswith("#")
    )
    bounds = dict(re.split(">=", text) for text in PROJECT["dependencies"])
    bounds["jaxlib"] = bounds["jax"]
    assert oldest == bounds
    for extra in ("cuda", "tpu"):
        [jax] = PROJECT["optional-dependencies"][extra]
        assert jax.endswith(f">={bounds['jax']}")


def test_a_version_has_one_home_and_the_citation_agrees():
    assert PROJECT["dynamic"] == ["version"]
    assert "version" not in PROJECT
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert citation["version"] == gpt_jax.__version__
    assert citation["license"] == PROJECT["license"]
    assert citation["repository-code"] == PROJECT["urls"]["Repository"]


@pytest.mark.parametrize("name", WORKFLOWS)
def test_a_workflow_is_allowed_no_more_than_to_read_and_ends(name):
    """Rights are given job by job, and no job with rights runs code of a pull request."""
    workflow = WORKFLOWS[name]
    assert workflow["permissions"] == {"contents": "read"}
    assert "pull_request_target" not in workflow[True]  # YAML 1.1 reads `on` as true
    for job in workflow["jobs"].values():
        assert job["timeout-minutes"] <= 60
        uses = [step["uses"] for step in job["steps"] if "uses" in step]
        if "permissions" in job:
            assert not any("checkout" in action for action in uses)
        for action in uses:
            assert re.fullmatch(r"[\w-]+/[\w-]+@(v\d+|release/v\d+)", action)
        for step in job["steps"]:
            if "checkout" in step.get("uses", ""):
                assert step["with"] == {"persist-credentials": False}


def test_ci_names_tests_that_are_there():
    matrix = CI["test-elsewhere"]["strategy"]["matrix"]["include"]
    for path in itertools.chain.from_iterable(entry["tests"].split() for entry in matrix):
        assert (ROOT / path).exists(), path


def test_the_forms_and_the_hooks_are_what_github_and_pre_commit_read():
    for path in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"):
        form = yaml.safe_load(path.read_text("utf-8"))
        assert path.stem == "config" or {"name", "description", "body"} <= form.keys()
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text("utf-8"))
    [repository] = hooks["repos"]
    assert repository["repo"] == "local"  # so that no version stands there
    tools = {hook["entry"].split()[0] for hook in repository["hooks"]}
    assert tools == {"ruff", "pyright"}
    pinned = {line.split("==")[0] for line in PROJECT["optional-dependencies"]["lint"]}
    assert tools <= pinned
