"""What can be said of a layer's filters without an image: their size, likeness, frequencies and aliasing.

Zeiler and Fergus, ECCV 2014, Sec. 4.1, found in AlexNet's filters what made them change the network: "the first layer
filters are a mix of extremely high and low frequency information, with little coverage of the mid frequencies", and
"the 2nd layer visualization shows aliasing artifacts caused by the large stride 4 used in the 1st layer convolutions";
in Sec. 3, that a few first-layer filters dominate. The paper looked at pictures; here each is a number.
"""

import torch
from torch import Tensor, nn

from zfnet.graph import Graph

GRID = 64
"""Frequencies along an axis at which spectra are taken, at least; more for filters of more than a quarter of it."""

NYQUIST = 0.5
"""Cycles a pixel: the highest frequency that pixels can show along an axis."""

_PASSED_MAP_BY_MAP = ("identity", "pad", "batchnorm", "relu", "maxpool", "avgpool", "normalisation")


def rms(filters: Tensor) -> Tensor:
    """[maps]: root mean square of each filter's weights [maps, ...] (Sec. 3, what renormalisation bounds)."""
    return filters.double().flatten(1).square().mean(1).sqrt()


def cosines(filters: Tensor, groups: int = 1) -> Tensor:
    """[maps, maps]: cosine between any two filters [maps, ...].

    NaN on the diagonal, for a filter of zeros, and for filters of two groups, which see different maps.
    """
    flat = filters.double().flatten(1)
    unit = flat / flat.square().sum(1, keepdim=True).sqrt()
    found = (unit @ unit.T).clamp(-1, 1)
    group = torch.arange(len(flat), device=flat.device) // (len(flat) // groups)
    alike = group[:, None] == group
    return found.masked_fill(~alike | torch.eye(len(flat), dtype=torch.bool, device=flat.device), torch.nan)


def spectrum(filters: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Power of each filter [maps, channels, rows, cols] at each frequency, summed over channels: [maps, n, n].

    With it the frequencies of its rows and of its columns [n], in cycles a pixel. The filters are filled up with zeros,
    so that their size does not decide at which frequencies they are looked at.
    """
    size = max(GRID, 4 * max(filters.shape[2:]))
    power = torch.fft.fft2(filters.double(), s=(size, size)).abs().square().sum(1)
    along = torch.fft.fftfreq(size, dtype=torch.float64, device=filters.device)
    return power, along, along


def band_shares(filters: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """[maps] twice: the shares of each filter's energy at very low and at very high frequencies.

    A frequency's height is its distance from zero in cycles a pixel, whatever its direction. Very low: at most `low`
    times the Nyquist frequency of an axis; very high: at least `high` times (the corners of the plane, up to 1.41 of
    it, included). A filter of white noise has pi / 4 low^2 and 1 - pi / 4 high^2 (to the grid). NaN for a filter of
    zeros. Raises ValueError unless 0 < low < high <= 1.
    """
    if not 0 < low < high <= 1:
        raise ValueError(f"low={low}, high={high} were given; expected 0 < low < high <= 1, shares of Nyquist")
    power, rows, cols = spectrum(filters)
    height = (rows[:, None].square() + cols.square()).sqrt() / NYQUIST
    total = power.sum((1, 2))
    return power[:, height <= low].sum(1) / total, power[:, height >= high].sum(1) / total


def aliased_shares(filters: Tensor, stride: tuple[int, int]) -> Tensor:
    """[maps]: the share of each filter's energy that its stride folds onto other frequencies.

    Answers that are taken every `stride` pixels show frequencies up to 1 / (2 stride) cycles a pixel along an axis;
    what the filter passes above that, along either axis, comes back as a lower frequency that is not in the image. 0
    at a stride of 1. NaN for a filter of zeros.
    """
    power, rows, cols = spectrum(filters)
    kept = [along.abs() <= NYQUIST / step for along, step in zip((rows, cols), stride, strict=True)]
    folded = ~(kept[0][:, None] & kept[1])
    return power[:, folded].sum(1) / power.sum((1, 2))


def first_layer_beneath(graph: Graph, layer: str) -> str | None:
    """The convolution of the image itself whose maps `layer` reads, one by one (pooled, normalised, rectified or not).

    None where the layer is no convolution, reads maps of several layers, or of one that does not see the image.
    """
    if not isinstance(graph[layer].module, nn.Conv2d):
        return None
    below = _source(graph, layer, _PASSED_MAP_BY_MAP)
    return below if is_first(graph, below) else None


def is_first(graph: Graph, layer: str) -> bool:
    """Whether the layer is a convolution of the image itself, perhaps padded."""
    return isinstance(graph[layer].module, nn.Conv2d) and _source(graph, layer, ("identity", "pad")) == graph.input


def _source(graph: Graph, layer: str, passed: tuple[str, ...]) -> str:
    """The first operation beneath the layer that is none of these kinds."""
    (name,) = graph[layer].inputs[:1]
    while graph[name].kind in passed:
        (name,) = graph[name].inputs[:1]
    return name


def aliased_shares_above(first: nn.Conv2d, second: nn.Conv2d) -> Tensor:
    """[maps of `second`]: the share of what each of its maps is fed that the first layer's stride has folded.

    White images give the first layer's filter c answers of power |w_c|^2, of which `aliased_shares` is folded, and the
    second layer's filter m weighs them by |v_mc|^2; rectification, pooling and normalisation, which work on the maps
    one by one, are left out. Raises ValueError where the second layer does not read the first one's maps.
    """
    if second.in_channels != first.out_channels:
        raise ValueError(
            f"the second layer reads {second.in_channels} maps and the first has {first.out_channels}: expected a "
            "layer that reads the first one's maps"
        )
    power = first.weight.detach().double().flatten(1).square().sum(1)
    stride = (first.stride[0], first.stride[1])
    folded = torch.where(power > 0, power * aliased_shares(first.weight.detach(), stride), power)
    weigh = second.weight.detach().double().square().sum((2, 3))  # [maps, channels of the group]
    of_map = torch.arange(len(weigh), device=weigh.device) // (len(weigh) // second.groups)
    channels = of_map[:, None] * weigh.shape[1] + torch.arange(weigh.shape[1], device=weigh.device)
    return (weigh * folded[channels]).sum(1) / (weigh * power[channels]).sum(1)
