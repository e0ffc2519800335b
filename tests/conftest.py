"""Small real things that many tests share: JPEGs of photos and digits, and a model of two blocks."""

import io
import signal
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

signal.signal(signal.SIGINT, signal.default_int_handler)
"""A shell's background jobs ignore it, and what they start does too: commands that a test interrupts would go on."""


@pytest.fixture(scope="session")
def photos() -> list[Image.Image]:
    """The two photos that scikit-learn brings: 640 × 427, RGB."""
    from sklearn.datasets import load_sample_images

    return [Image.fromarray(pixels) for pixels in load_sample_images().images]


@pytest.fixture(scope="session")
def jpeg_folder(tmp_path_factory: pytest.TempPathFactory, photos: list[Image.Image]) -> Path:
    """24 JPEGs in three folders, one per label: china, flower (crops of the photos) and digit. Do not write to it."""
    from sklearn.datasets import load_digits

    root = tmp_path_factory.mktemp("images")
    digits = load_digits().images
    random = np.random.default_rng(0)
    for i in range(8):
        for label, photo in zip(("china", "flower"), photos, strict=True):
            left, top = random.integers(0, 300), random.integers(0, 200)
            save(photo.crop((left, top, left + 320, top + 220)), root / label / f"{i}.jpg")
        digit = Image.fromarray((digits[i] * 15.9).astype(np.uint8)).resize((64, 64))
        save(digit, root / "digit" / f"{i}.jpg")
    return root


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory):
    """A random ViT of two blocks, 32 wide, that sees 32 pixels in 8-pixel patches. Its cache may be written."""
    import torch

    from dinosearch.vit.folder import ModelFacts, create_vit, save_model

    facts = ModelFacts(
        arch="vit_tiny_patch16_224",
        arch_kwargs={"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2},
        image_size=32,
    )
    torch.manual_seed(0)
    return save_model(tmp_path_factory.mktemp("models") / "tiny", create_vit(facts), facts, trained={"steps": 0})


def save(image: Image.Image, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
    return path


def encoded(image: Image.Image, form: str, **options: object) -> bytes:
    """The bytes of a file that holds the image."""
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()
