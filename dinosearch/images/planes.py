"""An image with any number of channels → a square of them: the bands or pages of a file, as they are, no colours.

A microscope's or satellite's image is a TIFF whose pages, or whose samples, are the channels. 16-bit ones are scaled by
the range of their type, so that one image's brightness compares with another's; transparency is a band like others.
"""

import io
from importlib.util import find_spec

import numpy as np
from PIL import Image, ImageFile

from dinosearch.images.decode import (
    FULL_RANGES,
    PILLOW_ERRORS,
    BadImage,
    Fit,
    Picture,
    bad_image,
    check_size,
    flatten,
    load_image,
    make_square,
    open_image,
    to_8_bit,
    turn,
)

TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


def decode_planes(data: bytes, fit: Fit, *, max_pixels: int | None) -> Picture:
    """The upright square, uint8 [S, S, channels], of a file with just so many bands, else pages. Raises BadImage.

    One channel is what any image has: its brightness. `max_pixels` bounds width × height × channels.
    """
    most = None if max_pixels is None else max_pixels // fit.channels
    try:
        image = open_image(data, most)
    except BadImage as bad:
        if bad.status in ("unsupported", "corrupt") and data.startswith(TIFF_MAGIC):  # more bands than Pillow knows
            return _from(_tiff_samples(data, fit.channels, most), 1, fit)
        raise
    orientation = load_image(image, data)
    if fit.channels == 1:
        return _from([flatten(image).convert("L")], orientation, fit)
    bands = image.getbands()
    if len(bands) == fit.channels:
        return _from([flatten(band) for band in image.split()], orientation, fit)
    if len(bands) > 1:
        raise _other_number(len(bands), fit.channels)
    return _from(_pages(image, data, fit.channels, most), orientation, fit)


def tiff_decoders() -> list[str]:
    """Of the extra `tiff`, what is installed: part of the set of decoders that a bad file was tried with."""
    return [name for name in ("tifffile", "imagecodecs") if find_spec(name)]


def _pages(image: ImageFile.ImageFile, data: bytes, channels: int, max_pixels: int | None) -> list[Image.Image]:
    try:
        n_pages = getattr(image, "n_frames", 1)
        if n_pages != channels:
            raise _other_number(n_pages, channels)
        planes = []
        for page in range(channels):
            image.seek(page)
            check_size(image.size, max_pixels)
            load_image(image, data)
            planes.append(flatten(image).convert("L"))
    except PILLOW_ERRORS as error:
        raise bad_image(data, error) from error
    return planes


def _tiff_samples(data: bytes, channels: int, max_pixels: int | None) -> list[Image.Image]:
    """What one page holds, through tifffile."""
    try:
        import tifffile
    except ImportError:
        raise BadImage(
            "unsupported", "a TIFF of more bands than Pillow reads; to read it: pip install 'dinosearch[tiff]'"
        ) from None
    try:
        with tifffile.TiffFile(io.BytesIO(data)) as file:
            page = file.pages.first
            if page.samplesperpixel != channels:
                raise _other_number(page.samplesperpixel, channels)
            check_size((page.imagewidth, page.imagelength), max_pixels)
            values = page.asarray()
    except PILLOW_ERRORS as error:
        raise bad_image(data, error) from error
    if values.shape[0] != channels:
        values = np.moveaxis(values, -1, 0)
    if values.ndim != 3 or values.dtype.kind not in "uif":
        raise BadImage("unsupported", f"a TIFF of shape {values.shape} and type {values.dtype}")
    ranges = {"u1": ((0.0, 255.0),), "u2": FULL_RANGES["I;16"]}.get(values.dtype.str[1:], FULL_RANGES["F"])
    return [Image.fromarray(to_8_bit(plane, ranges)) for plane in values]


def _from(planes: list[Image.Image], orientation: int, fit: Fit) -> Picture:
    size = planes[0].size
    if any(plane.size != size for plane in planes):
        raise BadImage("unsupported", "its pages have different sizes, and can be no channels of one image")
    squares = [turn(make_square(plane, size, fit).convert("L"), orientation) for plane in planes]
    width, height = size if orientation < 5 else size[::-1]
    return Picture(np.stack([np.asarray(square) for square in squares], axis=-1), width, height)


def _other_number(found: int, wanted: int) -> BadImage:
    return BadImage("unsupported", f"{found} channel{'s' * (found != 1)}, and the model takes {wanted}")
