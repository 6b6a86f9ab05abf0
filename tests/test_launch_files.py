"""The files of docs/launch, as far as they can be tried without the machines they are for."""

import os
import re
import shlex
import signal
import subprocess
from pathlib import Path

import pytest
import yaml  # flax brings it

from gpt_jax.config import parse

DOCS = Path(__file__).parents[1] / "docs"
LAUNCH = DOCS / "launch"
PAGE = (DOCS / "running_at_scale.md").read_text("utf-8")
FILES = sorted(LAUNCH.iterdir())
SCRIPTS = [path for path in FILES if path.suffix in (".sh", ".sbatch")]


def name(path):
    return path.name


def train_commands(text):
    """The arguments of each train.py that is started, with 1 for what a variable would say."""
    lines = [line.strip() for line in text.replace("\\\n", " ").splitlines()]
    for line in lines:
        before, program, arguments = line.partition("train.py ")
        if program and not before.startswith("#"):
            known = re.sub(r"\"?\$[^ \"]*\"?", "1", arguments.replace('"$@"', ""))
            words = shlex.split(re.split(r"[\"&|>]|#", known)[0])
            yield [word for word in words if word != "1"]


def job_set(kind):
    documents = yaml.safe_load_all((LAUNCH / "jobset.yaml").read_text("utf-8"))
    return next(document for document in documents if document["kind"] == kind)


def stub(folder, program, *lines):
    path = folder / program
    path.write_text("\n".join(["#!/usr/bin/env bash", *lines, ""]), "utf-8")
    path.chmod(0o755)


@pytest.mark.parametrize("path", SCRIPTS, ids=name)
def test_a_script_is_bash_that_stops_at_errors(path):
    assert subprocess.run(["bash", "-n", path], stderr=subprocess.PIPE).stderr == b""
    assert "\nset -euo pipefail\n" in path.read_text("utf-8")


@pytest.mark.parametrize("path", FILES, ids=name)
def test_a_launch_file_starts_a_run_that_train_understands_and_that_goes_on(path):
    commands = list(train_commands(path.read_text("utf-8")))
    assert commands
    for command in commands:
        config = parse(command)
        assert config.init_from == "auto"
        assert config.save_interval > 0


def test_every_command_of_the_page_is_understood():
    commands = list(train_commands("\n".join(re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL))))
    assert len(commands) >= 5
    for command in commands:
        parse(command)


def test_the_page_has_every_launch_file_and_no_other():
    assert set(re.findall(r"docs/launch/([\w.]+)", PAGE)) == {path.name for path in FILES}
    assert set(re.findall(r"\(launch/([\w.]+)\)", PAGE)) == {path.name for path in FILES}


def test_the_pods_are_what_jax_can_find():
    (job,) = job_set("JobSet")["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    assert job["replicas"] == 1  # JAX counts the pods of one Job
    assert spec["completionMode"] == "Indexed"  # also JobSet's default
    assert spec["parallelism"] == spec["completions"]
    assert "network" not in job_set("JobSet")["spec"]  # JAX takes the subdomain for the set's name
    pod = spec["template"]["spec"]
    assert pod["restartPolicy"] == "Never"  # JobSet's default would restart a pod without the rest
    account = job_set("ServiceAccount")["metadata"]["name"]
    assert pod["serviceAccountName"] == account
    binding = job_set("RoleBinding")
    assert binding["roleRef"]["name"] == job_set("Role")["metadata"]["name"]
    assert [subject["name"] for subject in binding["subjects"]] == [account]
    claims = [v["persistentVolumeClaim"]["claimName"] for v in pod["volumes"] if len(v) == 2
              and "persistentVolumeClaim" in v]  # fmt: skip
    assert claims == [job_set("PersistentVolumeClaim")["metadata"]["name"]]


def test_the_pods_may_read_what_jax_asks_for():
    allowed = {
        (group, resource): set(rule["verbs"])
        for rule in job_set("Role")["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
    }
    for what in [("", "pods"), ("", "services"), ("batch", "jobs")]:
        assert allowed[what] >= {"get", "list"}


@pytest.mark.parametrize(
    ("code", "complete", "restarts", "ends", "queued"),
    [
        (0, True, 0, 0, False),
        (0, False, 0, 0, True),  # stopped at its time limit
        (1, False, 0, 0, True),  # a node died
        (2, False, 0, 2, False),  # wrong input
        (1, False, 50, 1, False),
    ],
)
def test_a_slurm_job_is_queued_again_until_it_is_complete(
    code, complete, restarts, ends, queued, tmp_path
):
    stub(tmp_path, "srun", f"exit {code}")
    stub(tmp_path, "scontrol", 'echo "$@"')
    if complete:
        (tmp_path / "out/checkpoints/7").mkdir(parents=True)
    said = subprocess.run(
        ["bash", LAUNCH / "slurm.sbatch"], stdout=subprocess.PIPE, text=True,
        env={"PATH": f"{tmp_path}:{os.environ['PATH']}", "OUT_DIR": str(tmp_path / "out"),
             "MAX_ITERS": "7", "SLURM_JOB_ID": "9", "SLURM_CPUS_PER_TASK": "8",
             "SLURM_RESTART_COUNT": str(restarts)},
    )  # fmt: skip
    assert (said.returncode, said.stdout) == (ends, "requeue 9\n" if queued else "")


def pod(tmp_path, *lines):
    """A pod's command, with a program in place of python."""
    (job,) = job_set("JobSet")["spec"]["replicatedJobs"]
    (container,) = job["template"]["spec"]["template"]["spec"]["containers"]
    stub(tmp_path, "python", *lines)
    return subprocess.Popen(
        container["command"], stdout=subprocess.PIPE, text=True,
        env={"PATH": f"{tmp_path}:{os.environ['PATH']}", "OUT_DIR": str(tmp_path / "out"),
             "MAX_ITERS": "7"},
    )  # fmt: skip


@pytest.mark.parametrize(("code", "complete", "ends"), [(0, True, 0), (0, False, 1), (2, False, 2)])
def test_a_pod_succeeds_only_if_the_run_is_complete(code, complete, ends, tmp_path):
    if complete:
        (tmp_path / "out/checkpoints/7").mkdir(parents=True)
    with pod(tmp_path, f"exit {code}") as process:
        assert process.wait(10) == ends


def test_a_pod_that_is_asked_to_end_passes_it_on_and_waits_for_the_save(tmp_path):
    lines = ["trap 'echo saved; exit 0' TERM", "echo runs", "for i in {1..99}; do sleep 0.1; done"]
    with pod(tmp_path, *lines) as process:
        assert process.stdout.readline() == "runs\n"
        process.send_signal(signal.SIGTERM)
        assert process.stdout.read() == "saved\n"
        assert process.wait(10) == 1  # not complete: the JobSet starts it again


def test_an_mpi_rank_names_its_process_and_its_gpu(tmp_path):
    stub(tmp_path, "rank", 'echo "$@"', 'echo "gpu $JAX_LOCAL_DEVICE_IDS"')
    said = subprocess.run(
        ["bash", LAUNCH / "open_mpi.sh", "--fsdp=8"], stdout=subprocess.PIPE, text=True,
        env={"PATH": os.environ["PATH"], "PYTHON": str(tmp_path / "rank"), "HOSTS": "a:8,b:8",
             "PORT": "1234", "IS_RANK": "1", "OMPI_COMM_WORLD_RANK": "11",
             "OMPI_COMM_WORLD_SIZE": "16", "OMPI_COMM_WORLD_LOCAL_RANK": "3"},
    )  # fmt: skip
    arguments, gpu = said.stdout.splitlines()
    config = parse(arguments.split()[1:])
    assert config.coordinator_address == "a:1234"
    assert (config.num_processes, config.process_id, config.fsdp) == (16, 11, 8)
    assert gpu == "gpu 3"
