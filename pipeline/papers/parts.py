"""What parts of the papers' networks are worth, by the papers: the rows that jobs/ablation.py trains."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Row:
    """A network with something changed, and what its paper found."""

    suffix: str
    """Of the variant's name; empty for the network as it is."""
    change: str
    """What is changed, in words."""
    table: str
    """The block: architecture (ZFNet Tab. 3), claim (AlexNet), or other."""
    errors: tuple[float, float, float] | None = None
    """The paper's errors on ImageNet in percent: training top-1, validation top-1 and top-5."""
    costs: tuple[float | None, float | None] = (None, None)
    """What the change costs by the paper, in points of top-1 and top-5 error, where it says only that."""
    says: str | None = None
    """What the paper says, where that is no such number."""


def _architecture(suffix: str, change: str, *errors: float) -> Row:
    train_top1, top1, top5 = errors
    return Row(suffix=suffix, change=change, table="architecture", errors=(train_top1, top1, top5))


_CONVOLUTION = "removing any convolution layer gave worse results (Sec. 1)"
_MIDDLE = "removing any of the middle layers costs about 2 % (Sec. 7)"

ROWS: dict[str, tuple[Row, ...]] = {
    "alexnet": (
        _architecture("", "as it is", 35.1, 40.5, 18.1),
        _architecture("no34", "layers 3, 4 removed", 41.8, 45.4, 22.1),
        _architecture("no7", "layer 7 removed", 27.4, 40.0, 18.4),
        _architecture("no67", "layers 6, 7 removed", 27.4, 44.8, 22.4),
        _architecture("no3467", "layers 3, 4, 6, 7 removed", 71.1, 71.3, 50.1),
        _architecture("fc2048", "layers 6, 7: 2048 units", 40.3, 41.7, 18.8),
        _architecture("fc8192", "layers 6, 7: 8192 units", 26.8, 40.0, 18.1),
        Row(suffix="nonorm", change="no contrast normalisation", table="claim", costs=(1.4, 1.2)),
        Row(suffix="pool2", change="pools 2 x 2, not overlapping", table="claim", costs=(0.4, 0.3)),
        Row(suffix="nocolour", change="colours not shifted", table="claim", costs=(1.0, None), says="more than 1 %"),
        Row(suffix="half", change="half the filters, on one GPU", table="claim", costs=(1.7, 1.2)),
        Row(
            suffix="tanh",
            change="tanh for ReLU",
            table="claim",
            says="on CIFAR-10 ReLU reaches 25 % training error six times sooner (Sec. 3.1)",
        ),
        Row(suffix="no1", change="layer 1 removed", table="claim", says=_CONVOLUTION),
        Row(suffix="no2", change="layer 2 removed", table="claim", costs=(2.0, None), says=_MIDDLE),
        Row(suffix="no3", change="layer 3 removed", table="claim", costs=(2.0, None), says=_MIDDLE),
        Row(suffix="no4", change="layer 4 removed", table="claim", costs=(2.0, None), says=_MIDDLE),
        Row(suffix="no5", change="layer 5 removed", table="claim", says=_CONVOLUTION),
    ),
    "zfnet": (
        _architecture("", "as it is", 33.1, 38.4, 16.5),
        _architecture("fc2048", "layers 6, 7: 2048 units", 38.2, 40.2, 17.6),
        _architecture("fc8192", "layers 6, 7: 8192 units", 22.0, 38.8, 17.0),
        _architecture("wide", "layers 3, 4, 5: 512, 1024, 512 maps", 18.8, 37.5, 16.0),
        _architecture("wide_fc8192", "layers 6, 7: 8192 units; 3, 4, 5: 512, 1024, 512 maps", 10.0, 38.3, 16.9),
    ),
}
"""ZFNet Tab. 3 (its first block is a replication of AlexNet), and the sections of AlexNet's paper."""
