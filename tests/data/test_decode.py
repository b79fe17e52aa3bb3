"""Decoding, cropping and resizing: equal to torchvision's, and right for every kind of image."""

from __future__ import annotations

import io
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision.transforms.v2 as T
import torchvision.transforms.v2.functional as TF
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from timm.data import create_transform
from torch import Tensor

from nepa_scale.data import jpeg
from nepa_scale.data.crops import Box, random_resized_box
from nepa_scale.data.decode import MAX_PIXELS, EncodedImage, UndecodableImage
from tests.data.images import encode, picture

SCALE, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)


def cropped(data: bytes, box: Box, size: tuple[int, int], interpolation: str = "bilinear") -> Tensor:
    out = torch.zeros((*size, 3), dtype=torch.uint8)
    EncodedImage(data, interpolation).resized_crop(box, out)
    return out


def whole(data: bytes, size: tuple[int, int]) -> np.ndarray:
    return EncodedImage(data).resized(size).numpy().astype(float)


def in_full(data: bytes) -> Tensor:
    """uint8 [3, H, W], by Pillow."""
    return torch.from_numpy(np.array(Image.open(io.BytesIO(data)).convert("RGB"))).permute(2, 0, 1)


def torchvision_crop(data: bytes, box: Box, size: tuple[int, int]) -> Tensor:
    expected = TF.resized_crop(in_full(data), box.top, box.left, box.height, box.width, list(size), antialias=True)
    return expected.permute(1, 2, 0)


JPEGS: list[tuple[str, dict[str, Any]]] = [
    ("RGB", {"quality": 90}),
    ("RGB", {"quality": 75, "subsampling": 0}),
    ("RGB", {"quality": 75, "subsampling": 1}),
    ("RGB", {"quality": 60, "progressive": True}),
    ("RGB", {"quality": 60, "optimize": True, "restart_marker_rows": 1}),
    ("L", {"quality": 90}),
]


@pytest.mark.parametrize(("mode", "options"), JPEGS)
def test_equal_to_torchvision_bit_for_bit_at_full_decoding(mode: str, options: dict[str, Any]) -> None:
    for seed, size in enumerate([(500, 375), (333, 501), (97, 64), (640, 481)]):
        noise = np.random.default_rng(seed).integers(0, 60, (size[1], size[0], 3), dtype=np.uint8)
        image = Image.fromarray(np.array(picture(*size, seed)) // 2 + noise).convert(mode)
        data = encode(image, **options)
        for key in range(12):  # among them crops at the top, for which decoding ends early
            box = random_resized_box(*size, key, SCALE, RATIO)
            assert torch.equal(cropped(data, box, (224, 192)), torchvision_crop(data, box, (224, 192)))


@pytest.mark.parametrize("size", [(224, 192), (64, 80)])
def test_bicubic_is_torchvisions_too(size: tuple[int, int]) -> None:
    data = encode(picture(150, 113), quality=90)
    for key in range(12):
        box = random_resized_box(150, 113, key, SCALE, RATIO)
        expected = TF.resized_crop(
            in_full(data),
            box.top,
            box.left,
            box.height,
            box.width,
            list(size),
            TF.InterpolationMode.BICUBIC,
            antialias=True,
        )
        found = cropped(data, box, size, "bicubic")
        assert torch.equal(found, expected.permute(1, 2, 0))
        assert not torch.equal(found, cropped(data, box, size))


def test_decoding_ends_where_the_crop_ends() -> None:
    data = encode(picture(200, 400), quality=90)
    header = jpeg.read_header(data)
    assert header is not None
    assert header.row_height == 16
    assert jpeg.decode(data, header, 1, 100).shape == (128, 200, 3)  # 112 rows hold 100, and one row of blocks beside
    assert jpeg.decode(data, header, 1, 390).shape == (400, 200, 3)


def test_reduced_decoding_stays_close() -> None:
    """Against full decoding along the same cut: see the tolerance in docs/data.md."""
    means = []
    for key in range(12):
        data = encode(picture(1600, 1200, key), quality=90)
        left, top, width, height = (edge // 8 * 8 for edge in random_resized_box(1600, 1200, key, (0.5, 1.0), RATIO))
        box = Box(left, top, width, height)
        difference = (cropped(data, box, (64, 64)).float() - torchvision_crop(data, box, (64, 64)).float()).abs()
        means.append(difference.mean().item())
        assert difference.max() < 12
    assert np.mean(means) < 0.7  # of 255
    assert np.mean(means) > 0  # it was reduced


@pytest.mark.parametrize(
    ("zoom", "factor"), [(0.5, 1), (2.9, 1), (3.0, 2), (5.9, 2), (6.0, 4), (11.9, 4), (12, 8), (99, 8)]
)
def test_images_are_reduced_only_where_it_does_not_show(zoom: float, factor: int) -> None:
    assert jpeg.reduction(zoom) == factor


def imagenet_sample() -> Path | None:
    archive = Path(__file__).parents[3] / "shared" / "data" / "imagenet_sample.tar.gz"
    return archive if archive.is_file() else None


@pytest.mark.skipif(imagenet_sample() is None, reason="shared/data/imagenet_sample.tar.gz is not there")
def test_real_images_agree_with_torchvision_in_full_and_reduced() -> None:
    import tarfile

    differences = []
    with tarfile.open(str(imagenet_sample())) as tar:
        for number, member in enumerate(m for m in tar if m.name.endswith(".JPEG")):
            if number == 60:
                break
            file = tar.extractfile(member)
            assert file is not None
            data = file.read()
            image = EncodedImage(data)
            box = random_resized_box(image.width, image.height, number, SCALE, RATIO)
            assert torch.equal(cropped(data, box, (224, 224)), torchvision_crop(data, box, (224, 224)))
            left, top, width, height = (max(4, edge // 4 * 4) for edge in box)
            box = Box(left - left % 4, top, min(width, image.width - left), min(height, image.height - top))
            size = (max(1, int(box.height / 3)), max(1, int(box.width / 3)))
            difference = cropped(data, box, size).float() - torchvision_crop(data, box, size).float()
            differences.append(difference.abs().mean().item())
    assert np.mean(differences) < 1.5  # of 255; at the least sharpness for which images are reduced
    assert np.mean(differences) > 0


@pytest.mark.parametrize("size", [(500, 375), (375, 500), (256, 256), (40, 300), (224, 224)])
def test_the_evaluation_crop_equals_torchvisions(size: tuple[int, int]) -> None:
    data = encode(picture(*size, 3), quality=90)
    out = torch.zeros((224, 224, 3), dtype=torch.uint8)
    EncodedImage(data).resized_centre(out)
    expected = T.Compose([T.Resize(256, antialias=True), T.CenterCrop(224)])(in_full(data))
    assert torch.equal(out.permute(2, 0, 1), expected)


@pytest.mark.parametrize("mode", ["center", "squash"])
@pytest.mark.parametrize("target", [(224, 224), (48, 48), (128, 224)])
def test_the_evaluation_crop_equals_timms(target: tuple[int, int], mode: str) -> None:
    for size, share, interpolation in [((500, 375), 0.875, "bicubic"), ((375, 500), 0.95, "bilinear"),
                                       ((257, 256), 0.9, "bicubic"), ((300, 301), 1.0, "bicubic")]:  # fmt: skip
        data = encode(picture(*size, 3), "PNG")
        out = torch.zeros((*target, 3), dtype=torch.uint8)
        EncodedImage(data, interpolation).resized_centre(out, share, squash=mode == "squash")
        theirs = create_transform(
            (3, *target), is_training=False, crop_pct=share, crop_mode=mode, interpolation=interpolation
        )
        expected = T.Compose(theirs.transforms[:2])(in_full(data))  # the rest is of tensors and normalisation
        # theirs resizes in floating point and rounds last; a crop one pixel away differs by far more
        assert (out.permute(2, 0, 1).int() - expected.int()).abs().max() <= 1, (size, share)


@pytest.mark.parametrize("size", [(1, 1), (1, 900), (900, 1), (3, 2)])
def test_extreme_shapes_fill_the_crop(size: tuple[int, int]) -> None:
    for form in ("PNG", "JPEG"):
        data = encode(Image.new("RGB", size, (200, 100, 50)), form)
        for key in range(8):
            found = cropped(data, random_resized_box(*size, key, SCALE, RATIO), (16, 16)).float()
            assert (found - torch.tensor([200.0, 100.0, 50.0])).abs().max() < 6
        out = torch.zeros((16, 16, 3), dtype=torch.uint8)
        EncodedImage(data).resized_centre(out)
        assert (out.float() - torch.tensor([200.0, 100.0, 50.0])).abs().max() < 6


@pytest.mark.parametrize(
    ("form", "mode"),
    [("JPEG", "RGB"), ("JPEG", "L"), ("JPEG", "CMYK"), ("PNG", "RGB"), ("PNG", "L"), ("PNG", "P"), ("PNG", "RGBA"),
     ("PNG", "LA"), ("PNG", "1"), ("WEBP", "RGB"), ("GIF", "P"), ("PPM", "RGB"), ("TIFF", "CMYK"), ("BMP", "RGB")],
)  # fmt: skip
def test_every_colour_mode_becomes_rgb(form: str, mode: str) -> None:
    original = picture(60, 40)
    expected = np.array(original.convert("L").convert("RGB") if mode in ("L", "LA") else original, dtype=float)
    data = encode(original.convert(mode), form, **({"quality": 95} if form in ("JPEG", "WEBP") else {}))
    found = whole(data, (40, 60))
    if mode == "1":
        assert set(np.unique(found)) <= {0.0, 255.0}
    else:
        assert np.abs(found - expected).mean() < (20 if mode == "P" else 6)


def test_ycck_is_read_as_cmyk_is() -> None:
    """The same file as CMYK, its Adobe marker saying that it was transformed: Pillow's reading is the reference."""
    data = bytearray(encode(picture(64, 48).convert("CMYK"), quality=95))
    at = data.index(b"Adobe")
    data[at + 11] = 2
    assert jpeg.read_header(bytes(data)) is None
    expected = np.array(Image.open(io.BytesIO(data)).convert("RGB"), dtype=float)
    assert (whole(bytes(data), (48, 64)) == expected).all()


@pytest.mark.parametrize("mode", ["I;16", "I"])
def test_sixteen_bits_are_scaled_not_clipped(mode: str) -> None:
    ramp = np.linspace(0, 65535, 64 * 64).reshape(64, 64)
    image = Image.fromarray(ramp.astype(np.uint16 if mode == "I;16" else np.int32))
    found = whole(encode(image, "PNG" if mode == "I;16" else "TIFF"), (64, 64))
    assert np.abs(found[..., 0] - ramp / 257).max() <= 1


def test_a_dark_sixteen_bit_image_stays_dark() -> None:
    dark = np.full((8, 8), 200, dtype=np.uint16)
    assert whole(encode(Image.fromarray(dark), "PNG"), (8, 8)).max() == 1


@pytest.mark.parametrize("form", ["JPEG", "PNG"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied(orientation: int, form: str) -> None:
    upright = picture(480, 360)
    undo = {2: [0], 3: [3], 4: [1], 5: [5], 6: [2], 7: [6], 8: [4]}.get(orientation, [])  # Image.Transpose members
    stored = upright
    for operation in undo:
        stored = stored.transpose(Image.Transpose(operation))
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 95} if form == "JPEG" else {}
    data = encode(stored, form, exif=exif, **options)
    image = EncodedImage(data)
    assert (image.width, image.height) == (480, 360)
    for box, size in ((Box(0, 0, 480, 360), (60, 80)), (Box(200, 40, 90, 130), (26, 18))):
        expected = TF.resized_crop(
            torch.from_numpy(np.array(upright)).permute(2, 0, 1), box.top, box.left, box.height, box.width, list(size)
        ).permute(1, 2, 0)
        assert (cropped(data, box, size).float() - expected.float()).abs().mean() < 3


@pytest.mark.parametrize("value", [0, 9, 60000])
def test_a_meaningless_orientation_is_ignored(value: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = value
    image = EncodedImage(encode(picture(80, 60), exif=exif))
    assert (image.width, image.height) == (80, 60)


def test_an_animation_gives_its_first_frame() -> None:
    frames = [picture(40, 40, seed) for seed in range(3)]
    for form in ("GIF", "WEBP", "PNG"):
        data = encode(frames[0], form, save_all=True, append_images=frames[1:])
        assert np.abs(whole(data, (40, 40)) - np.array(frames[0], dtype=float)).mean() < 20


def test_what_the_bytes_are_counts_and_not_the_name() -> None:
    assert np.abs(whole(encode(picture(30, 30), "PNG"), (30, 30)) - np.array(picture(30, 30))).max() == 0


def test_bytes_after_the_end_of_a_jpeg_do_no_harm() -> None:
    data = encode(picture(90, 120), quality=90)
    assert (whole(data + b"\0" * 300, (120, 90)) == whole(data, (120, 90))).all()


CUT = encode(picture(90, 90))
BROKEN = {
    "empty": b"",
    "text": b"not an image",
    "header only": b"\xff\xd8\xff\xe0 broken",
    "cut jpeg": CUT[: len(CUT) * 2 // 3],
    "cut jpeg with an end": CUT[:400] + b"\xff\xd9",
    "cut progressive jpeg": encode(picture(90, 90), progressive=True)[:900],
    "cut png": encode(picture(90, 90), "PNG")[:300],
    "cut webp": encode(picture(90, 90), "WEBP")[:200],
    "zeros at the end": CUT[: len(CUT) // 2] + b"\0" * (len(CUT) // 2),
    "svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
}


@pytest.mark.parametrize("data", BROKEN.values(), ids=BROKEN.keys())
def test_what_cannot_be_decoded_is_named(data: bytes) -> None:
    with pytest.raises(UndecodableImage, match=r"\w"):
        whole(data, (8, 8))


def test_a_jpeg_that_is_cut_below_the_crop_is_bad_whatever_the_crop_is() -> None:
    data = encode(picture(200, 400), quality=95)
    with pytest.raises(UndecodableImage):
        cropped(data[:-300], Box(0, 0, 50, 50), (8, 8))


VALID = [encode(picture(60, 50)), encode(picture(60, 50), progressive=True), encode(picture(60, 50), "PNG"),
         encode(picture(60, 50), "GIF"), encode(picture(60, 50), "WEBP"), encode(picture(60, 50), "TIFF")]  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(
    which=st.integers(0, len(VALID) - 1),
    edits=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=6),
    length=st.floats(0.05, 1),
)
def test_damage_never_raises_anything_else(which: int, edits: list[tuple[float, int]], length: float) -> None:
    data = bytearray(VALID[which])
    for place, value in edits:
        data[int(place * (len(data) - 1))] = value
    damaged = bytes(data[: max(1, int(length * len(data)))])
    try:
        image = EncodedImage(damaged)
        out = torch.zeros((16, 16, 3), dtype=torch.uint8)
        image.resized_crop(random_resized_box(image.width, image.height, which, SCALE, RATIO), out)
    except UndecodableImage:
        pass


@pytest.mark.parametrize("form", ["PNG", "JPEG"])
def test_a_decompression_bomb_is_refused_by_its_header(form: str) -> None:
    if form == "PNG":
        side = int(MAX_PIXELS**0.5) + 200
        data = encode(Image.new("1", (side, side)), "PNG")
    else:
        changed = bytearray(encode(picture(64, 64)))
        frame = changed.index(b"\xff\xc0")
        changed[frame + 5 : frame + 9] = struct.pack(">HH", 65000, 65000)
        data = bytes(changed)
    with pytest.raises(UndecodableImage, match="bomb"):
        EncodedImage(data)
