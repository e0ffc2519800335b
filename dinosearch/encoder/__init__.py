"""Images → unit vectors, on any device. Knows nothing of folders, labels or FAISS."""

from dinosearch.encoder.encoder import Encoder, open_encoder

__all__ = ["Encoder", "open_encoder"]
