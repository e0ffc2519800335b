"""Decoding: every mode and orientation to the pixels meant, every hostile file to its status."""

import contextlib
import io
import struct
import sys
import warnings
import zlib

import numpy as np
import pytest
from conftest import encoded
from PIL import ExifTags, Image

from dinosearch.images import BadImage, Fit, Frames, content_hash, decode, decode_rgb, decoders, machine, pixel_budget
from dinosearch.images.decode import UPRIGHT

FIT = Fit(image_size=48)
INVERSE = {6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}


def exif_of(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return exif


def status_of(data: bytes, **options) -> str:
    with pytest.raises(BadImage) as caught:
        decode(data, FIT, **options)
    assert caught.value.reason
    assert "\n" not in caught.value.reason
    return caught.value.status


def png_header(width: int, height: int) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    ihdr = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(b"\0" * 1000)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", ihdr) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


@pytest.mark.parametrize("form", ["PNG", "JPEG", "TIFF", "WEBP", "AVIF"])
@pytest.mark.parametrize(
    "fit", [FIT, Fit(48, "pad"), Fit(47, "pad"), Fit(48, "squash"), Fit(48, crop_pct=0.875)], ids=str
)
def test_the_eight_orientations_are_one_picture(photos, form, fit):
    photo = photos[0].resize((200, 133))
    options = {"PNG": {}, "TIFF": {}, "WEBP": {"lossless": True}}.get(form, {"quality": 95, "subsampling": "4:4:4"})
    wanted = decode(encoded(photo, form, **options), fit)
    assert (wanted.width, wanted.height) == (200, 133)
    for orientation, undo in UPRIGHT.items():
        turned = photo.transpose(INVERSE.get(orientation, undo))  # all but the quarter turns are their own inverse
        data = encoded(turned, form, exif=exif_of(orientation), **options)
        picture = decode(data, fit)
        assert (picture.width, picture.height) == (200, 133), orientation
        assert close(picture.pixels, wanted.pixels, mean=0.8), orientation
        assert close(np.asarray(decode_rgb(data)), np.asarray(photo), mean=4), orientation


def close(a: np.ndarray, b: np.ndarray, *, mean: float) -> bool:
    return a.shape == b.shape and np.abs(a.astype(float) - b).mean() < mean


def test_crop_keeps_the_middle_and_pad_and_squash_keep_all():
    stripes = Image.new("RGB", (300, 100), "red")
    stripes.paste("green", (100, 0, 200, 100))
    data = encoded(stripes, "PNG")
    green, red = [0, 128, 0], [255, 0, 0]
    assert (decode(data, Fit(30)).pixels[:, 2:-2] == green).all()  # the filter sees a little beyond the box
    squashed = decode(data, Fit(30, "squash")).pixels
    assert (squashed[:, 2] == red).all()
    assert (squashed[:, 15] == green).all()
    padded = decode(data, Fit(30, "pad")).pixels
    assert (padded[0] == [124, 116, 104]).all()
    assert (padded[15, 15] == green).all()
    assert (padded[15, 1] == red).all()


def test_crop_is_timms_resize_and_centre_crop(photos):
    data = encoded(photos[1], "PNG")
    scaled = photos[1].resize((384, 256), Image.Resampling.BICUBIC)
    timms = np.asarray(scaled.crop((80, 16, 304, 240)))
    assert close(decode(data, Fit(224, crop_pct=0.875)).pixels, timms, mean=1)


def test_pixels_are_rgb_bytes_whatever_the_mode(photos):
    small = photos[0].resize((64, 48))
    for form, mode in [
        *(("PNG", mode) for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")),
        *(
            ("TIFF", mode)
            for mode in ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "I;16", "I", "F")
        ),
        *(("JPEG", mode) for mode in ("L", "RGB", "CMYK")),
        *(("GIF", "P"), ("BMP", "RGB"), ("PPM", "RGB"), ("PPM", "L"), ("WEBP", "RGBA"), ("AVIF", "RGB")),
    ]:
        image = Image.fromarray(np.uint16(small.convert("L")) * 257) if mode == "I;16" else to_mode(small, mode)
        picture = decode(encoded(image, form), Fit(48))
        assert picture.pixels.shape == (48, 48, 3), (form, mode)
        assert picture.pixels.dtype == np.uint8
        lossy = {"1": image, "P": image, "PA": image}  # few colours: compare with those, not with the photo
        wanted = lossy.get(mode, small.convert("L") if mode in GREY else small).convert("RGB")
        error = np.abs(picture.pixels.astype(float) - decode(encoded(wanted, "PNG"), Fit(48)).pixels).mean()
        assert error < 8, (form, mode)


GREY = ("L", "LA", "I;16", "I", "F")


def to_mode(image: Image.Image, mode: str) -> Image.Image:
    if mode == "LAB":
        from PIL import ImageCms

        srgb, lab = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
        return ImageCms.profileToProfile(image, srgb, lab, outputMode="LAB")
    if mode in ("LA", "PA", "I", "F"):
        return image.convert("L").convert(mode)
    return image.convert(mode)


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_deep_pixels_are_scaled_not_clipped(mode):
    ramp = np.linspace(0, 65535, 256)[None].repeat(256, 0)
    image = Image.fromarray(ramp.astype({"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode]))
    row = decode(encoded(image, "TIFF"), Fit(256)).pixels[0, :, 0]
    assert np.abs(row.astype(int) - np.arange(256)).max() <= 1


def test_floats_between_0_and_1_are_black_to_white_and_others_are_stretched():
    grey = Image.fromarray(np.full((8, 8), 0.5, np.float32))
    assert (decode(encoded(grey, "TIFF"), Fit(8)).pixels == 128).all()
    wild = np.zeros((8, 8), np.float32)
    wild[:, :4], wild[0, 0] = -1e6, np.nan
    pixels = decode(encoded(Image.fromarray(wild), "TIFF"), Fit(8)).pixels
    assert (pixels[1, 0], pixels[1, 7]) == (pytest.approx([0] * 3), pytest.approx([255] * 3))


def test_transparency_is_laid_on_white():
    clear = Image.new("RGBA", (20, 20), (255, 0, 0, 0))
    clear.paste((0, 0, 255, 255), (10, 0, 20, 20))
    palette = clear.convert("RGB").quantize(4)
    for data in (
        encoded(clear, "PNG"),
        encoded(clear, "WEBP", lossless=True),
        encoded(clear, "GIF"),
        encoded(clear, "TIFF"),
        encoded(Image.merge("RGB", clear.split()[:3]), "PNG", transparency=(255, 0, 0)),
        encoded(palette, "PNG", transparency=palette.getpixel((0, 0))),
    ):
        pixels = decode(data, Fit(20)).pixels
        assert (pixels[5, 2] == 255).all()
        assert (pixels[5, 17] == [0, 0, 255]).all()
    half = Image.new("LA", (4, 4), (0, 128))
    assert (decode(encoded(half, "PNG"), Fit(4)).pixels == 127).all()


@pytest.mark.parametrize("form", ["GIF", "TIFF", "WEBP", "PNG", "AVIF"])
def test_the_first_frame_or_page_counts(form):
    frames = [Image.new("RGB", (32, 32), colour) for colour in ("red", "blue", "green")]
    data = encoded(frames[0], form, save_all=True, append_images=frames[1:])
    with Image.open(io.BytesIO(data)) as image:
        assert image.n_frames == 3
    assert close(decode(data, Fit(8)).pixels, np.full((8, 8, 3), (255, 0, 0)), mean=3)


@pytest.mark.parametrize("mode", ["crop", "pad", "squash"])
@pytest.mark.parametrize("size", [(1, 1), (3000, 2), (2, 3000), (1, 10_000)])
def test_any_shape_fits(size, mode):
    for form in ("PNG", "JPEG"):
        picture = decode(encoded(Image.new("L", size, 200), form), Fit(48, mode))
        assert (picture.width, picture.height) == size
        assert picture.pixels.shape == (48, 48, 3)
        assert np.abs(picture.pixels[24, 24].astype(int) - 200).max() <= 2


def test_a_large_jpeg_decoded_at_a_fraction_looks_the_same(photos):
    """The short cut through the DCT differs from full decoding by less than JPEG's own noise."""
    large = photos[0].resize((2563, 1711), Image.Resampling.LANCZOS)
    png, jpeg = encoded(large, "PNG", compress_level=1), encoded(large, "JPEG", quality=95)
    for fit in (FIT, Fit(49, "pad"), Fit(48, "squash"), Fit(96, crop_pct=0.9)):
        assert close(decode(jpeg, fit).pixels, decode(png, fit).pixels, mean=1.0)
        assert (decode(jpeg, fit).width, decode(jpeg, fit).height) == (2563, 1711)


def test_hostile_files_have_their_status(photos):
    photo = photos[0]
    jpeg, png = encoded(photo, "JPEG"), encoded(photo, "PNG")
    assert status_of(b"") == "corrupt"
    assert status_of(b"hello, I am a text file\n") == "corrupt"
    assert status_of(b"\0" * 10_000) == "corrupt"
    assert status_of(png[:8] + b"\0" * 100 + png[-12:]) == "corrupt"
    broken = bytearray(png)
    broken[1000:2000] = bytes(1000)
    assert status_of(bytes(broken)) == "corrupt"
    assert status_of(encoded(photo, "EPS")) == "unsupported"
    assert status_of(encoded(photo, "PDF")) == "unsupported"
    assert status_of(encoded(photo, "ICO")) == "unsupported"
    assert status_of(b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"/>') == "unsupported"
    assert status_of(b"\0\0\0\x18ftypisom\0\0\0\0mp41isom" + b"\0" * 99) == "unsupported"
    assert status_of(jpeg[:30]) == "truncated"


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF"])
def test_half_a_file_is_truncated(photos, form):
    data = encoded(photos[0], form)
    for share in (0.1, 0.5, 0.9):
        assert status_of(data[: int(len(data) * share)]) == "truncated", share


def test_a_truncated_progressive_jpeg_is_truncated(photos):
    data = encoded(photos[0], "JPEG", progressive=True)
    assert status_of(data[: len(data) // 2]) == "truncated"


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's remarks on broken tags
def test_random_damage_never_escapes_as_another_exception(photos):
    random = np.random.default_rng(0)
    small = photos[0].resize((64, 48))
    for form in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF"):
        data = encoded(small, form, **({"compression": "tiff_lzw"} if form == "TIFF" else {}))
        for _ in range(60):
            damaged = bytearray(data)
            for at in random.integers(0, min(len(data), 400), 4):
                damaged[at] = random.integers(256)
            with contextlib.suppress(BadImage):
                assert decode(bytes(damaged), FIT, max_pixels=10_000_000).pixels.shape == (48, 48, 3)


def test_the_pixel_budget_is_checked_before_decoding():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert status_of(png_header(60_000, 60_000)) == "too-large"
        assert status_of(png_header(101, 100), max_pixels=10_000) == "too-large"
        assert status_of(png_header(100, 100), max_pixels=10_000) != "too-large"


def test_pillows_own_limit_does_not_bind_and_is_not_touched(photos, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for form in ("JPEG", "PNG", "BMP"):
            assert decode(encoded(photos[0], form), FIT).width == 640
    assert Image.MAX_IMAGE_PIXELS == 100


def test_the_content_decides_not_the_name(tmp_path, photos):
    path = tmp_path / "photo.jpg"
    photos[0].save(path, "PNG")
    assert decode(path.read_bytes(), FIT).width == 640


def test_heic_without_its_plugin_says_what_to_install(monkeypatch):
    monkeypatch.setattr(sys.modules["dinosearch.images.decode"], "_heif_installed", lambda: False)
    with pytest.raises(BadImage, match=r"pip install 'dinosearch\[heif\]'") as caught:
        decode(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + b"\0" * 99, FIT)
    assert caught.value.status == "unsupported"


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_broken_exif_does_not_cost_the_picture(photos):
    for exif in (b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0garbage", exif_of(77).tobytes()):
        assert decode(encoded(photos[0], "JPEG", exif=exif), FIT).width == 640


def test_the_budget_follows_memory_and_workers(monkeypatch):
    module = sys.modules["dinosearch.images.decode"]
    monkeypatch.setattr(module, "memory_bytes", lambda: 24 * 2**30)
    budget = pixel_budget.__wrapped__
    assert budget(1) == 2**29
    assert budget(4) == 24 * 2**30 // 2 // 12 // 4
    assert budget(64) == 89_478_485
    monkeypatch.setattr(module, "memory_bytes", lambda: 2**28)
    assert budget(64) == 2**28 // 2 // 12
    assert machine.memory_bytes() > 0


def test_content_hash_is_blake3_of_128_bits_or_the_older_blake2b():
    assert content_hash(b"") == "af1349b9f5f9a1a6a0404dea36dcc949"
    assert content_hash(b"", "blake2b") == "cae66941d9efbd404e4d88758ea67670"


@pytest.mark.parametrize("form", ["GIF", "TIFF", "WEBP", "PNG", "AVIF", "HEIF"])
def test_further_frames_are_had_by_number_and_in_any_order(form):
    if form == "HEIF":
        pytest.importorskip("pillow_heif").register_heif_opener()
    frames = [Image.new("RGB", (64, 64), colour) for colour in ("red", "blue", "lime")]
    data = encoded(frames[0], form, save_all=True, append_images=frames[1:])
    opened = Frames(data, Fit(8))
    assert opened.count() == 3
    for k in (0, 2, 1):
        wanted = np.asarray(frames[k].resize((8, 8)))
        assert close(opened.picture(k).pixels, wanted, mean=5)
        assert close(decode(data, Fit(8), frame=k).pixels, wanted, mean=5)
    with pytest.raises(BadImage):
        opened.picture(3)


def test_pages_of_a_document_are_each_held_to_the_budget():
    pages = [Image.new("L", size) for size in ((20, 20), (200, 200))]
    opened = Frames(encoded(pages[0], "TIFF", save_all=True, append_images=pages[1:]), FIT, max_pixels=1000)
    assert opened.picture(0).width == 20
    with pytest.raises(BadImage) as caught:
        opened.picture(1)
    assert caught.value.status == "too-large"


def test_a_jpeg_has_one_picture_whatever_else_it_holds(photos):
    data = encoded(photos[0], "MPO", save_all=True, append_images=[photos[1]])
    assert Frames(data, FIT).count() == 1
    assert decode(data, FIT).width == 640


def test_decoders_name_the_version_of_pillow():
    from PIL import __version__

    assert decoders().startswith(f"pillow-{__version__}")
