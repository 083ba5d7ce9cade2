"""What tests share: small real shards, small real runs, one Ray cluster. All made here; nothing is downloaded."""

import io
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
sys.path.insert(0, str(ROOT))
os.environ.pop("ZFNET_HOME", None)
torch.set_num_threads(1)

# No test asserts a time, on a busy machine neither.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")

from pipeline.indexing import index_shards  # noqa: E402
from pipeline.runs import Run  # noqa: E402
from pipeline.shards import Index  # noqa: E402
from tests.tars import write_tar  # noqa: E402
from zfnet import models  # noqa: E402
from zfnet.images import Preprocessing  # noqa: E402

CLASSES = ("red", "green", "blue")


def jpeg(rng: np.random.Generator, height: int = 80, width: int = 96) -> bytes:
    """A JPEG of random coarse blobs."""
    coarse = rng.integers(0, 256, size=(8, 8, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=90)
    return buffer.getvalue()


def samples(count: int, *, seed: int = 0, prefix: str = "s") -> list[tuple[str, dict[str, bytes]]]:
    """Keys and members of random samples."""
    rng = np.random.default_rng(seed)
    return [
        (f"{prefix}{seed}-{i:04d}", {"jpg": jpeg(rng), "cls": str(int(rng.integers(len(CLASSES)))).encode()})
        for i in range(count)
    ]


@pytest.fixture
def make_shards(tmp_path):
    """Write shards of the given sizes (split -> samples of each shard) and their index; returns the folder."""

    def make(name: str = "shards", **splits: list[int]) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        for number, (split, sizes) in enumerate(splits.items()):
            for shard, size in enumerate(sizes):
                write_tar(folder / f"{split}-{shard:06d}.tar", samples(size, seed=100 * number + shard))
        (folder / "classes.txt").write_text("\n".join(CLASSES) + "\n")
        index_shards([str(path) for path in folder.glob("*.tar")], str(folder), classes=None, accept_damaged=False)
        return folder

    return make


def random_model(classes: int = len(CLASSES), seed: int = 0) -> torch.nn.Module:
    """A zfnet_small whose activations are of a sensible size in every layer."""
    torch.manual_seed(seed)
    network = models.build("zfnet_small", classes=classes)
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
            torch.nn.init.kaiming_normal_(module.weight)
            torch.nn.init.normal_(module.bias, std=0.1)
    return network.eval()


@pytest.fixture
def make_run(tmp_path):
    """A run with a random zfnet_small; returns its folder."""

    def make(name: str = "run", seed: int = 0, classes: tuple[str, ...] = CLASSES) -> Path:
        network = random_model(len(classes), seed)
        preprocessing = Preprocessing(
            resize_px=network.resize_px, crop_px=network.input_px, mean=torch.full((3, 1, 1), 120.0)
        )
        Run.at(str(tmp_path / name)).save_model(
            network, architecture="zfnet_small", classes=classes, preprocessing=preprocessing, about={}
        )
        return tmp_path / name

    return make


@pytest.fixture(scope="session")
def _ray_ended():
    yield
    if ray := sys.modules.get("ray"):
        ray.shutdown()


@pytest.fixture
def ray_cluster(_ray_ended):
    """One local cluster for all tests that need Ray, unless one in between ended it; never one from elsewhere."""
    import ray

    if not ray.is_initialized():
        ray.init(
            address="local",
            num_cpus=4,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="ERROR",
            object_store_memory=256 * 2**20,
        )


def load_index(folder: Path) -> Index:
    """The index in a folder."""
    return Index.load(str(folder))


@pytest.fixture
def s3(monkeypatch):
    """An S3 server with an empty bucket, and the environment that leads to it; as its proxy, which injects faults."""
    from tests.pipeline.s3 import ENVIRONMENT, served

    with served() as proxy:
        for name, value in {**ENVIRONMENT, "AWS_ENDPOINT_URL": proxy.endpoint}.items():
            monkeypatch.setenv(name, value)
        yield proxy


@pytest.fixture
def gs(monkeypatch):
    """The same for Google's storage."""
    from tests.pipeline.gs import environment, served

    with served() as proxy:
        for name, value in environment(proxy).items():
            monkeypatch.setenv(name, value)
        yield proxy


@pytest.fixture
def shared_data():
    """The real images beside the project; the test is skipped, saying so, where they are not."""

    def find(name: str) -> Path:
        folder = SHARED / "data" / name
        if not folder.is_dir():
            pytest.skip(f"real images {name} are not beside the project (../shared/data)")
        return folder

    return find
