"""The rows of the architecture table (ZFNet Tab. 3 of arXiv v3, Tab. 2 of ECCV): a table derived from a table.

The paper removes layers from its replication of AlexNet, and widens layers of both networks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from fractions import Fraction

from zfnet.models.layers import Architecture

# Tab. 3: "layers 3,4,5: 512,1024,512 maps", which are 384, 384 and 256 in both networks; the small networks' are
# widened as much.
WIDER = {"conv3": Fraction(512, 384), "conv4": Fraction(1024, 384), "conv5": Fraction(512, 256)}


def without(architecture: Architecture, *layers: int) -> Architecture:
    """The network without the layers of these numbers; the others keep their names."""
    names = {f"{kind}{number}" for kind in ("conv", "fc") for number in layers}
    return replace(
        architecture,
        convolutions=tuple(layer for layer in architecture.convolutions if layer.name not in names),
        linears=tuple(layer for layer in architecture.linears if layer.name not in names),
    )


def with_units(architecture: Architecture, units: int) -> Architecture:
    """The network with so many units in each hidden layer without maps (6 and 7)."""
    return replace(architecture, linears=tuple(replace(layer, units=units) for layer in architecture.linears))


def wide(architecture: Architecture) -> Architecture:
    """The network with more maps in layers 3, 4 and 5."""
    return replace(
        architecture,
        convolutions=tuple(
            replace(layer, maps=int(layer.maps * WIDER.get(layer.name, 1))) for layer in architecture.convolutions
        ),
    )


def ungrouped(architecture: Architecture) -> Architecture:
    """The network with every filter seeing every map."""
    return replace(architecture, convolutions=tuple(replace(layer, groups=1) for layer in architecture.convolutions))


ROWS: dict[str, Callable[[Architecture], Architecture]] = {
    "no34": lambda table: without(table, 3, 4),
    "no7": lambda table: without(table, 7),
    "no67": lambda table: without(table, 6, 7),
    "no3467": lambda table: without(table, 3, 4, 6, 7),
    "fc2048": lambda table: with_units(table, 2048),
    "fc8192": lambda table: with_units(table, 8192),
    "wide": wide,
    "wide_fc8192": lambda table: with_units(wide(table), 8192),
}
"""Suffix of a variant's name -> how its table is made from the network's."""


def variants(architecture: Architecture) -> Iterator[Architecture]:
    """Every row of the table, for this network."""
    for suffix, derive in ROWS.items():
        yield replace(derive(architecture), name=f"{architecture.name}_{suffix}")
