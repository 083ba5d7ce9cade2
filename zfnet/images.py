"""From the bytes of an image to the network's input, keeping the way back to the original's pixels.

Decoding, resizing and cropping are Pillow's: integer arithmetic, the same on every CPU. The geometry is that of
ZFNet section 3 and of torchvision's reference transform: the smallest side is resized, then the centre is cropped.
EXIF orientation is ignored, as torchvision's loaders and the papers' pipelines do, so "original pixels" are the
pixels as stored in the file, which is what boxes and landmarks of published data sets refer to.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

MAX_PIXELS = 64 * 2**20
"""Images (and their resized forms) of more pixels are refused before they are decoded."""

FORMATS = ("JPEG", "PNG", "WEBP", "BMP")

Pixels = npt.NDArray[np.uint8]


class BadImage(ValueError):
    """The bytes are not a usable image. `reason` is a short code for the skipped table."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail

    def __reduce__(self) -> tuple[Any, ...]:
        return BadImage, (self.reason, self.detail)


@dataclass(frozen=True, kw_only=True)
class Crop:
    """Where a crop lies in an image: all that is needed to go back to original pixels."""

    image_height: int
    image_width: int
    resized_height: int
    resized_width: int
    top: int
    left: int
    size_px: int
    """Side of the crop; of a rectangle the shorter one."""

    def to_original(self, top: float, left: float, height: float, width: float) -> tuple[float, ...]:
        """A box (top, left, height, width) in pixels of the crop, as a box in pixels of the original image."""
        down = self.image_height / self.resized_height
        across = self.image_width / self.resized_width
        return ((self.top + top) * down, (self.left + left) * across, height * down, width * across)

    def from_original(
        self, top: float, left: float, height: float = 0, width: float = 0
    ) -> tuple[float, float, float, float]:
        """The inverse of `to_original`; a box or, without a size, a point. It may leave the crop."""
        down = self.resized_height / self.image_height
        across = self.resized_width / self.image_width
        return (top * down - self.top, left * across - self.left, height * down, width * across)


@dataclass(frozen=True, kw_only=True, eq=False)
class Preprocessing:
    """What a network expects of its input. It belongs to the model and is stored with its weights."""

    resize_px: int
    """The smallest side of the image is resized to this."""
    crop_px: int
    """Side of the square crop that the network sees."""
    channels: Literal["RGB", "BGR"] = "RGB"
    """Channel order of the network's input."""
    maximum: float = 255.0
    """White, before the mean is subtracted: 255 (the papers, Caffe) or 1 (torchvision)."""
    mean: Tensor = field(default_factory=lambda: torch.zeros(3, 1, 1))
    """[3, 1, 1], or per pixel [3, resize_px, resize_px], in the network's channel order and range; zeros: none."""
    std: Tensor = field(default_factory=lambda: torch.ones(3, 1, 1))
    """[3, 1, 1], in the network's channel order and range; divides after the mean is subtracted."""

    def __post_init__(self) -> None:
        if not 1 <= self.crop_px <= self.resize_px:
            raise ValueError(
                f"crop {self.crop_px} px does not fit into an image resized to {self.resize_px} px: "
                "give a crop of at least 1 px and at most the resized side"
            )
        if self.channels not in ("RGB", "BGR"):
            raise ValueError(f"channels is {self.channels!r}: give 'RGB' or 'BGR'")
        if not self.maximum > 0:
            raise ValueError(f"maximum is {self.maximum}: give what white is to the network, as 255 or 1")
        per_channel, per_pixel = (3, 1, 1), (3, self.resize_px, self.resize_px)
        if tuple(self.mean.shape) not in (per_channel, per_pixel):
            raise ValueError(
                f"the mean has shape {tuple(self.mean.shape)}: give {per_channel}, or {per_pixel} for an image resized "
                f"to {self.resize_px} px"
            )
        if tuple(self.std.shape) != per_channel or not bool((self.std > 0).all()):
            raise ValueError(f"std is {self.std.flatten().tolist()}: give three numbers above zero")

    def describe(self) -> dict[str, Any]:
        """The fields that are not tensors, for run.json; the tensors are stored with the weights."""
        return {
            "resize_px": self.resize_px,
            "crop_px": self.crop_px,
            "channels": self.channels,
            "maximum": self.maximum,
        }

    def of_any_size(self) -> Preprocessing:
        """The same with a mean for each channel alone, so that images of any size can be normalised."""
        return replace(self, mean=self.mean.mean((1, 2), keepdim=True))

    def normalise(self, pixels: Tensor, top: Tensor | None = None, left: Tensor | None = None) -> Tensor:
        """Network input from pixels.

        Args:
            pixels: uint8 [N, crop_px, crop_px, 3], RGB; of any size where the mean is one a channel.
            top, left: [N], where each crop lies in the centre square of resize_px; default the centre crop.

        Returns: float32 [N, 3, rows, cols] in the network's channel order.
        """
        x = pixels.to(torch.float32, copy=True)
        if self.channels == "BGR":
            x = x.flip(-1)
        if self.maximum != 255.0:
            x *= self.maximum / 255.0
        x -= _of_each_pixel(self._mean(pixels.device, top, left), *pixels.shape[1:3])
        if self._scales:
            x /= _of_each_pixel(self.std.to(pixels.device), *pixels.shape[1:3])
        return x.permute(0, 3, 1, 2)

    @cached_property
    def _scales(self) -> bool:
        return bool((self.std != 1).any())

    def mean_pixels(self) -> Tensor:
        """[crop_px, crop_px, 3], RGB, 0 to 255: the image that the network sees as zero everywhere."""
        mean = _of_each_pixel(self._mean(self.mean.device, None, None), self.crop_px, self.crop_px)
        return (mean.flip(-1) if self.channels == "BGR" else mean) * (255.0 / self.maximum)

    def _mean(self, device: torch.device, top: Tensor | None, left: Tensor | None) -> Tensor:
        mean = self.mean.to(device)
        if mean.shape[-1] == 1:
            return mean
        size = self.crop_px
        if top is None or left is None:
            start = centre_offset(self.resize_px, size)
            return mean[:, start : start + size, start : start + size]
        corners = zip(top.tolist(), left.tolist(), strict=True)
        crops = [mean[:, t : t + size, le : le + size] for t, le in corners]
        return torch.stack(crops) if crops else mean.new_zeros(0, 3, size, size)


def _of_each_pixel(numbers: Tensor, rows: int, cols: int) -> Tensor:
    """[..., 3, 1 or rows, 1 or cols] as [..., rows, cols, 3] in memory: fast to combine with pixels in their layout."""
    numbers = numbers.movedim(-3, -1)
    return numbers.expand(*numbers.shape[:-3], rows, cols, 3).contiguous()


def centre_offset(length: int, crop: int) -> int:
    """First pixel of a centred crop, rounded as torchvision's center_crop does."""
    return round((length - crop) / 2.0)


def decode(data: bytes) -> Image.Image:
    """An RGB image from the bytes of a JPEG, PNG, WebP or BMP file; greyscale, CMYK and palettes are converted.

    Raises: BadImage with reason "empty_file", "bad_image" or "too_large".
    """
    return _load(_open(data))


def input_pixels(data: bytes, resize_px: int, crop_px: int, scaled: bool = False) -> tuple[Pixels, Crop]:
    """`decode`, then `centre_crop`.

    Args:
        data: bytes of the image.
        resize_px: side to which the smallest side is resized.
        crop_px: side of the crop.
        scaled: decode a JPEG at the smallest of 1/8, 1/4, 1/2 and all of its size that is not below the resized
            one, out of the low frequencies of its DCT blocks. Faster, and not the same pixels: the inverse transform's
            filter takes the place of a part of the bilinear one.
    """
    resized, original = _decode_resized(data, resize_px, scaled)
    return cut(resized, original, crop_px, crop_px)


def decode_resized(
    data: bytes, sides: Collection[int], scaled: bool = False
) -> tuple[dict[int, Image.Image], tuple[int, int]]:
    """`decode`, then `resize` to each of these sides; decoded once, but for each where `scaled` (see input_pixels).

    Returns: the image for each side, and width and height of the original.
    """
    if scaled:
        found = {side: _decode_resized(data, side, scaled) for side in sides}
        return {side: resized for side, (resized, _) in found.items()}, next(iter(found.values()))[1]
    image = decode(data)
    return {side: resize(image, side) for side in sides}, image.size


def _decode_resized(data: bytes, resize_px: int, scaled: bool) -> tuple[Image.Image, tuple[int, int]]:
    """The resized image, and width and height of the original."""
    image = _open(data)
    original = image.size
    size = _resized(*original, resize_px)
    # The scaled image may end in a piece of a pixel: the box is where the whole one lies in it.
    drafted = image.draft(None, size) if scaled else None
    return _resize(_load(image), size, drafted[1] if drafted else None), original


def _open(data: bytes) -> Image.Image:
    """The image's header, checked; its pixels are not decoded yet."""
    if not data:
        raise BadImage("empty_file", "0 bytes")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own bound is the stricter
            image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise BadImage("too_large", str(error)) from None
    except UnidentifiedImageError:  # its text holds an address in memory
        raise BadImage("bad_image", f"{len(data)} bytes that are none of {', '.join(FORMATS)}") from None
    except Exception as error:
        raise BadImage("bad_image", f"{len(data)} bytes: {error}") from None
    _bound(image.width, image.height)
    return image


def _load(image: Image.Image) -> Image.Image:
    try:
        return image.convert("RGB")
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, struct.error, ...
        raise BadImage("bad_image", f"{image.width} x {image.height} px: {error}") from None


def _bound(width: int, height: int) -> None:
    if width < 1 or height < 1 or width * height > MAX_PIXELS:
        raise BadImage("too_large", f"{width} x {height} px, at most {MAX_PIXELS} pixels are decoded")


def resize(image: Image.Image, smallest_side_px: int, stretch: tuple[float, float] = (1.0, 1.0)) -> Image.Image:
    """The image with its smallest side at `smallest_side_px` (bilinear, antialiased), as torchvision's Resize.

    Args:
        image: RGB.
        smallest_side_px: of the image before it is stretched.
        stretch: what its height and its width are multiplied by besides.

    Raises: BadImage("too_large") where a very long image would become too large.
    """
    width, height = _resized(image.width, image.height, smallest_side_px)
    size = round(width * stretch[1]), round(height * stretch[0])
    _bound(*size)
    return _resize(image, size)


def _resized(width: int, height: int, smallest_side_px: int) -> tuple[int, int]:
    """Width and height of the resized image."""
    short, long = sorted((width, height))
    longer = int(smallest_side_px * long / short)
    size = (smallest_side_px, longer) if width <= height else (longer, smallest_side_px)
    _bound(*size)
    return size


def _resize(
    image: Image.Image, size: tuple[int, int], box: tuple[float, float, float, float] | None = None
) -> Image.Image:
    return image if size == image.size and box is None else image.resize(size, Image.Resampling.BILINEAR, box)


def centre_crop(image: Image.Image, resize_px: int, crop_px: int) -> tuple[Pixels, Crop]:
    """The network's own input pixels: uint8 [crop_px, crop_px, 3] RGB, and where they lie in the image."""
    return cut(resize(image, resize_px), image.size, crop_px, crop_px)


def cut(resized: Image.Image, original: tuple[int, int], height_px: int, width_px: int) -> tuple[Pixels, Crop]:
    """The centre of a resized image, uint8 [height_px, width_px, 3] RGB, and where it lies in the original.

    `original` is width and height of the image in its file.
    """
    crop = _centre(original, resized.size, height_px, width_px)
    top, left = crop.top, crop.left
    return np.asarray(resized.crop((left, top, left + width_px, top + height_px))), crop


def input_place(original: tuple[int, int], resize_px: int, crop_px: int) -> Crop:
    """Where the network's input lies in an image of this width and height: that of `centre_crop`, without pixels."""
    return _centre(original, _resized(*original, resize_px), crop_px, crop_px)


def _centre(original: tuple[int, int], resized: tuple[int, int], height_px: int, width_px: int) -> Crop:
    return Crop(
        image_height=original[1],
        image_width=original[0],
        resized_height=resized[1],
        resized_width=resized[0],
        top=centre_offset(resized[1], height_px),
        left=centre_offset(resized[0], width_px),
        size_px=min(height_px, width_px),
    )


def random_crop(
    image: Image.Image, resize_px: int, crop_px: int, rng: np.random.Generator, smallest: float | None = None
) -> tuple[Pixels, int, int]:
    """A training example: a random crop of the centre square, mirrored half the time (AlexNet section 4.1).

    Args:
        image: RGB.
        resize_px: side of the centre square.
        crop_px: side of the result.
        rng: decides all.
        smallest: None: crops of crop_px, as in the papers. Else crops of any side from this share of the square's to
            the whole, resized to crop_px.

    Returns: uint8 [crop_px, crop_px, 3], and the crop's top and left in the square of resize_px.
    """
    square, _ = centre_crop(image, resize_px, resize_px)
    side = crop_px if smallest is None else round(resize_px * rng.uniform(smallest, 1))
    top, left = (int(v) for v in rng.integers(0, resize_px - side + 1, size=2))
    pixels = square[top : top + side, left : left + side]
    if side != crop_px:
        scaled = Image.fromarray(pixels).resize((crop_px, crop_px), Image.Resampling.BILINEAR)
        pixels = np.asarray(scaled)
    if rng.random() < 0.5:
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels), top, left


def ten_crops(image: Image.Image, resize_px: int, crop_px: int) -> tuple[Pixels, list[int], list[int]]:
    """The corners and the centre of the square, then their reflections (AlexNet section 4.1).

    Returns: uint8 [10, crop_px, crop_px, 3], and tops and lefts of the crops in the square.
    """
    square, _ = centre_crop(image, resize_px, resize_px)
    last, middle = resize_px - crop_px, centre_offset(resize_px, crop_px)
    corners = [(0, 0), (0, last), (last, 0), (last, last), (middle, middle)]
    five = np.stack([square[t : t + crop_px, le : le + crop_px] for t, le in corners])
    tops, lefts = ([corner[axis] for corner in corners] for axis in (0, 1))
    return np.concatenate([five, five[:, :, ::-1]]), tops * 2, lefts * 2


def describe(data: bytes) -> dict[str, Any]:
    """Width, height and mode of an image, from its header alone; empty where it has none."""
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Exception:  # what cannot be read is for the reader of the shards to report
        return {}
    return {"width": image.width, "height": image.height, "mode": image.mode}
