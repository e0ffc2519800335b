"""Image files and their pixels: find them, read them, decode them into squares. Knows no models and no torch."""

from dinosearch.images.decode import (
    BadImage,
    Fit,
    Frames,
    Picture,
    content_hash,
    decode,
    decode_rgb,
    decoders,
    pixel_budget,
)
from dinosearch.images.find import find_images
from dinosearch.images.machine import compiler_present, memory_bytes, n_cores
from dinosearch.images.read import in_threads, read_bytes, read_stable
from dinosearch.images.source import FoundImage, Scan, StableBytes

__all__ = [
    "BadImage",
    "Fit",
    "FoundImage",
    "Frames",
    "Picture",
    "Scan",
    "StableBytes",
    "compiler_present",
    "content_hash",
    "decode",
    "decode_rgb",
    "decoders",
    "find_images",
    "in_threads",
    "memory_bytes",
    "n_cores",
    "pixel_budget",
    "read_bytes",
    "read_stable",
]
