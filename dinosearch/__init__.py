"""dinosearch: teach a vision transformer from your own images, index them, and search and probe by likeness."""

__version__ = "0.1.0"
