"""Every kind of pixels becomes RGB."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from ldam_plugins.data.images import LabelledImages
from ldam_plugins.data.readers.base import FileSource, decode_image


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr", "I;16"])
def test_every_mode_becomes_rgb(mode, tmp_path):
    value = 255 if mode == "1" else 180
    image = Image.new("RGB", (4, 3), (value,) * 3)
    if mode == "I;16":
        image = Image.fromarray(np.full((3, 4), value * 257, dtype=np.uint16))
    else:
        image = image.convert(mode, palette=Image.Palette.ADAPTIVE)
    options = {"transparency": bytes([0, 9])} if mode == "P" else {}
    file = tmp_path / ("a.tif" if mode in ("CMYK", "YCbCr") else "a.png")
    image.save(file, **options)
    with Image.open(file) as stored:
        # older releases of Pillow open a YCbCr file as RGB
        assert stored.mode == mode or (mode, stored.mode) == ("YCbCr", "RGB")
    decoded = decode_image(str(file))
    assert decoded.mode == "RGB"
    assert np.asarray(decoded).shape == (3, 4, 3)
    # the conversion to YCbCr itself rounds
    assert np.abs(np.asarray(decoded).astype(int) - value).max() <= (mode == "YCbCr")


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
