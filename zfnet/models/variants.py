"""Networks with one thing changed, as the papers' ablations have them: a table derived from a table.

`ROWS` are those of the architecture table (ZFNet Tab. 3 of arXiv v3, Tab. 2 of ECCV): the paper removes layers from its
replication of AlexNet, and widens layers of both networks. `CLAIMS` are what AlexNet's paper says that its parts bring.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from fractions import Fraction

from zfnet.models.layers import Architecture, Convolution, Pool

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


def without_convolution(architecture: Architecture, number: int) -> Architecture:
    """The network without one convolution layer, as far as it computes: its stride and its pool stay.

    AlexNet's Sec. 1 removes layers and does not say how. Were stride and pool to go as well, maps and the first fully
    connected layer would grow many times over. So the layer beneath takes the pool upon its own; of the first layer,
    the one above it takes stride and pool, and then sees the image without padding. All other maps keep their sizes.
    """
    layers = {layer.name: layer for layer in architecture.convolutions}
    names = list(layers)
    place = names.index(f"conv{number}")
    gone = layers.pop(names[place])
    heir = layers[names[place - 1 if place else 1]]
    if place:
        taken = replace(heir, pool=_upon(heir.pool, gone.pool))
    else:
        pool = _upon(gone.pool, heir.pool)
        taken = replace(heir, stride=gone.stride * heir.stride, pad=0, groups=1, pool=pool)
    return replace(architecture, convolutions=tuple((layers | {heir.name: taken}).values()))


def _upon(first: Pool | None, second: Pool | None) -> Pool | None:
    return first.then(second) if first and second else first or second


def _changed(architecture: Architecture, change: Callable[[Convolution], Convolution]) -> Architecture:
    return replace(architecture, convolutions=tuple(map(change, architecture.convolutions)))


def without_normalisation(architecture: Architecture) -> Architecture:
    """The network without contrast normalisation (AlexNet Sec. 3.3)."""
    return _changed(architecture, lambda layer: replace(layer, normalise=None))


def with_separate_pools(architecture: Architecture) -> Architecture:
    """The network with pools of 2 x 2 at stride 2, which do not overlap; maps keep their sizes (AlexNet Sec. 3.4)."""
    pool = Pool(kernel=2, stride=2, ceil=False)
    return _changed(architecture, lambda layer: replace(layer, pool=pool if layer.pool else None))


def half(architecture: Architecture) -> Architecture:
    """AlexNet on one GPU (Sec. 3.2): half the filters, each of which sees every map.

    As the paper's footnote has it, the last convolution layer keeps its maps, and with them the next layer its weights.
    """
    last = architecture.convolutions[-1].name
    return ungrouped(
        _changed(architecture, lambda layer: layer if layer.name == last else replace(layer, maps=layer.maps // 2))
    )


CLAIMS: dict[str, Callable[[Architecture], Architecture]] = {
    "nonorm": without_normalisation,
    "pool2": with_separate_pools,
    "half": half,
    "tanh": lambda table: replace(table, activation="tanh"),
    "no1": lambda table: without_convolution(table, 1),
    "no2": lambda table: without_convolution(table, 2),
    "no3": lambda table: without_convolution(table, 3),
    "no4": lambda table: without_convolution(table, 4),
    "no5": lambda table: without_convolution(table, 5),
}
"""As ROWS, of AlexNet alone."""


def variants(
    architecture: Architecture, rows: Mapping[str, Callable[[Architecture], Architecture]] = ROWS
) -> Iterator[Architecture]:
    """Every one of these rows, for this network."""
    for suffix, derive in rows.items():
        yield replace(derive(architecture), name=f"{architecture.name}_{suffix}")
