"""Decoding and geometry against torchvision's reference transforms and by hand."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from zfnet import images
from zfnet.images import BadImage, Preprocessing


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, size=(height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize(("height", "width"), [(300, 400), (401, 300), (256, 256), (97, 500), (30, 40)])
@pytest.mark.parametrize(("resize", "crop"), [(256, 224), (256, 227), (72, 64)])
def test_the_crop_is_torchvisions(height, width, resize, crop):
    from torchvision.transforms import v2

    image = picture(height, width)
    reference = v2.Compose([v2.Resize(resize), v2.CenterCrop(crop)])(image)
    pixels, place = images.centre_crop(image, resize, crop)
    assert images.input_place(image.size, resize, crop) == place
    assert np.array_equal(pixels, np.asarray(reference))


def test_cells_map_back_to_original_pixels():
    pixels, crop = images.centre_crop(picture(200, 400), 100, 80)
    assert pixels.shape == (80, 80, 3)
    assert crop.to_original(0, 0, 80, 80) == (20.0, 120.0, 160.0, 160.0)
    assert crop.to_original(10, 5, 4, 2) == (40.0, 130.0, 8.0, 4.0)


@pytest.mark.parametrize("mode", ["L", "1", "P", "LA", "RGBA", "CMYK", "I;16"])
def test_every_mode_becomes_rgb(mode):
    image = Image.new("I;16", (30, 20), 30_000) if mode == "I;16" else picture(20, 30).convert(mode)
    kind = "JPEG" if mode == "CMYK" else "PNG"
    decoded = images.decode(encoded(image, kind))
    assert decoded.mode == "RGB"
    assert decoded.size == (30, 20)


def test_exif_orientation_is_ignored():
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees to show
    assert images.decode(encoded(picture(20, 30), "JPEG", exif=exif)).size == (30, 20)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty_file"),
        (b"not an image", "bad_image"),
        (encoded(picture(64, 64), "JPEG")[:500], "bad_image"),
        (encoded(picture(64, 64), "TIFF"), "bad_image"),
        (encoded(Image.new("1", (30_000, 30_000))), "too_large"),
    ],
)
def test_what_cannot_be_used_is_named(data, reason):
    with pytest.raises(BadImage) as error:
        images.decode(data)
    assert error.value.reason == reason
    assert "0x" not in str(error.value)


def test_a_very_long_image_is_refused_before_it_is_resized():
    with pytest.raises(BadImage, match="too_large"):
        images.centre_crop(Image.new("RGB", (40_000, 1)), 256, 224)


def test_small_images_are_enlarged():
    pixels, _ = images.centre_crop(picture(1, 1), 72, 64)
    assert pixels.shape == (64, 64, 3)
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) == 1


def test_preprocessing_by_hand():
    pixels = torch.randint(0, 256, (2, 4, 4, 3), dtype=torch.uint8)
    mean = torch.randn(3, 6, 6)
    x = Preprocessing(resize_px=6, crop_px=4, mean=mean).normalise(pixels)
    for n, c, i, j in [(0, 0, 0, 0), (1, 2, 3, 1)]:
        assert x[n, c, i, j] == pixels[n, i, j, c].float() - mean[c, i + 1, j + 1]
    moved = Preprocessing(resize_px=6, crop_px=4, mean=mean).normalise(
        pixels, torch.tensor([0, 2]), torch.tensor([1, 2])
    )
    assert moved[1, 1, 0, 3] == pixels[1, 0, 3, 1].float() - mean[1, 2, 5]
    torch_style = Preprocessing(
        resize_px=6,
        crop_px=4,
        channels="BGR",
        maximum=1.0,
        mean=torch.full((3, 1, 1), 0.5),
        std=torch.full((3, 1, 1), 2.0),
    ).normalise(pixels)
    assert torch.allclose(torch_style[0, 0, 1, 2], (pixels[0, 1, 2, 2] / 255 - 0.5) / 2)


def test_a_crop_larger_than_the_image_is_refused():
    with pytest.raises(ValueError, match="224 px does not fit"):
        Preprocessing(resize_px=200, crop_px=224)


def test_random_crops_are_of_the_centre_square_and_repeatable():
    image = picture(50, 90)
    square, _ = images.centre_crop(image, 40, 40)
    seen = set()
    for seed in range(40):
        pixels, top, left = images.random_crop(image, 40, 32, np.random.default_rng(seed))
        plain = square[top : top + 32, left : left + 32]
        mirrored = bool(np.array_equal(pixels, plain[:, ::-1]))
        assert mirrored or np.array_equal(pixels, plain)
        seen.add((top, left, mirrored))
    assert len(seen) > 30
    assert {mirrored for *_, mirrored in seen} == {True, False}


def test_scaled_crops_are_of_any_size():
    image = picture(72, 72)
    corners = set()
    for seed in range(60):
        pixels, top, left = images.random_crop(image, 72, 64, np.random.default_rng(seed), smallest=0.5)
        assert pixels.shape == (64, 64, 3)
        assert 0 <= top <= 36
        assert 0 <= left <= 36
        corners.add((top, left))
    assert len(corners) > 40
    whole, top, left = images.random_crop(image, 72, 72, np.random.default_rng(1), smallest=1.0)
    assert (top, left) == (0, 0)
    assert np.array_equal(whole, np.asarray(image)) or np.array_equal(whole, np.asarray(image)[:, ::-1])


def test_ten_crops_are_corners_centre_and_reflections():
    image = picture(64, 64)
    square = np.asarray(image)
    crops, tops, lefts = images.ten_crops(image, 64, 32)
    assert crops.shape == (10, 32, 32, 3)
    assert (tops[:5], lefts[:5]) == ([0, 0, 32, 32, 16], [0, 32, 0, 32, 16])
    for i in range(5):
        plain = square[tops[i] : tops[i] + 32, lefts[i] : lefts[i] + 32]
        assert np.array_equal(crops[i], plain)
        assert np.array_equal(crops[i + 5], plain[:, ::-1])


@pytest.mark.parametrize("size", [(512, 384), (403, 301), (64, 300), (80, 80)])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_scaled_decoding_is_close_and_keeps_the_geometry(size, mode):
    rng = np.random.default_rng(0)
    smooth = Image.fromarray(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    smooth.convert(mode).save(buffer, "JPEG", quality=95)
    exact, crop = images.centre_crop(images.decode(buffer.getvalue()), 48, 40)
    whole, same_crop = images.input_pixels(buffer.getvalue(), 48, 40)
    scaled, scaled_crop = images.input_pixels(buffer.getvalue(), 48, 40, scaled=True)
    assert np.array_equal(whole, exact)
    assert crop == same_crop == scaled_crop
    assert (crop.image_width, crop.image_height) == size
    assert scaled.shape == exact.shape
    assert np.abs(scaled.astype(int) - exact).mean() < 2
    assert np.array_equal(scaled, exact) == (min(size) < 96)


def test_scaled_decoding_leaves_other_formats_alone():
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (200, 300, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    one, other = (images.input_pixels(buffer.getvalue(), 48, 40, scaled=scaled)[0] for scaled in (False, True))
    assert np.array_equal(one, other)


@pytest.mark.parametrize("scaled", [False, True])
def test_an_image_resized_to_several_sides_is_what_it_is_for_each_alone(scaled):
    data = encoded(picture(300, 401), "JPEG")
    resized, original = images.decode_resized(data, {40, 72, 300}, scaled)
    assert original == (401, 300)
    assert sorted(resized) == [40, 72, 300]
    for side, image in resized.items():
        alone, _ = images.input_pixels(data, side, side, scaled)
        assert np.array_equal(images.centre_crop(image, side, side)[0], alone)
