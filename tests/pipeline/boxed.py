"""Small boxed shards, and runs of small OverFeat networks, for the tests of localisation and detection."""

import json
from pathlib import Path

import torch

from pipeline.indexing import index_shards
from pipeline.runs import Run
from pipeline.sources.rendered import CLASSES
from pipeline.sources.scenes import Scenes
from tests.tars import write_tar
from zfnet import models
from zfnet.images import Preprocessing
from zfnet.models.heads import HeadedNetwork, initialise_heads

SOURCE = Scenes(train=24, val=12, objects=(1, 3))


def drawn(split: str, numbers: range) -> list[tuple[str, dict[str, bytes]]]:
    """Keys and members of scenes."""
    found = []
    for number in numbers:
        sample = SOURCE.sample(split, number)
        members = {
            "jpg": sample["jpg"],
            "cls": str(sample["cls"]).encode(),
            "json": json.dumps(sample["json"]).encode(),
        }
        found.append((sample["__key__"], members))
    return found


def write(folder: Path, **splits: list[tuple[str, dict[str, bytes]]]) -> Path:
    """Shards of these samples and their index."""
    folder.mkdir()
    for split, samples in splits.items():
        write_tar(folder / f"{split}-000000.tar", samples)
    (folder / "classes.txt").write_text("\n".join(CLASSES) + "\n")
    index_shards([str(path) for path in folder.glob("*.tar")], str(folder), classes=None, accept_damaged=False)
    return folder


def scenes(folder: Path, train: int = 24, val: int = 12) -> Path:
    """Shards of scenes."""
    return write(folder, train=drawn("train", range(train)), val=drawn("val", range(val)))


def save_network(path: Path, architecture: str = "overfeat_fast_small", classes: tuple[str, ...] = CLASSES) -> Path:
    """A run with random weights, whose activations are of a sensible size in every layer."""
    torch.manual_seed(0)
    network = models.build(architecture, len(classes))
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)
    if isinstance(network, HeadedNetwork):
        initialise_heads(network, 0)
        torch.nn.init.normal_(network.regressor.edges.weight, std=0.02)
    size = network.resize_px, network.input_px
    mean, std = torch.full((3, 1, 1), 120.0), torch.full((3, 1, 1), 64.0)
    preprocessing = Preprocessing(resize_px=size[0], crop_px=size[1], mean=mean, std=std)
    Run.at(str(path)).save_model(
        network, architecture=architecture, classes=classes, preprocessing=preprocessing, about={}
    )
    return path
