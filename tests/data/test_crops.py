"""Decoding, cropping and resizing: equal to torchvision's, and right for every kind of image."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as TF
from PIL import Image
from torchvision.transforms import RandomResizedCrop

from nepa_scale.data.crops import MAX_PIXELS, Box, EncodedImage, UndecodableImage, centre_box, random_resized_box

SCALE, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Smooth colours with a direction: a mirrored, turned or shifted copy would show."""
    random = np.random.default_rng(seed)
    coarse = Image.fromarray(random.integers(0, 255, (9, 7, 3), dtype=np.uint8))
    return coarse.resize((width, height), Image.Resampling.BICUBIC)


def encode(image: Image.Image, form: str = "JPEG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def as_array(data: bytes, size: tuple[int, int]) -> np.ndarray:
    image = EncodedImage(data)
    return image.crop(Box(0, 0, image.width, image.height), size).numpy().astype(float)


@pytest.mark.parametrize("key", range(8))
def test_equal_to_torchvision_at_full_decoding(key: int) -> None:
    data = encode(picture(500, 375, key), quality=90)
    image = EncodedImage(data)
    box = random_resized_box(image.width, image.height, key, SCALE, RATIO)
    decoded = torch.from_numpy(np.array(Image.open(io.BytesIO(data)))).permute(2, 0, 1)
    expected = TF.resized_crop(decoded, box.top, box.left, box.height, box.width, [224, 224], antialias=True)
    assert torch.equal(image.crop(box, (224, 224)).permute(2, 0, 1), expected)


@pytest.mark.parametrize("key", range(8))
def test_reduced_decoding_stays_close(key: int) -> None:
    data = encode(picture(1600, 1200, key), quality=90)
    image = EncodedImage(data)
    box = random_resized_box(image.width, image.height, key, (0.5, 1.0), RATIO)
    decoded = torch.from_numpy(np.array(Image.open(io.BytesIO(data)))).permute(2, 0, 1)
    expected = TF.resized_crop(decoded, box.top, box.left, box.height, box.width, [64, 64], antialias=True)
    difference = (image.crop(box, (64, 64)).permute(2, 0, 1).float() - expected.float()).abs()
    assert difference.mean() < 2.0  # of 255
    assert difference.max() < 12


def test_boxes_follow_torchvisions_distribution() -> None:
    boxes = [random_resized_box(400, 300, key, SCALE, RATIO) for key in range(4000)]
    shares = np.array([b.width * b.height / 120_000 for b in boxes])
    ratios = np.array([b.width / b.height for b in boxes])
    torch.manual_seed(0)
    blank = torch.empty(3, 300, 400)
    theirs = [RandomResizedCrop.get_params(blank, list(SCALE), list(RATIO)) for _ in range(4000)]
    assert abs(shares.mean() - np.mean([h * w / 120_000 for _, _, h, w in theirs])) < 0.02
    assert abs(ratios.mean() - np.mean([w / h for _, _, h, w in theirs])) < 0.02
    assert shares.min() > 0.07
    assert RATIO[0] * 0.98 < ratios.min()
    assert ratios.max() < RATIO[1] * 1.02
    assert all(0 <= b.left <= 400 - b.width and 0 <= b.top <= 300 - b.height for b in boxes)
    assert boxes == [random_resized_box(400, 300, key, SCALE, RATIO) for key in range(4000)]


@pytest.mark.parametrize("size", [(1, 1), (1, 900), (900, 1), (3, 2)])
def test_extreme_shapes_have_a_box(size: tuple[int, int]) -> None:
    for key in range(20):
        box = random_resized_box(*size, key, SCALE, RATIO)
        assert 1 <= box.width <= size[0]
        assert 1 <= box.height <= size[1]
    assert as_array(encode(picture(*size), "PNG"), (16, 16)).shape == (16, 16, 3)
    centre = centre_box(*size, (16, 16))
    assert centre.width >= 1
    assert centre.height >= 1


def test_centre_box_is_resize_then_centre_crop() -> None:
    assert centre_box(512, 256, (224, 224)) == Box(144, 16, 224, 224)
    assert centre_box(256, 256, (224, 224)) == Box(16, 16, 224, 224)


@pytest.mark.parametrize(
    ("form", "mode"),
    [("JPEG", "RGB"), ("JPEG", "L"), ("JPEG", "CMYK"), ("PNG", "RGB"), ("PNG", "L"), ("PNG", "P"), ("PNG", "RGBA"),
     ("PNG", "LA"), ("PNG", "1"), ("WEBP", "RGB"), ("GIF", "P"), ("PPM", "RGB")],
)  # fmt: skip
def test_every_colour_mode_becomes_rgb(form: str, mode: str) -> None:
    original = picture(60, 40)
    expected = np.array(original.convert("L").convert("RGB") if mode in ("L", "LA") else original, dtype=float)
    data = encode(original.convert(mode), form, **({"quality": 95} if form in ("JPEG", "WEBP") else {}))
    found = as_array(data, (40, 60))
    if mode == "1":
        assert set(np.unique(found)) <= {0.0, 255.0}
    else:
        assert np.abs(found - expected).mean() < (20 if mode == "P" else 6)


def test_sixteen_bits_are_scaled_not_clipped() -> None:
    ramp = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    found = as_array(encode(Image.fromarray(ramp), "PNG"), (64, 64))
    assert np.abs(found[..., 0] - ramp / 257).max() <= 1


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied(orientation: int) -> None:
    upright = picture(80, 60)
    undo = {2: [0], 3: [3], 4: [1], 5: [5], 6: [2], 7: [6], 8: [4]}.get(orientation, [])  # Image.Transpose members
    stored = upright
    for operation in undo:
        stored = stored.transpose(Image.Transpose(operation))
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = EncodedImage(encode(stored, quality=95, exif=exif))
    assert (image.width, image.height) == (80, 60)
    found = image.crop(Box(0, 0, 80, 60), (60, 80)).numpy().astype(float)
    assert np.abs(found - np.array(upright, dtype=float)).mean() < 3


def test_an_animation_gives_its_first_frame() -> None:
    frames = [picture(40, 40, seed) for seed in range(3)]
    data = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert np.abs(as_array(data, (40, 40)) - np.array(frames[0], dtype=float)).mean() < 20


def test_a_png_named_jpeg_does_not_matter() -> None:
    assert as_array(encode(picture(30, 30), "PNG"), (30, 30)).shape == (30, 30, 3)


@pytest.mark.parametrize("data", [b"", b"not an image", b"\xff\xd8\xff\xe0 broken", encode(picture(90, 90))[:700],
                                  encode(picture(90, 90), "PNG")[:300]],
                         ids=["empty", "text", "header", "truncated jpeg", "truncated png"])  # fmt: skip
def test_what_cannot_be_decoded_is_named(data: bytes) -> None:
    with pytest.raises(UndecodableImage):
        as_array(data, (8, 8))


def test_a_decompression_bomb_is_refused_by_its_header() -> None:
    side = int(MAX_PIXELS**0.5) + 200
    with pytest.raises(UndecodableImage, match="bomb"):
        EncodedImage(encode(Image.new("1", (side, side)), "PNG"))
