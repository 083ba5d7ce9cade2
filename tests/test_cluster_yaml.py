"""cluster.yaml: what Ray itself checks before it starts a cluster, and what we ask of ours. No cloud is called."""

import copy
import shutil
import tomllib
import zipfile
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from tests.conftest import ROOT


@pytest.fixture
def config() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "cluster.yaml").read_text())


def check(config: dict[str, Any]) -> dict[str, Any]:
    """As `ray up` does, up to the first call of the cloud."""
    prepared = prepare_config(copy.deepcopy(config))
    validate_config(prepared)
    return prepared


def commands(config: dict[str, Any], name: str) -> str:
    return "\n".join(config[name])


def test_ray_accepts_it(config):
    prepared = check(config)
    assert prepared["head_node_type"] == "head"
    assert prepared["provider"]["type"] == "aws"


def test_its_ray_is_that_of_pyproject(config):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (pin,) = [need for need in project["dependencies"] if need.startswith("ray[")]
    version = pin.partition("==")[2]
    docker = config["docker"]
    assert docker["head_image"] == f"rayproject/ray:{version}-py311-cpu"
    assert docker["worker_image"] == f"rayproject/ray:{version}-py311-gpu"
    assert project["requires-python"] == ">=3.11"
    import ray

    assert ray.__version__ == version


def test_no_work_lands_on_the_head(config):
    head = config["available_node_types"][config["head_node_type"]]
    assert head["resources"] == {"CPU": 0, "GPU": 0}


def test_workers_are_spot_and_come_and_go(config):
    kinds = {name: kind for name, kind in config["available_node_types"].items() if name != config["head_node_type"]}
    for kind in kinds.values():
        assert kind["min_workers"] == 0
        assert 0 < kind["max_workers"] <= config["max_workers"]
        assert kind["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert kinds["gpu"]["node_config"]["InstanceType"].startswith(("g", "p"))
    assert sum(kind["max_workers"] for kind in kinds.values()) <= config["max_workers"]
    assert 0 < config["idle_timeout_minutes"] <= 30


def test_decoders_have_nodes_that_no_worker_with_a_gpu_fits_on(config):
    from pipeline.cluster import Decoders

    kinds = config["available_node_types"]
    marked = {name for name, kind in kinds.items() if Decoders().on in kind["resources"]}
    assert marked == {"decoding"}
    assert kinds["decoding"]["node_config"]["InstanceType"].startswith("c")
    assert kinds["decoding"]["docker"]["worker_image"] == config["docker"]["head_image"]


def test_containers_have_room_to_hand_images_over(config):
    options = config["docker"]["run_options"] + config["docker"]["worker_run_options"]
    assert "--shm-size=32g" in options
    assert any("nofile=65536" in option for option in options)


def test_nothing_is_open_to_the_world(config):
    """The dashboard on loopback, and a token that every node has, which is on no command line."""
    assert "--dashboard-host=127.0.0.1" in commands(config, "head_start_ray_commands")
    assert any("RAY_AUTH_MODE=token" in option for option in config["docker"]["run_options"])
    assert config["file_mounts"]["/home/ray/.ray/auth_token"] == "~/.ray/auth_token"
    text = (ROOT / "cluster.yaml").read_text()
    assert "0.0.0.0" not in text
    assert "RAY_AUTH_TOKEN=" not in text


def test_every_node_gets_the_project(config):
    (target,) = [remote for remote, local in config["file_mounts"].items() if local == "."]
    assert f"cd {target} && pip install" in commands(config, "setup_commands")
    assert "-e ." in commands(config, "setup_commands")
    assert {".venv", "runs", "shards"} <= set(config["rsync_exclude"])


def set_at(config: dict[str, Any], value: Any, *path: str) -> None:
    for name in path[:-1]:
        config = config[name]
    config[path[-1]] = value


MISTAKES = {
    "an unknown key": (1, "max_worker"),
    "an unknown key of a node type": (0, "available_node_types", "gpu", "min_worker"),
    "a head type that is not there": ("heed", "head_node_type"),
    "a minimum above the maximum": (9, "available_node_types", "gpu", "min_workers"),
    "words for a number": ("four", "max_workers"),
    "an unknown provider": ("awz", "provider", "type"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_caught(config, mistake):
    value, *path = MISTAKES[mistake]
    set_at(config, value, *path)
    with pytest.raises(Exception, match=r"."):
        check(config)


def test_the_upload_of_a_job_is_the_code_and_no_more(tmp_path, monkeypatch):
    """What `ray job submit --working-dir .` packs of a copy with much beside the code, by Ray's own reading."""
    from ray._private.runtime_env.packaging import create_package

    wanted = ["jobs/train.py", "pipeline/train.py", "zfnet/models/zfnet.py", "pyproject.toml", "constraints.txt"]
    unwanted = [".git/HEAD", ".venv/bin/python", "shards/rendered/a.tar", "runs/demo/run.json", "downloads/x", "docs/x"]
    for name in [*wanted, *unwanted, "pipeline/__pycache__/x.pyc"]:
        (tmp_path / "project" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "project" / name).write_text("x")
    shutil.copy(ROOT / ".rayignore", tmp_path / "project")
    monkeypatch.chdir(tmp_path / "project")
    create_package(str(tmp_path / "project"), tmp_path / "upload.zip", include_gitignore=True)
    with zipfile.ZipFile(tmp_path / "upload.zip") as upload:
        names = {name for name in upload.namelist() if not name.endswith("/")}
    assert names - {".rayignore"} == set(wanted)
