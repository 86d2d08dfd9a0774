"""Every kind of pixels becomes RGB."""

from __future__ import annotations

import io
from importlib.util import find_spec

import numpy as np
import pytest
from PIL import Image

from ldam_plugins.data.images import LabelledImages, load_images
from ldam_plugins.data.readers import base
from ldam_plugins.data.readers.base import FileSource, decode_image


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr", "I;16"])
def test_every_mode_becomes_rgb(mode, tmp_path):
    value = 255 if mode == "1" else 180
    image = Image.new("RGB", (4, 3), (value,) * 3)
    if mode == "I;16":
        image = Image.fromarray(np.full((3, 4), value * 257, dtype=np.uint16))
    else:
        image = image.convert(mode, palette=Image.Palette.ADAPTIVE)
    file = tmp_path / ("a.tif" if mode in ("CMYK", "YCbCr") else "a.png")
    image.save(file)
    with Image.open(file) as stored:
        # older releases of Pillow open a YCbCr file as RGB
        assert stored.mode == mode or (mode, stored.mode) == ("YCbCr", "RGB")
    decoded = decode_image(str(file))
    assert decoded.mode == "RGB"
    assert np.asarray(decoded).shape == (3, 4, 3)
    # the conversion to YCbCr itself rounds
    assert np.abs(np.asarray(decoded).astype(int) - value).max() <= (mode == "YCbCr")


HALF = [[(200, 0, 0, 255), (200, 0, 0, 0)], [(0, 0, 200, 255), (0, 0, 0, 128)]]
SEEN = [[(200, 0, 0), (255, 255, 255)], [(0, 0, 200), (127, 127, 127)]]


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
@pytest.mark.parametrize("kind", ["png", "webp"])
def test_what_is_transparent_stands_before_white(mode, kind, tmp_path):
    image = Image.fromarray(np.array(HALF, dtype=np.uint8), "RGBA")
    expected = np.array(SEEN)
    if mode == "LA":
        image = image.convert("LA")
        expected = np.array([[[60] * 3, [255] * 3], [[23] * 3, [127] * 3]])
    if mode == "P":
        image = image.quantize(4)
    options = {"lossless": True, "exact": True} if kind == "webp" else {}
    image.save(tmp_path / f"a.{kind}", **options)
    decoded = np.asarray(decode_image(str(tmp_path / f"a.{kind}"))).astype(int)
    assert np.abs(decoded - expected).max() <= 1


def test_transparency_of_one_colour_of_a_palette(tmp_path):
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 0), 1)
    for kind in ("png", "gif"):
        image.save(tmp_path / f"a.{kind}", transparency=0)
        assert np.asarray(decode_image(str(tmp_path / f"a.{kind}"))).tolist() == [
            [[255, 255, 255], [40, 50, 60]]
        ]


@pytest.mark.parametrize("kind", ["jpg", "png", "webp", "tif", "avif", "heic"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_photographs_are_upright(kind, orientation, tmp_path):
    """Each orientation, drawn by hand: where the two marked corners of a photograph are seen."""
    pixels = np.full((32, 48, 3), 255, dtype=np.uint8)
    pixels[:16, :16] = (200, 0, 0)
    pixels[16:, :16] = (0, 0, 200)
    undone = {
        1: pixels,
        2: pixels[:, ::-1],
        3: pixels[::-1, ::-1],
        4: pixels[::-1],
        5: pixels.transpose(1, 0, 2),
        6: np.rot90(pixels, 1),
        7: np.rot90(pixels, 2).transpose(1, 0, 2),
        8: np.rot90(pixels, -1),
    }
    exif = Image.Exif()
    exif[0x0112] = orientation
    base._formats()  # Pillow knows HEIF from then on
    file = tmp_path / f"a.{kind}"
    Image.fromarray(np.ascontiguousarray(undone[orientation])).save(
        file, exif=exif.tobytes(), quality=95
    )
    decoded = np.asarray(decode_image(str(file))).astype(int)
    assert decoded.shape == pixels.shape
    assert np.abs(decoded - pixels).mean() < 5


@pytest.mark.parametrize("kind", ["gif", "png", "webp", "avif", "tif"])
def test_the_first_frame_is_taken(kind, tmp_path):
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue", "blue")]
    frames[0].save(tmp_path / f"a.{kind}", save_all=True, append_images=frames[1:])
    red = np.asarray(decode_image(str(tmp_path / f"a.{kind}"))).astype(int)
    assert np.abs(red - (255, 0, 0)).max() < 6


def test_telephone_photographs_need_a_package_that_the_error_names(tmp_path, monkeypatch):
    file = tmp_path / "cat" / "IMG_1.HEIC"
    file.parent.mkdir()
    base._formats()  # Pillow knows HEIF from then on
    Image.new("RGB", (32, 24), "red").save(file, format="HEIF", quality=100)
    (tmp_path / "dog").mkdir()
    Image.new("RGB", (32, 24), "blue").save(tmp_path / "dog" / "b.hif.jpg")
    (tmp_path / "renamed.jpg").write_bytes(file.read_bytes())
    red = np.asarray(decode_image(str(file))).astype(int)
    assert red.shape == (24, 32, 3)
    assert np.abs(red - (255, 0, 0)).max() < 8
    found = find_spec
    monkeypatch.setattr(base, "find_spec", lambda name: None if "heif" in name else found(name))
    monkeypatch.setattr(base, "_formats", lambda: base._FORMATS)
    for source in (str(tmp_path / "renamed.jpg"), io.BytesIO(file.read_bytes())):
        with pytest.raises(ValueError, match=r"HEIC or HEIF: `pip install pillow-heif`"):
            decode_image(source)
    with pytest.raises(ValueError, match=r"1 of the 2 images are HEIC.*IMG_1\.HEIC.*pillow-heif"):
        load_images(tmp_path, test_split=0.5)


def test_two_photographs_in_one_file(tmp_path):
    """What telephones call JPEG may hold a second picture."""
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "a.mpo", format="MPO", save_all=True, append_images=frames[1:])
    (tmp_path / "a.mpo").rename(tmp_path / "a.jpg")
    assert decode_image(str(tmp_path / "a.jpg")).getpixel((3, 3))[0] > 240


def test_pixels_of_undefined_range_are_refused(tmp_path):
    Image.new("F", (4, 3), 0.5).save(tmp_path / "a.tif")
    with pytest.raises(ValueError, match="mode 'F'"):
        decode_image(str(tmp_path / "a.tif"))


@pytest.mark.parametrize("kind", ["eps", "pcx"])
def test_only_usual_formats_are_opened(kind, tmp_path):
    """Pillow knows more of them, and hands EPS to another program."""
    Image.new("RGB", (4, 3)).save(tmp_path / f"a.{kind}")
    (tmp_path / f"a.{kind}").rename(tmp_path / "a.jpg")
    images = LabelledImages(FileSource(tmp_path, ["a.jpg"]), [0], ("a",))
    with pytest.raises(ValueError, match=r"a\.jpg cannot be read .*cannot identify"):
        images[0]
