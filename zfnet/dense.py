"""A network slid over a larger image: the class scores of every window, in one pass (OverFeat Sec. 3.3, 3.5, Fig. 3).

The convolutions run once over the whole image. Windows are then as far apart as all strides multiplied, 36 px in the
accurate model. The last pool is therefore repeated from each of its offsets, 0 to cells - 1 along both axes; the layers
above run over each of the pooled maps, and their outputs are interleaved: windows are 12 px apart.

    sliding = Sliding(models.build("overfeat_accurate").eval())
    pooled = sliding.pooled(x, "fine")                     # what the windows' classifiers, or any other head, read
    maps = sliding.scores(pooled)                          # [N, classes, rows, cols]: a score for each window
    other = slide(head, pooled)                            # the same of any head, a box regressor's, say
    top, left, height, width = sliding.field("fine").box(row, col)  # the window of a cell, in pixels of x

A window is as large as the images that the network was trained on. Convolutions that pad see beyond it: a cell has the
score of the window cut out and run by itself only in networks that do not pad.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Literal

import torch
from PIL import Image
from torch import Tensor, nn

from zfnet.activations import NotFinite
from zfnet.images import Crop, Pixels, cut
from zfnet.models.layers import Network
from zfnet.receptive import ReceptiveField

Stride = Literal["fine", "coarse"]
"""Every offset of the last pool, or the first alone."""

MaximumOf = Literal["probabilities", "scores"]

SCALES = ((0, 0), (1, 2), (2, 4), (4, 6), (5, 7), (6, 9))
"""Tab. 5: by how many coarse strides the shorter and the longer side of the image exceed those of scale 1.

Of the accurate model: 245 x 245, 281 x 317, 317 x 389, 389 x 461, 425 x 497 and 461 x 569 pixels. The fast model cannot
give the table's maps; its sizes follow by the same rule, from 247 x 247 in steps of 32. (For scale 5 the table prints
35 cells before and 11 after the pool; 497 pixels give 38 and 12, and only these the table's own 24 columns of classes.)
"""


def require_scales(scales: Sequence[int]) -> None:
    """Some of 1 to 6, ascending. Raises: ValueError."""
    if not scales or list(scales) != sorted({*scales}) or not {*scales} <= {*range(1, len(SCALES) + 1)}:
        raise ValueError(f"scales is {tuple(scales)}: give some of 1 to {len(SCALES)}, ascending")


class Sliding:
    """A network whose fully connected layers slide, taken apart at its last pool.

    The parts are the network's own modules, in the mode in which they are (`network.eval()` for evaluation); gradients
    flow, and a head of another purpose may take the place of `above`.

    Args:
        network: of a `sliding` architecture, OverFeat's, with a last pool whose windows lie side by side.

    Raises:
        ValueError: it is another one.
    """

    beneath: nn.Sequential
    """Image -> the maps that enter the last pool."""
    above: nn.Sequential
    """Pooled maps [N, maps, rows, cols] -> class scores [N, classes, rows - window_cells + 1, ...]."""
    pool: str
    """Name of the last pool."""
    cells: int
    """Side and stride of the last pool, and so the number of its offsets along each axis: 3 in the accurate model."""
    window_cells: int
    """Side of a window on the pooled maps: 5 in the accurate model, 6 in the fast one."""
    window_px: int
    """Side of a window in pixels: 221, 231."""
    step_px: dict[Stride, int]
    """Distance of neighbouring windows in pixels: coarse 36, fine 12 in the accurate model, 32 and 16 in the fast."""

    def __init__(self, network: nn.Module) -> None:
        if not isinstance(network, Network) or not network.architecture.sliding:
            name = network.architecture.name if isinstance(network, Network) else type(network).__name__
            raise ValueError(
                f"{name} takes images of one size: only a network whose fully connected layers are convolutions slides "
                "over larger ones; give an OverFeat network"
            )
        table = network.architecture
        pool, names = table.convolutions[-1].pool, [name for name, _ in network.named_children()]
        if pool is None or pool.kernel != pool.stride or pool.pad or pool.ceil:
            raise ValueError(f"{table.name} ends in {pool}; offsets need a last pool without overlap, padding or ceil")
        first = names.index(table.linears[0].name if table.linears else table.classifier)
        self.beneath, self.above = network[: first - 1], network[first : names.index("maximum")]
        self.pool = names[first - 1]
        self.cells, self.window_px, self.window_cells = pool.kernel, table.input_px, table.input_px
        for layer in table.convolutions:
            self.window_cells = layer.output_px(self.window_cells)
        coarse = math.prod(layer.stride * (layer.pool.stride if layer.pool else 1) for layer in table.convolutions)
        self.step_px = {"coarse": coarse, "fine": coarse // self.cells}

    # ------------------------------------------------------------------------------------------------------ geometry

    def field(self, stride: Stride) -> ReceptiveField:
        """The windows: `field(stride).box(row, col)` is a cell's (top, left, height, width) in pixels of the image."""
        step, side = self.step_px[stride], self.window_px
        return ReceptiveField((step, step), (0, 0), (side, side))

    def sides_px(self, scale: int) -> tuple[int, int]:
        """Shorter and longer side of the images of a scale, 1 to 6.

        All offsets then give equal maps, and the last window ends with the image.
        """
        if not 1 <= scale <= len(SCALES):
            raise ValueError(f"scale is {scale}; expected 1 to {len(SCALES)}")
        least = self.window_px + (self.cells - 1) * self.step_px["fine"]
        shorter, longer = (least + steps * self.step_px["coarse"] for steps in SCALES[scale - 1])
        return shorter, longer

    def view(self, resized: Image.Image, original: tuple[int, int], scale: int) -> tuple[Pixels, Crop]:
        """What the network sees of an image at a scale: its centre, as large as whole coarse strides allow.

        The paper gives sizes, and does not say how images of other proportions become so large. Here the shorter side
        is that of the scale, and the longer one is cut to the table's, or shorter in images nearer to a square.

        Args:
            resized: the image with its smallest side at `sides_px(scale)[0]`.
            original: its width and height before.
            scale: 1 to 6.

        Returns: uint8 [rows, cols, 3] RGB, and where they lie in the original.
        """
        shorter, longest = self.sides_px(scale)
        spare = min(longest, max(resized.size)) - shorter
        longer = shorter + spare // self.step_px["coarse"] * self.step_px["coarse"]
        upright = resized.height > resized.width
        return cut(resized, original, *((longer, shorter) if upright else (shorter, longer)))

    # ----------------------------------------------------------------------------------------------------- computing

    def pooled(self, x: Tensor, stride: Stride) -> Tensor:
        """The last pool's maps for each of its offsets.

        Args:
            x: [N, 3, rows, cols], normalised; any size from `sides_px(1)[0]` (coarse: `window_px`) a side.
            stride: fine: all offsets (dy, dx), row-major; coarse: (0, 0).

        Returns: [offsets, N, maps, rows, cols], with the rows and columns that all offsets have in common.
        Raises: ValueError for images smaller than a window.
        """
        return self._at_offsets(self.beneath(x), stride)

    def scores(self, pooled: Tensor) -> Tensor:
        """Class scores before the softmax, [N, classes, rows, cols], of the windows that `field` names."""
        return slide(self.above, pooled)

    def activations(self, x: Tensor, names: Collection[str], stride: Stride) -> dict[str, Tensor]:
        """Outputs of operations of the network beneath the classes' maximum, [N, maps, rows, cols] each.

        Above the last pool's input there is a value for each offset, interleaved. Those of conv layers are theirs
        alone; a layer's activation after the ReLU is that of "relu6", and so on.

        Raises: ValueError for a name that is none of them, and for images smaller than a window.
        """
        found, maps = {}, x
        for name, module in self.beneath.named_children():
            maps = module(maps)
            found[name] = maps
        pooled = self._at_offsets(maps, stride)
        found[self.pool] = interleave(pooled)
        for name, module in self.above.named_children():
            pooled = module(pooled.flatten(0, 1)).unflatten(0, pooled.shape[:2])
            found[name] = interleave(pooled)
        if unknown := [name for name in names if name not in found]:
            raise ValueError(f"{', '.join(unknown)} cannot be had of larger images; expected one of {', '.join(found)}")
        return {name: found[name] for name in names}

    def _at_offsets(self, maps: Tensor, stride: Stride) -> Tensor:
        offsets = self.cells if stride == "fine" else 1
        rows, cols = ((side - offsets + 1) // self.cells for side in maps.shape[2:])
        if min(rows, cols) < self.window_cells:
            least = self.sides_px(1)[0] if stride == "fine" else self.window_px
            raise ValueError(f"images are too small for a {stride} window: expected at least {least} px a side")
        height, width = rows * self.cells, cols * self.cells
        shifted = [maps[:, :, y : y + height, z : z + width] for y in range(offsets) for z in range(offsets)]
        return torch.stack([nn.functional.max_pool2d(some, self.cells) for some in shifted])


def slide(head: nn.Module, pooled: Tensor) -> Tensor:
    """A head, maps to maps, over the pooled maps of all offsets [offsets, N, maps, rows, cols]; interleaved."""
    output: Tensor = head(pooled.flatten(0, 1))
    return interleave(output.unflatten(0, pooled.shape[:2]))


def in_context(scores: Tensor, context: nn.Module, lower: Tensor, nearest: Tensor) -> Tensor:
    """Class scores of windows with what the network sees around them at a lower resolution (OverFeat Sec. 5).

    The paper takes lower resolutions into account, and does not say how. Here it is the window of the next lower one
    that lies nearest.

    Args:
        scores: [N, C, rows, cols].
        context: units of the last hidden layer -> what they add to the class scores; both [N, ..., rows, cols].
        lower: those units at the lower resolution, [N, units, its rows, its cols].
        nearest: [N, rows x cols] which of its windows, row by row; -1: there is no lower resolution.

    Returns: [N, C, rows, cols].
    """
    there = nearest.clamp_min(0)[:, None].expand(-1, lower.shape[1], -1)
    around = torch.where(nearest[:, None] >= 0, lower.flatten(2).gather(2, there), 0.0)
    added: Tensor = context(around.unflatten(2, scores.shape[2:]))
    return scores + added


def interleave(maps: Tensor) -> Tensor:
    """[k x k offsets, N, C, rows, cols] -> [N, C, k rows, k cols]: cell (i, j) of (dy, dx) is at (ki + dy, kj + dx)."""
    k = math.isqrt(len(maps))
    by_axis = maps.unflatten(0, (k, k)).permute(2, 3, 4, 0, 5, 1)  # N, C, rows, dy, cols, dx
    together: Tensor = by_axis.flatten(4, 5).flatten(2, 3)
    return together


def log_probabilities(sliding: Sliding, x: Tensor, stride: Stride, of: MaximumOf) -> Tensor:
    """`strongest` of images of one size [N, 3, rows, cols] and of their reflections: float64 [N, 2, C]."""
    return torch.stack([strongest(sliding.scores(sliding.pooled(view, stride)), of) for view in (x, x.flip(3))], 1)


def strongest(scores: Tensor, of: MaximumOf) -> Tensor:
    """Logarithms of each class's strongest value over all windows (Sec. 3.3: "the spatial max for each class").

    The paper does not say whether the softmax comes before the maximum or after it.

    Args:
        scores: [N, C, rows, cols].
        of: probabilities: the softmax in each window, then the largest of each class; they do not sum to one.
            scores: the largest score of each class, then the softmax.

    Returns: float64 [N, C].
    Raises: NotFinite for a class score that is NaN or infinite.
    """
    for image, class_ in (~scores.isfinite()).flatten(2).any(2).nonzero().tolist():
        raise NotFinite(image, class_)
    windows = scores.double().flatten(2)
    return windows.log_softmax(1).amax(2) if of == "probabilities" else windows.amax(2).log_softmax(1)
