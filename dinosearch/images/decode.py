"""Bytes of an image file → a square of RGB pixels. Knows formats, orientation and size limits; no models.

`index`, `query` and training share it, so that the same picture always meets the model in the same way. What is done on
purpose: the content decides the format, not the name; the header is checked against a pixel budget before anything is
decoded; half an image is no image (never LOAD_TRUNCATED_IMAGES); EXIF orientation is applied; transparency is laid on
white; 16-bit and floating-point images are scaled, not clipped; of several frames or pages the first one counts, unless
others are asked for.
"""

import functools
import hashlib
import importlib
import importlib.util
import io
import math
import re
import struct
import zlib
from dataclasses import dataclass
from typing import Literal

import blake3
import numpy as np
from PIL import ExifTags, Image, ImageFile, features
from PIL import __version__ as pillow_version

from dinosearch.images.machine import memory_bytes

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
"""Pillow's decoders that may see foreign bytes; others (EPS runs Ghostscript) never do."""

HEIC_BRANDS = frozenset({b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1"})

FOREIGN = {
    "EPS": rb"%!PS|\xc5\xd0\xd3\xc6",
    "PDF": rb"%PDF",
    "PSD": rb"8BPS",
    "JPEG XL": rb"\xff\x0a|\x00\x00\x00\x0cJXL ",
    "JPEG 2000": rb"\xff\x4f\xff\x51|\x00\x00\x00\x0cjP  ",
    "ICO": rb"\x00\x00[\x01\x02]\x00",
    "ICNS": rb"icns",
    "DDS": rb"DDS ",
    "OpenEXR": rb"v/1\x01",
    "FITS": rb"SIMPLE  =",
    "ZIP": rb"PK\x03\x04",
    "SVG": rb"\s*(<\?xml[^>]*>\s*)?(<!--.*?-->\s*)?(<!DOCTYPE svg[^>]*>\s*)?<svg",
    "a film": rb"....ftyp|\x1a\x45\xdf\xa3|RIFF....AVI ",
}
"""What other files begin with, for a reason that helps."""

FULL_RANGES = {
    "I;16": ((0, 65535),),
    "I;16B": ((0, 65535),),
    "I;16L": ((0, 65535),),
    "I;16N": ((0, 65535),),
    "I": ((0, 255), (0, 65535)),
    "F": ((0, 1), (0, 255), (0, 65535)),
}
"""Of Pillow's modes beyond 8 bits: the ranges that mean black to white."""

PILLOW_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    TypeError,
    LookupError,
    ArithmeticError,
    AttributeError,
    RuntimeError,
    MemoryError,
    struct.error,
    zlib.error,
)
"""What Pillow's decoders let escape on malformed files."""

MANY_FRAMED = frozenset({"GIF", "PNG", "WEBP", "TIFF", "AVIF", "HEIF"})
"""Formats whose frames or pages are pictures of their own; what else a JPEG holds are previews and gain maps."""

PAD_COLOUR = (124, 116, 104)
"""Borders of "pad": ImageNet's mean colour, which is about zero after the usual normalisation."""

BYTES_PER_PIXEL = 12
"""Held at once while decoding: Pillow's 4 bytes per pixel, twice more while converting or laying on white."""
USUAL_PIXELS = 89_478_485
"""A quarter GiB of RGB, Pillow's own idea of the largest usual image: allowed whatever the number of workers."""
MOST_PIXELS = 2**29
"""Beyond this a file is an attack or needs tiling, however much memory there is."""

DRAFT_GAP = 2
"""JPEGs are decoded at a half, a quarter or an eighth if that leaves at least this many pixels per pixel wanted."""

RESAMPLING = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "lanczos": Image.Resampling.LANCZOS,
}

# The transposition that undoes each EXIF orientation (Exif 2.3, tag 0x0112).
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True)
class Fit:
    """How an image of any shape becomes a square."""

    image_size: int
    """Side of the square in pixels."""
    mode: str = "crop"
    """"crop": the centre; "pad": all of it, with borders; "squash": all of it, distorted."""
    crop_pct: float = 1.0
    """With "crop": share of the short side that is kept."""
    interpolation: str = "bicubic"
    """"bicubic", "bilinear" or "lanczos", always antialiased."""
    channels: int = 3
    """3 is RGB, whatever the file has; another number is that of a file's own bands or pages, as they are."""


@dataclass(frozen=True)
class Picture:
    """A decoded image, ready for the model."""

    pixels: np.ndarray
    """uint8 [S, S, channels], three of them RGB, read-only."""
    width: int
    """Of the original, upright, in pixels."""
    height: int
    """Of the original, upright, in pixels."""


class BadImage(Exception):
    """A file that has no usable pixels: a row to report, not a reason to stop."""

    def __init__(self, status: str, reason: str) -> None:
        super().__init__(f"{status}: {reason}")
        self.status = status
        """truncated, corrupt, too-large, unsupported or unreadable."""
        self.reason = reason
        """One line for people."""


def content_hash(data: bytes, algorithm: str = "blake3") -> str:
    """The identity of a file's content: 32 hex digits, of "blake3" or, as in older catalogs, "blake2b"."""
    if algorithm == "blake2b":
        return hashlib.blake2b(data, digest_size=16).hexdigest()
    assert algorithm == "blake3", algorithm
    return blake3.blake3(data).hexdigest(length=16)


def decode(data: bytes, fit: Fit, *, frame: int = 0, max_pixels: int | None = None) -> Picture:
    """The upright square of an image file, or of its frame or page `frame`, resampled straight from the source.

    `max_pixels` bounds width × height; None is the budget of a single worker. Raises BadImage.
    """
    if fit.channels != 3:
        from dinosearch.images.planes import decode_planes

        return decode_planes(data, fit, max_pixels=max_pixels)
    return Frames(data, fit, max_pixels=max_pixels).picture(frame)


class Frames:
    """An open image file, decoded frame by frame: each costs what lies between it and the one before."""

    def __init__(self, data: bytes, fit: Fit, *, max_pixels: int | None = None) -> None:
        """Reads the header only. Raises BadImage."""
        self._data = data
        self._fit = fit
        self._max_pixels = max_pixels
        self._image = open_image(data, max_pixels)

    def count(self) -> int:
        """How many frames or pages there are; 1 where they cannot be counted."""
        if self._image.format not in MANY_FRAMED:
            return 1
        try:
            return max(1, getattr(self._image, "n_frames", 1))
        except PILLOW_ERRORS:
            return 1

    def picture(self, frame: int = 0) -> Picture:
        """Decode one frame; going back in a file costs as much as going on from its beginning. Raises BadImage."""
        image = self._image
        if frame != image.tell():
            self._seek(frame)
        full_size = image.size
        box = None if frame else _draft(image, self._fit)
        orientation = load_image(image, self._data)
        if box is None:
            full_size = image.size  # Pillow turns TIFFs while loading
            box = full_size
        square = make_square(flatten(image), box, self._fit)
        # All boxes are centred, so turning the square is the same as turning the image, and far cheaper.
        upright = turn(square.convert("RGB"), orientation)
        width, height = full_size if orientation < 5 else full_size[::-1]
        return Picture(np.asarray(upright), width, height)

    def _seek(self, frame: int) -> None:
        try:
            self._image.seek(frame)
        except PILLOW_ERRORS as error:
            raise bad_image(self._data, error) from error
        except Image.DecompressionBombError as error:
            raise BadImage("too-large", _first_line(error)) from error
        check_size(self._image.size, self._max_pixels)  # pages of a document have sizes of their own


def decode_rgb(data: bytes, *, max_pixels: int | None = None) -> Image.Image:
    """The whole image, upright, mode RGB. Raises BadImage."""
    image = open_image(data, max_pixels)
    orientation = load_image(image, data)
    return turn(flatten(image).convert("RGB"), orientation)


@functools.cache
def decoders() -> str:
    """Names the set of decoders, in one line: what one set could not read, another may."""
    optional = [name for name in ("avif", "libtiff", "webp") if features.check(name)]
    return " ".join([f"pillow-{pillow_version}", *optional, *(["heif"] if _heif_installed() else [])])


@functools.cache
def pixel_budget(workers: int) -> int:
    """Pixels that one image may have when `workers` images are decoded at once, so that half the memory suffices.

    The usual image is allowed with any number of workers (they won't all meet such a one at once), if it fits alone.
    """
    alone = memory_bytes() // 2 // BYTES_PER_PIXEL
    return min(MOST_PIXELS, max(alone // workers, min(USUAL_PIXELS, alone)))


def open_image(data: bytes, max_pixels: int | None) -> ImageFile.ImageFile:
    """The image with its header read and nothing decoded.

    Calls Pillow's registered openers instead of `Image.open`, whose own limit is one global for the whole process.
    """
    if not data:
        raise BadImage("corrupt", "empty file")
    name = _sniff(data)
    factory, _ = Image.OPEN[name]
    try:
        image = factory(io.BytesIO(data), "")
    except PILLOW_ERRORS as error:
        raise bad_image(data, error) from error
    except Image.DecompressionBombError as error:
        raise BadImage("too-large", _first_line(error)) from error
    check_size(image.size, max_pixels)
    return image


def check_size(size: tuple[int, int], max_pixels: int | None) -> None:
    allowed = pixel_budget(1) if max_pixels is None else max_pixels
    width, height = size
    if width * height > allowed:
        raise BadImage("too-large", f"{width} × {height} pixels; at most {allowed / 1e6:.0f} million are decoded here")


def _sniff(data: bytes) -> str:
    """The name in Pillow's registry of the format that the content announces. Raises BadImage if none is read here."""
    if _is_heic(data):
        if not _heif_installed():
            raise BadImage("unsupported", "HEIC; to read it: pip install 'dinosearch[heif]'")
        return _register_heif()
    for name in FORMATS:
        importlib.import_module(f"PIL.{name.capitalize() if name != 'WEBP' else 'WebP'}ImagePlugin")
        _, accept = Image.OPEN[name]
        accepted = accept is None or accept(data[:16])
        if isinstance(accepted, str):  # the plugin is there, its library is not
            raise BadImage("unsupported", f"{name}, which this Pillow was built without; pip install -U pillow")
        if accepted:
            return name
    known = next((name for name, magic in FOREIGN.items() if re.match(magic, data, re.DOTALL)), None)
    if known:
        raise BadImage("unsupported", f"{known} is not among the formats read: {', '.join(FORMATS)}, HEIC")
    raise BadImage("corrupt", "not an image of any known format")


def _is_heic(data: bytes) -> bool:
    if data[4:8] != b"ftyp":
        return False
    end = min(int.from_bytes(data[:4], "big"), 256)
    brands = {data[i : i + 4] for i in range(8, end, 4)}
    return not brands & {b"avif", b"avis"} and bool(brands & HEIC_BRANDS)


@functools.cache
def _heif_installed() -> bool:
    return importlib.util.find_spec("pillow_heif") is not None


@functools.cache
def _register_heif() -> str:
    importlib.import_module("pillow_heif").register_heif_opener()
    return "HEIF"


def _draft(image: ImageFile.ImageFile, fit: Fit) -> tuple[float, float] | None:
    """Ask the JPEG decoder for a smaller image; its size in fractional pixels, or None if it stays as it is.

    Measured at 224 px: photos of 2 to 11 megapixels take a half to a third of the time; pixels differ by 0.4 levels
    on average and vectors by a cosine of 0.9999. A gap of 1 would be little faster and three times less exact.
    """
    width, height = image.size
    side = max(width, height) if fit.mode == "pad" else min(width, height) * _kept(fit)
    gap = side / (fit.image_size * DRAFT_GAP)
    if gap < 2 or image.format not in ("JPEG", "MPO"):
        return None
    drafted = image.draft(None, (math.ceil(width / gap), math.ceil(height / gap)))
    return None if drafted is None else drafted[1][2:]


def _kept(fit: Fit) -> float:
    return fit.crop_pct if fit.mode == "crop" else 1.0


def load_image(image: ImageFile.ImageFile, data: bytes) -> int:
    """Decode in place; the EXIF orientation that remains to be undone, 1 to 8."""
    try:
        image.load()
    except PILLOW_ERRORS as error:
        raise bad_image(data, error) from error
    except Image.DecompressionBombError as error:
        raise BadImage("too-large", _first_line(error)) from error
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except PILLOW_ERRORS:  # good pixels with broken metadata are a good image
        return 1
    return orientation if orientation in UPRIGHT else 1


def flatten(image: Image.Image) -> Image.Image:
    """Any mode → "RGB" or "L" (the same, three times cheaper to resample), transparency laid on white."""
    if image.mode in ("RGB", "L") and "transparency" not in image.info:
        return image
    try:
        if image.mode in FULL_RANGES:
            return Image.fromarray(to_8_bit(np.asarray(image), FULL_RANGES[image.mode]))
        if image.has_transparency_data:
            rgba = image.convert("RGBA")
            white = Image.new("RGB", image.size, "white")
            white.paste(rgba, mask=rgba.getchannel("A"))
            return white
        return image.convert("L" if image.mode == "1" else "RGB")
    except MemoryError as error:
        raise BadImage("too-large", "not enough memory to decode it") from error
    except PILLOW_ERRORS as error:
        raise BadImage("unsupported", f"pixels of mode {image.mode} ({_first_line(error)})") from error


def to_8_bit(values: np.ndarray, ranges: tuple[tuple[float, float], ...]) -> np.ndarray:
    """uint8, scaled from the first of `ranges` that holds every value, else from the values' own range."""
    values = np.nan_to_num(values.astype(np.float32), posinf=0, neginf=0)
    bottom, top = float(values.min()), float(values.max())
    low, high = next(((a, b) for a, b in ranges if a <= bottom and top <= b), (bottom, top))
    scaled = (values - low) * (255 / ((high - low) or 1))
    return np.rint(scaled).astype(np.uint8)


def make_square(image: Image.Image, size: tuple[float, float], fit: Fit) -> Image.Image:
    """[S, S] from the whole image, whose size in (perhaps fractional) pixels is `size`."""
    width, height = size
    target = fit.image_size
    resample = RESAMPLING[fit.interpolation]
    if fit.mode == "pad":
        scale = target / max(width, height)
        # Equal borders on both sides, so that the eight orientations pad alike.
        inner = [max(target % 2 or 2, target - 2 * round((target - x * scale) / 2)) for x in size]
        inner = [min(target, x) for x in inner]
        square = Image.new("RGB", (target, target), PAD_COLOUR)
        resized = image.resize((inner[0], inner[1]), resample, box=(0, 0, width, height))
        square.paste(resized, ((target - inner[0]) // 2, (target - inner[1]) // 2))
        return square
    side = min(width, height) * _kept(fit)
    x, y = ((width - side) / 2, (height - side) / 2) if fit.mode == "crop" else (0.0, 0.0)
    return image.resize((target, target), resample, box=(x, y, width - x, height - y))


def turn(image: Image.Image, orientation: int) -> Image.Image:
    return image.transpose(UPRIGHT[orientation]) if orientation in UPRIGHT else image


def bad_image(data: bytes, error: BaseException) -> BadImage:
    if isinstance(error, MemoryError):
        return BadImage("too-large", "not enough memory to decode it")
    reason = _first_line(error)
    if _ends_early(data) or "truncated" in reason.lower():
        return BadImage("truncated", reason)
    if "unknown pixel mode" in reason or "support" in reason:
        return BadImage("unsupported", reason)
    return BadImage("corrupt", reason)


def _ends_early(data: bytes) -> bool:
    """Whether the container says that more bytes should follow."""
    if data.startswith(b"\xff\xd8"):
        return b"\xff\xd9" not in data[-(2**16) :]
    if data.startswith(b"\x89PNG"):
        return b"IEND" not in data[-(2**16) :]
    if data.startswith(b"RIFF"):
        return len(data) < 12 or int.from_bytes(data[4:8], "little") + 8 > len(data)
    if data.startswith(b"GIF8"):
        return b"\x3b" not in data[-64:]
    if data.startswith(b"BM"):
        return len(data) < 26 or int.from_bytes(data[2:6], "little") > len(data)
    if data[:4] in (b"II*\0", b"MM\0*"):
        order: Literal["little", "big"] = "little" if data.startswith(b"II") else "big"
        return len(data) < 8 or int.from_bytes(data[4:8], order) >= len(data)
    if data[4:8] == b"ftyp":
        return _boxes_end(data) > len(data)
    return False


def _boxes_end(data: bytes) -> int:
    """Where the last top-level box of an ISO file (AVIF, HEIC) that is at least begun should end."""
    at = 0
    while at + 8 <= len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        if size == 1:
            size = int.from_bytes(data[at + 8 : at + 16], "big")
        if size < 8:  # 0: up to the end of the file
            return len(data)
        at += size
    return at


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
