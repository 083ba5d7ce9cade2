"""Random OverFeat runs, and shards of images of several proportions."""

import numpy as np
import torch

from pipeline.indexing import index_shards
from pipeline.runs import Run
from tests.conftest import CLASSES, jpeg
from tests.tars import write_tar
from zfnet import models
from zfnet.images import Preprocessing

SIZES = [(80, 96), (96, 80), (90, 90), (60, 200), (80, 96), (120, 150), (96, 80)]
"""Height and width of the images."""


def photos(folder):
    """Shards of images of those sizes, keys k0, k1, ..., classes in turn; returns their folder."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    pictures = [
        (f"k{i}", {"jpg": jpeg(rng, *size), "cls": str(i % len(CLASSES)).encode()}) for i, size in enumerate(SIZES)
    ]
    write_tar(folder / "val-0.tar", pictures)
    (folder / "classes.txt").write_text("\n".join(CLASSES) + "\n")
    index_shards([str(folder / "val-0.tar")], str(folder), classes=None, accept_damaged=False)
    return folder


def overfeat_run(path, name="overfeat_fast_small", seed=0, classes=CLASSES):
    """A run of a random OverFeat network whose windows disagree, with a mean for each pixel."""
    torch.manual_seed(seed)
    network = models.build(name, len(classes)).eval()
    for layer in network.children():
        if isinstance(layer, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(layer.weight)
            torch.nn.init.normal_(layer.bias, std=0.1)
    mean = 100 + 50 * torch.rand(3, network.resize_px, network.resize_px)
    std = torch.full((3, 1, 1), 60.0)
    preprocessing = Preprocessing(resize_px=network.resize_px, crop_px=network.input_px, mean=mean, std=std)
    Run.at(str(path)).save_model(network, architecture=name, classes=classes, preprocessing=preprocessing, about={})
    return path
