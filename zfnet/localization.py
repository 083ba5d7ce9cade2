"""Boxes from every window of an image at several scales: targets to train on, predictions, and the final boxes.

OverFeat section 4: a regressor on the pooled features of each window predicts the edges of the object's box in the
frame of the window; the classifier says with what confidence each class is there. The boxes of all windows and scales
are merged (`zfnet.merging`). Boxes are edges (top, left, bottom, right).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from zfnet import images
from zfnet.activations import NotFinite
from zfnet.dense import Sliding, Stride, in_context, require_scales, slide
from zfnet.images import Crop, Pixels, Preprocessing
from zfnet.merging import Average, Edges, area, greedy_merge, intersection
from zfnet.models.heads import EDGES, HeadedNetwork

Ints = npt.NDArray[np.int64]

# ----------------------------------------------------------------------------------------------------------------------
# Windows and frames


def window_edges(sliding: Sliding, stride: Stride, rows: int, cols: int) -> Edges:
    """[rows x cols, 4]: the windows of a map of scores, row by row, in pixels of the view."""
    row, col = (each.ravel() for each in np.mgrid[:rows, :cols])
    top, left, height, width = sliding.field(stride).box(row, col)
    return np.stack([top, left, top + height, left + width], 1).astype(np.float64)


def into_frame(boxes: Edges, windows: Edges) -> Edges:
    """Edges in units of the window: its own are 0, 0, 1, 1. [..., 4] and [..., 4] broadcast."""
    origin, size = windows[..., [0, 1, 0, 1]], windows[..., 2:] - windows[..., :2]
    found: Edges = (boxes - origin) / size[..., [0, 1, 0, 1]]
    return found


def out_of_frame(relative: Edges, windows: Edges) -> Edges:
    """The inverse of `into_frame`."""
    origin, size = windows[..., [0, 1, 0, 1]], windows[..., 2:] - windows[..., :2]
    found: Edges = relative * size[..., [0, 1, 0, 1]] + origin
    return found


def reflected(edges: Edges, width: int) -> Edges:
    """[..., 4] in the mirror image of what is so wide."""
    return np.stack([edges[..., 0], width - edges[..., 3], edges[..., 2], width - edges[..., 1]], -1)


# ----------------------------------------------------------------------------------------------------------------------
# Training


@dataclass(frozen=True, eq=False)
class TrainingView:
    """A square of an image at some scale, and the objects' boxes in its pixels; they may leave it."""

    pixels: Pixels
    """uint8 [side, side, 3]"""
    boxes: Edges
    smallest_px: int
    """What the image's smallest side was resized to, but for the stretch."""
    place: Edges
    """[4] the square's edges as shares of the image's height and width."""
    mirrored: bool


def training_view(
    image: Image.Image,
    boxes: Edges,
    sides_px: Sequence[int],
    side_px: int,
    about: float,
    stretch: float,
    rng: np.random.Generator,
) -> TrainingView:
    """A square of the image at a scale drawn from `sides_px`, mirrored half the time.

    The paper trains on whole images at each scale. Squares of one size go through the network together, whatever the
    proportions of their images. None leaves its image: in no window that is looked at later is there anything else.
    Where there are few images, the stretch makes other views of them: objects of other sizes, proportions and places.

    Args:
        image: RGB.
        boxes: [N, 4] in its pixels.
        sides_px: what its smallest side may be resized to.
        side_px: of the square, at most the smallest of these.
        about: share of the squares that are drawn about the middle of one of the objects; the others lie anywhere.
        stretch: what height and width are multiplied by at most, each by a factor of its own from 1 on; 1: the scale's.
        rng: decides all.

    Raises: BadImage where the image would become too large.
    """
    smallest_px = int(rng.choice(np.asarray(sides_px)))
    down, across = stretch ** rng.random(2) if stretch > 1 else (1.0, 1.0)
    resized = images.resize(image, smallest_px, (down, across))
    lengths = np.array([resized.height, resized.width])
    boxes = boxes * np.tile(lengths / (image.height, image.width), 2)
    held = rng.random() < about and len(boxes) > 0
    middle = boxes[rng.integers(len(boxes))].reshape(2, 2).mean(0) if held else None
    corner = [_first(rng, int(lengths[axis]), side_px, None if middle is None else middle[axis]) for axis in (0, 1)]
    mirrored = bool(rng.random() < 0.5)
    boxes = boxes - np.tile(corner, 2)
    if mirrored:
        boxes = reflected(boxes, side_px)
    place = np.concatenate([corner, np.array(corner) + side_px]) / np.tile(lengths, 2)
    return TrainingView(_square(resized, corner, side_px, mirrored), boxes, smallest_px, place, mirrored)


def lower_view(image: Image.Image, view: TrainingView, smallest_px: int) -> tuple[Pixels, Edges]:
    """The square at a lower resolution that lies nearest about the same middle, and where a training view lies in it.

    Returns: uint8 [side, side, 3], and the view's edges [4] in its pixels, mirrored as the view is.
    """
    resized, side_px = images.resize(image, smallest_px), len(view.pixels)
    lengths = np.array([resized.height, resized.width])
    there = view.place * np.tile(lengths, 2)
    corner = ((there[:2] + there[2:] - side_px) / 2).round().clip(0, lengths - side_px).astype(int)
    there = there - np.tile(corner, 2)
    if view.mirrored:
        there = reflected(there, side_px)
    return _square(resized, [int(edge) for edge in corner], side_px, view.mirrored), there


def _square(image: Image.Image, corner: Sequence[int], side_px: int, mirrored: bool) -> Pixels:
    pixels = np.asarray(image.crop((corner[1], corner[0], corner[1] + side_px, corner[0] + side_px)))
    return np.ascontiguousarray(pixels[:, ::-1] if mirrored else pixels)


def _first(rng: np.random.Generator, length: int, side: int, middle: float | None) -> int:
    """First row or column of a square of `side` in an image of `length`, that holds `middle`."""
    low, high = 0, length - side
    if middle is not None:
        low, high = max(low, min(high, int(np.ceil(middle)) - side)), min(high, max(low, int(middle)))
    return int(rng.integers(low, high + 1))


def nearest_window(windows: Edges, others: Edges) -> Ints:
    """[W]: for each window the one of the others whose middle is nearest, of equals the first."""
    middles, theirs = ((edges[:, :2] + edges[:, 2:]) / 2 for edges in (windows, others))
    found: Ints = np.square(middles[:, None] - theirs[None]).sum(2).argmin(1)
    return found


def nearest_object(windows: Edges, boxes: Edges, in_view: float, filled: float = 0.0) -> Ints:
    """[W]: the box of which a window sees the largest area, if it sees enough of it; else -1.

    "We do not train the regressor on bounding boxes with less than a 50% overlap with the input field of view" (section
    4.2): the overlap is read as the share of the box that lies in the window.

    Args:
        windows: [W, 4].
        boxes: [N, 4].
        in_view: least share of the box that lies in the window.
        filled: least share of the window that the box covers.
    """
    if not len(boxes):
        return np.full(len(windows), -1, np.int64)
    seen = intersection(windows[:, None], boxes[None])
    enough = (seen >= in_view * area(boxes)) & (seen >= filled * area(windows)[:, None])
    seen = np.where(enough, seen, 0)
    found: Ints = np.where(seen.max(1) > 0, seen.argmax(1), -1)
    return found


LOOKED_AT = 0.75
"""Share of an object that a window which shows it must see at least, in training a detector."""
FILLED = 0.15
"""Share of the window that it must fill with it at least."""


def window_labels(windows: Edges, boxes: Edges, labels: Ints, background: int) -> Ints:
    """[W]: what a detector should say of each window: a class, the background, or -1 where either would be unfair.

    The paper does not say which windows show an object. Here one does that sees LOOKED_AT of it and is FILLED by it; of
    several the one that fills it most counts. A window shows the background where no object comes half as near.
    """
    if not len(boxes):
        return np.full(len(windows), background, np.int64)
    seen = intersection(windows[:, None], boxes[None])
    shown, filled = seen / area(boxes), seen / area(windows)[:, None]
    showing = np.where((shown >= LOOKED_AT) & (filled >= FILLED), filled, 0)
    near = ((shown >= LOOKED_AT / 2) & (filled >= FILLED / 2)).any(1)
    found: Ints = np.where(showing.max(1) > 0, labels[showing.argmax(1)], np.where(near, -1, background))
    return found


# ----------------------------------------------------------------------------------------------------------------------
# Prediction


@dataclass(frozen=True, eq=False)
class Seen:
    """What all windows of an image at one scale say, in pixels of the original image."""

    scale: int
    windows: Edges
    """[W, 4]"""
    confidences: Edges
    """[W, C], a softmax in each window."""
    boxes: Edges
    """[W, 4], or [W, C, 4] of a regressor for each class; cut to the image."""
    mirrored: bool = False
    """Whether the network saw the image's mirror image; the edges are of the image itself."""

    def of(self, classes: int | Ints, windows: slice | Ints = slice(None)) -> Edges:
        """The boxes [W, 4] of all windows, or of these, for one class, or for each window's own of `classes`."""
        return self.boxes[windows] if self.boxes.ndim == 2 else self.boxes[windows, classes]


View = tuple[Pixels, Crop]


def view(resized: Image.Image, original: tuple[int, int], step_px: int) -> View:
    """What the network sees of a resized image: all of it but what is no whole step of its longer side, cut evenly.

    Evaluation cuts it to the table's sizes (`Sliding.view`); an object may lie at the border of a long image.
    """
    shorter, longer = sorted(resized.size)
    longer = shorter + (longer - shorter) // step_px * step_px
    return images.cut(resized, original, *((longer, shorter) if resized.height > resized.width else (shorter, longer)))


class Looker:
    """A network with a regressor, run over the views of an image at several scales.

    Args:
        network: in eval mode, with a regressor; with context, scales take the one before into account.
        preprocessing: the network's.
        scales: 1 to 6, ascending (Tab. 5).
        stride: of the windows.
        mirror: whether the mirror image is looked at as well, as classification does (section 3.3).

    Raises:
        ValueError: there is no regressor, or no scale.
    """

    def __init__(
        self,
        network: HeadedNetwork,
        preprocessing: Preprocessing,
        scales: Sequence[int],
        stride: Stride,
        mirror: bool = False,
    ) -> None:
        if getattr(network, "regressor", None) is None:
            raise ValueError("this network has no regressor of boxes: give one that jobs/train_localizer.py made")
        require_scales(scales)
        self.network, self.scales, self.stride, self.mirror = network, tuple(scales), stride, mirror
        self.sliding = Sliding(network)
        self.preprocessing = preprocessing.of_any_size()
        self.sides_px = [self.sliding.sides_px(scale)[0] for scale in scales]

    def views(self, resized: dict[int, Image.Image], original: tuple[int, int]) -> list[View]:
        """The views of all scales, given the image with its smallest side at each of `sides_px`."""
        step = self.sliding.step_px["coarse"]
        return [view(resized[side], original, step) for side in self.sides_px]

    @torch.no_grad()
    def look(self, views: Sequence[View]) -> list[Seen]:
        """What the windows of one image say, scale by scale; then those of its mirror image. Raises: NotFinite."""
        return [*self._look(views, False), *(self._look(views, True) if self.mirror else ())]

    def _look(self, views: Sequence[View], mirrored: bool) -> list[Seen]:
        found: list[Seen] = []
        lower: tuple[Tensor, Edges] | None = None
        for scale, (pixels, crop) in zip(self.scales, views, strict=True):
            device = next(self.network.parameters()).device
            shown = pixels[:, ::-1] if mirrored else pixels
            x = self.preprocessing.normalise(torch.from_numpy(shown.copy()).to(device)[None])
            pooled = self.sliding.pooled(x, self.stride)
            hidden = slide(self.sliding.above[:-1], pooled)
            scores = self.sliding.above[-1](hidden)
            rows, cols = scores.shape[2:]
            in_view = window_edges(self.sliding, self.stride, rows, cols)
            width_px = pixels.shape[1] if mirrored else None
            windows = _to_original(in_view, crop, width_px)
            if self.network.context is not None:
                if lower is not None:
                    nearest = torch.from_numpy(nearest_window(windows, lower[1])).to(device)
                    scores = in_context(scores, self.network.context, lower[0], nearest[None])
                lower = hidden, windows
            assert self.network.regressor is not None
            relative = slide(self.network.regressor, pooled)[0].flatten(1).T.double().cpu().numpy()
            logits = scores[0].flatten(1).T.double()
            for bad in (~logits.isfinite()).nonzero().tolist()[:1]:
                raise NotFinite(0, bad[1])
            if not np.isfinite(relative).all():
                raise NotFinite(0, 0)
            boxes = relative.reshape(len(windows), -1, EDGES)
            boxes = _to_original(out_of_frame(boxes, in_view[:, None]), crop, width_px)
            height, width = crop.image_height, crop.image_width
            boxes = np.clip(boxes, 0, np.array([height, width, height, width], np.float64))
            boxes = boxes[:, 0] if boxes.shape[1] == 1 else boxes
            found.append(Seen(scale, windows, logits.softmax(1).cpu().numpy(), boxes, mirrored))
        return found


def _to_original(edges: Edges, crop: Crop, mirrored_px: int | None) -> Edges:
    """[..., 4] in pixels of a view, which is mirrored if its width is given, as pixels of the original image."""
    if mirrored_px is not None:
        edges = reflected(edges, mirrored_px)
    top, left, height, width = crop.to_original(0, 0, 1, 1)
    found: Edges = edges * np.array([height, width] * 2) + np.array([top, left] * 2)
    return found


# ----------------------------------------------------------------------------------------------------------------------
# Final boxes


@dataclass(frozen=True, eq=False)
class Found:
    """Boxes of one image, the highest score first."""

    classes: Ints
    scores: Edges
    """Sums of the confidences of the windows that each was merged from."""
    boxes: Edges
    """[M, 4]"""
    windows: Ints
    """How many windows each was merged from."""


def merged(
    seen: Sequence[Seen], classes: Sequence[Sequence[int]], least: float, threshold: float, average: Average
) -> Found:
    """The boxes of all scales, merged within each class (section 4.3).

    Args:
        seen: scales of one image.
        classes: for each scale the classes whose boxes are taken.
        least: confidence of a window that counts.
        threshold: of the match score, above which boxes stay apart.
        average: see `zfnet.merging.greedy_merge`.
    """
    columns: list[tuple[Ints, Edges, Edges, Ints]] = []
    for class_ in sorted({class_ for some in classes for class_ in some}):
        picked = [s for s, some in zip(seen, classes, strict=True) if class_ in some]
        boxes = np.concatenate([s.of(class_) for s in picked])
        confidences = np.concatenate([s.confidences[:, class_] for s in picked])
        usable = (confidences >= least) & (confidences > 0) & (area(boxes) > 0)
        left = greedy_merge(boxes[usable], confidences[usable], threshold, average)
        columns.append((np.full(len(left.boxes), class_, np.int64), left.scores, left.boxes, left.windows))
    if not columns:
        return Found(np.zeros(0, np.int64), np.zeros(0), np.zeros((0, 4)), np.zeros(0, np.int64))
    found = [np.concatenate(column) for column in zip(*columns, strict=True)]
    order = np.argsort(-found[1], kind="stable")
    return Found(*(column[order] for column in found))


def top_classes(seen: Seen, k: int, background: int | None) -> list[int]:
    """(a) The k classes of the largest confidence over all windows of a scale; the background is none."""
    strongest = seen.confidences.max(0)
    if background is not None:
        strongest[background] = -1
    order = np.argsort(-strongest, kind="stable")[:k]
    return [int(class_) for class_ in order if class_ != background]


def best_guesses(found: Found, k: int, of_a_class: int) -> Found:
    """Localisation's guesses: the k boxes of the highest scores, of each class its best `of_a_class` at most."""
    better = [int((found.classes[:place] == class_).sum()) for place, class_ in enumerate(found.classes)]
    places = np.flatnonzero(np.array(better, np.int64) < of_a_class)[:k]
    return Found(*(getattr(found, name)[places] for name in ("classes", "scores", "boxes", "windows")))
