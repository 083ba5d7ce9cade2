"""The embedded data set: shapes filled with textures, drawn here, so that every command runs without a download.

A class is a shape and a texture ("star checks"). All else is drawn at random and says nothing of the class: colours,
place, size, rotation, aspect, grain, and a background with a faint texture, blobs and lines of its own. So neither a
colour nor a place nor the texture alone gives a class away; and since shape, texture, box and mask of each image are
known, a feature map can be held against what it should answer to.
"""

from __future__ import annotations

import dataclasses
import io
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

Plane = NDArray[np.float32]  # height x width
Picture = NDArray[np.float32]  # height x width x RGB, 0 to 255
Colour = NDArray[np.float32]  # RGB, 0 to 255

_SIDE_PX = (128, 256)  # of an image, both ends included
_RADIUS = (0.20, 0.30)  # of the disc with the object's area, as a part of the image's smallest side
_PERIOD = (0.45, 0.70)  # of a texture, as a part of that radius
_OBJECT_CONTRAST = (70.0, 150.0)  # of a texture's two colours, in steps of luma
_BACKGROUND_STRENGTH = (0.0, 0.15)  # of its texture, as a part of an object's
_NOISE = (2.0, 12.0)  # standard deviation of the grain
_JPEG_QUALITY = (70, 95)
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)

# ---------------------------------------------------------------------------------------------------------------
# Shapes: distance to the edge, negative inside, at u to the right and v down from the centre of the upright shape.
# Unit: the radius of a disc. All have the disc's area, so that a class is not told by its size.


def _disc(u: Plane, v: Plane) -> Plane:
    return np.asarray(np.hypot(u, v) - 1, np.float32)


def _triangle(u: Plane, v: Plane) -> Plane:
    circumradius = math.sqrt(math.pi / (0.75 * math.sqrt(3)))
    sides = [u * math.cos(a) + v * math.sin(a) for a in (math.pi / 2, math.pi * 7 / 6, math.pi * 11 / 6)]
    return np.asarray(np.maximum.reduce(sides) - circumradius / 2, np.float32)


def _star(u: Plane, v: Plane) -> Plane:
    fifth, waist = 2 * math.pi / 5, 0.45
    point = math.sqrt(math.pi / (5 * waist * math.sin(fifth / 2)))
    # Fold all ten half-points onto one: an edge from the point (point, 0) to the notch at half a fifth.
    angle = np.abs((np.arctan2(u, v) + fifth / 2) % fifth - fifth / 2)
    radius = np.hypot(u, v)
    edge = np.array([waist * math.cos(fifth / 2) - 1, waist * math.sin(fifth / 2)])
    outward = np.array([edge[1], -edge[0]]) / np.hypot(*edge)
    distance = (radius * np.cos(angle) - point) * outward[0] + radius * np.sin(angle) * outward[1]
    return np.asarray(distance, np.float32)


def _cross(u: Plane, v: Plane) -> Plane:
    width = 0.36  # of a bar, as a part of its length
    reach = math.sqrt(math.pi / (8 * width - 4 * width**2))
    across, along = np.minimum(np.abs(u), np.abs(v)), np.maximum(np.abs(u), np.abs(v))
    return np.asarray(np.maximum(along - reach, across - width * reach), np.float32)


SHAPES: dict[str, Callable[[Plane, Plane], Plane]] = {
    "disc": _disc,
    "triangle": _triangle,
    "star": _star,
    "cross": _cross,
}
REACH = 1.6  # radii from the centre that no shape exceeds

# ---------------------------------------------------------------------------------------------------------------
# Textures: share of the second colour, 0 to 1 with edges a pixel wide, from pixels x, y and the period in pixels.


def _stripes(x: Plane, y: Plane, period_px: float) -> Plane:
    turn = 2 * math.pi / period_px
    return np.asarray(np.clip(0.5 + np.sin(turn * x) / turn, 0, 1), np.float32)


def _checks(x: Plane, y: Plane, period_px: float) -> Plane:
    turn = 2 * math.pi / period_px
    return np.asarray(np.clip(0.5 + np.sin(turn * x) * np.sin(turn * y) / turn, 0, 1), np.float32)


def _dots(x: Plane, y: Plane, period_px: float) -> Plane:
    dx = x - period_px * np.round(x / period_px)
    dy = y - period_px * np.round(y / period_px)
    return np.asarray(np.clip(0.5 + 0.35 * period_px - np.hypot(dx, dy), 0, 1), np.float32)


TEXTURES: dict[str, Callable[[Plane, Plane, float], Plane]] = {"stripes": _stripes, "checks": _checks, "dots": _dots}

CLASSES = tuple(f"{shape} {texture}" for shape in SHAPES for texture in TEXTURES)


@dataclass(frozen=True, kw_only=True)
class Rendered:
    """Images of one textured shape each. A sample depends on (seed, split, number) alone, in any order or process."""

    seed: int = 0
    """Another seed draws other images of the same classes."""
    train: int = 10_000
    """Images to train on."""
    val: int = 1200
    """Images to validate on."""

    def __post_init__(self) -> None:
        for name, number in dataclasses.asdict(self).items():
            if number < 0:
                raise ValueError(f"{name} is {number}; expected 0 or more")

    @property
    def classes(self) -> list[str]:
        """Names of the classes, "shape texture"; a class's place in the list is its number."""
        return list(CLASSES)

    @property
    def splits(self) -> dict[str, int]:
        """Images of each split."""
        return {"train": self.train, "val": self.val}

    def about(self) -> dict[str, Any]:
        """What decides the content of every image."""
        return {"name": "rendered", "version": 1, **dataclasses.asdict(self)}

    def sample(self, split: str, number: int) -> dict[str, Any]:
        """Draw one image.

        Returns:
            `__key__`; `jpg`, its JPEG bytes; `cls`, its class; `mask.png`, a grey PNG, 255 on the object; `json`, a
            dict with label, cls, width, height, mode, boxes (one; its xyxy in pixels are the object's first column
            and row, and the ones after its last), and the cause of the picture: shape, texture, colours,
            centre_xy_px, radius_px, rotation_deg, texture_rotation_deg, period_px, background.

        Raises:
            ValueError: there is no such split.
            IndexError: the split has fewer images.
        """
        if split not in self.splits:
            raise ValueError(f"split is {split!r}; expected one of {', '.join(self.splits)}")
        if not 0 <= number < self.splits[split]:
            raise IndexError(f"number is {number}; {split!r} has {self.splits[split]} images, counted from 0")
        rng = np.random.default_rng([self.seed, list(self.splits).index(split), number])
        cls = number % len(self.classes)  # equally many of each
        shape, texture = self.classes[cls].split()
        picture, mask, cause = _draw(rng, shape, texture)
        height, width = mask.shape
        label = self.classes[cls]
        return {
            "__key__": f"{split}-{number:06d}",
            "jpg": jpeg(rng, picture),
            "cls": cls,
            "json": {
                "label": label,
                "cls": cls,
                "width": width,
                "height": height,
                "mode": "RGB",
                "boxes": [{"label": label, "xyxy": box_xyxy_px(mask)}],
                "shape": shape,
                "texture": texture,
                **cause,
            },
            "mask.png": png(mask),
        }


def _draw(
    rng: np.random.Generator, shape: str, texture: str
) -> tuple[NDArray[np.uint8], NDArray[np.uint8], dict[str, Any]]:
    """The picture (height x width x RGB), the object's mask (height x width, 0 or 255), and what they show."""
    picture, background = background_of(rng)
    height, width = picture.shape[:2]
    side = min(height, width)
    radius_px = rng.uniform(*_RADIUS) * side
    # It stays inside the central square, which networks crop from.
    slack_px = side / 2 - REACH * radius_px
    centre_xy = tuple(float(s / 2 + rng.uniform(-slack_px, slack_px)) for s in (width, height))
    coverage, cause = paint(rng, picture, shape, texture, radius_px, centre_xy)
    return finished(rng, picture), mask_of(coverage), {**cause, "background": background}


def mask_of(coverage: Plane) -> NDArray[np.uint8]:
    """255 where an object covers half of a pixel or more, else 0."""
    return np.where(coverage >= 0.5, np.uint8(255), np.uint8(0))


def finished(rng: np.random.Generator, picture: Picture) -> NDArray[np.uint8]:
    """With grain, in whole steps."""
    picture += rng.uniform(*_NOISE) * rng.standard_normal(picture.shape, np.float32)
    return np.clip(picture, 0, 255).astype(np.uint8)


def paint(
    rng: np.random.Generator,
    picture: Picture,
    shape: str,
    texture: str,
    radius_px: float,
    centre_xy: tuple[float, ...],
) -> tuple[Plane, dict[str, Any]]:
    """Paint an object into `picture`; give how much of each pixel it covers, 0 to 1, and how it was drawn."""
    height, width = picture.shape[:2]
    centre_x, centre_y = centre_xy
    rotation, texture_rotation = rng.uniform(0, 2 * math.pi, 2)
    period_px = rng.uniform(*_PERIOD) * radius_px
    colours = _colours(rng, _OBJECT_CONTRAST)

    left, top = max(0, int(centre_x - REACH * radius_px)), max(0, int(centre_y - REACH * radius_px))
    right, bottom = math.ceil(centre_x + REACH * radius_px), math.ceil(centre_y + REACH * radius_px)
    window = picture[top:bottom, left:right]
    x, y = _pixels(window, centre_x - left, centre_y - top)
    u, v = _turn(x, y, rotation)
    covered = np.clip(0.5 - SHAPES[shape](u / radius_px, v / radius_px) * radius_px, 0, 1)
    share = TEXTURES[texture](*_turn(x, y, texture_rotation), period_px)
    window += covered[..., None] * (_mix(colours, share) - window)

    coverage = np.zeros((height, width), np.float32)
    coverage[top:bottom, left:right] = covered
    return coverage, {
        "colours": ["#" + colour.astype(np.uint8).tobytes().hex() for colour in colours],
        "centre_xy_px": [round(centre_x, 2), round(centre_y, 2)],
        "radius_px": round(radius_px, 2),
        "rotation_deg": round(math.degrees(rotation), 2),
        "texture_rotation_deg": round(math.degrees(texture_rotation), 2),
        "period_px": round(period_px, 2),
    }


def background_of(rng: np.random.Generator) -> tuple[Picture, dict[str, Any]]:
    """Clouds of colour with a faint texture, blobs and lines, of a random size, drawn without knowledge of a class."""
    height, width = (int(side) for side in rng.integers(*_SIDE_PX, size=2, endpoint=True))
    side = min(height, width)
    texture = str(rng.choice(list(TEXTURES)))
    period_px = rng.uniform(*_PERIOD) * rng.uniform(*_RADIUS) * side
    rotation = rng.uniform(0, 2 * math.pi)
    first, second = _colours(rng, _OBJECT_CONTRAST)
    strength = np.float32(rng.uniform(*_BACKGROUND_STRENGTH))
    clouds = np.clip(rng.normal((first + second) / 2, 20, (4, 4, 3)), 0, 255).astype(np.uint8)
    canvas = Image.fromarray(clouds).resize((width, height), Image.Resampling.BICUBIC)
    _distractors(rng, canvas)
    picture = np.asarray(canvas, np.float32)
    share = TEXTURES[texture](*_turn(*_pixels(picture, 0, 0), rotation), period_px)
    picture = picture + (share - np.float32(0.5))[..., None] * (strength * (second - first))
    return picture, {"texture": texture, "period_px": round(period_px, 2), "strength": round(float(strength), 3)}


def _distractors(rng: np.random.Generator, canvas: Image.Image) -> None:
    """Draw plain blobs, polygons and lines, of any colour and place, on `canvas`."""
    draw = ImageDraw.Draw(canvas)
    side = min(canvas.size)
    for _ in range(rng.integers(1, 5)):
        colour = tuple(int(c) for c in rng.integers(0, 256, 3))
        x, y = rng.uniform(0, canvas.width), rng.uniform(0, canvas.height)
        reach = rng.uniform(0.03, 0.12) * side
        aspect = rng.uniform(0.4, 1)
        corners = [(x + dx, y + dy) for dx, dy in rng.uniform(-reach, reach, (int(rng.integers(3, 7)), 2))]
        match rng.integers(3):
            case 0:
                draw.ellipse((x - reach, y - reach * aspect, x + reach, y + reach * aspect), fill=colour)
            case 1:
                draw.polygon(corners, fill=colour)
            case _:
                draw.line(corners, fill=colour, width=int(rng.integers(1, max(2, side // 24))))


def _colours(rng: np.random.Generator, contrast: tuple[float, float]) -> tuple[Colour, Colour]:
    """Two colours of random hue whose luma differs by a random number within `contrast`, either the lighter."""
    difference = rng.uniform(*contrast)
    low = rng.uniform(20, 235 - difference)
    lumas = rng.permutation([low, low + difference])
    hues = rng.uniform(0, 255, (2, 3)).astype(np.float32)
    # Grey of the luma wanted, and as much of the hue as fits between black and white.
    chroma = hues - (hues @ _LUMA)[:, None]
    room = np.where(chroma > 0, 255 - lumas[:, None], lumas[:, None]) / np.maximum(np.abs(chroma), 1e-3)
    first, second = lumas[:, None] + chroma * np.minimum(1, room.min(axis=1, keepdims=True))
    return first.astype(np.float32), second.astype(np.float32)


def _mix(colours: tuple[Colour, Colour], share: Plane) -> Picture:
    """The first colour where `share` is 0, the second where it is 1."""
    return colours[0] + share[..., None] * (colours[1] - colours[0])


def _pixels(picture: Picture, x_px: float, y_px: float) -> tuple[Plane, Plane]:
    """Columns and rows of the centres of pixels, counted from (x_px, y_px); they broadcast to a plane."""
    rows, columns = picture.shape[:2]
    x = np.arange(columns, dtype=np.float32) + np.float32(0.5 - x_px)
    y = np.arange(rows, dtype=np.float32) + np.float32(0.5 - y_px)
    return x[None, :], y[:, None]


def _turn(x: Plane, y: Plane, angle: float) -> tuple[Plane, Plane]:
    """Coordinates in a frame turned by `angle` radians."""
    cosine, sine = np.float32(math.cos(angle)), np.float32(math.sin(angle))
    return x * cosine + y * sine, y * cosine - x * sine


def box_xyxy_px(mask: NDArray[np.uint8]) -> list[int]:
    """First column and row of the mask, and those after its last."""
    columns, rows = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
    return [int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1]


def jpeg(rng: np.random.Generator, pixels: NDArray[np.uint8]) -> bytes:
    """A JPEG of a random quality."""
    return _encode(pixels, "JPEG", quality=int(rng.integers(*_JPEG_QUALITY, endpoint=True)))


def png(pixels: NDArray[np.uint8]) -> bytes:
    """A PNG."""
    return _encode(pixels, "PNG")


def _encode(pixels: NDArray[np.uint8], encoding: str, **options: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, encoding, **options)
    return file.getvalue()
