"""Images per second of each engine on this machine, side by side: OpenVINO, torch in float32 and in bfloat16.

    python benchmarks/engines.py --arch vit_small_patch16_224 --image-size 224
    python benchmarks/engines.py --images photos/        # with OpenVINO's int8, which real images calibrate

Rounds of the engines alternate, so that a busy machine slows all alike; the fastest round of each counts. Pixels are
random, or of 64 images that calibrated nothing, and already decoded. Weights are random: all the same to speed.
`cosine` is to torch fp32, of all 64 squares and of the worst.
"""

import argparse
import json
import random
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from dinosearch.encoder.encoder import Encoder, open_encoder
from dinosearch.encoder.torch_engine import TorchEngine
from dinosearch.images import Fit, decode, n_cores
from dinosearch.vit.folder import ModelFacts, ModelFolder, create_vit, save_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="vit_small_patch16_224", help="timm's name of the architecture")
    parser.add_argument("--image-size", type=int, default=224, help="side of the square in pixels")
    parser.add_argument(
        "--arch-kwargs", type=json.loads, default={}, help='more arguments of timm, such as {"depth": 4}'
    )
    parser.add_argument("--images", type=Path, help="a folder of JPEGs: at least 128, better 320")
    parser.add_argument("--device", default="cpu", help="cpu, or cuda to compare torch there with OpenVINO here")
    parser.add_argument("--seconds", type=float, default=4.0, help="length of a round")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()

    torch.set_num_threads(n_cores())
    with tempfile.TemporaryDirectory() as folder:
        model = random_model(Path(folder), options.arch, options.image_size, options.arch_kwargs)
        device = "torch-cpu" if options.device == "cpu" else options.device
        encoders = [
            torch_encoder(model, device, "fp32"),
            torch_encoder(model, device, "bf16"),
            open_encoder(model, device="cpu"),
        ]
        pixels = np.random.default_rng(0).integers(0, 256, (64, *2 * [options.image_size], 3), dtype=np.uint8)
        if options.images:
            squares = squares_of(options.images, encoders[0].fit)
            pixels, rest = squares[:64], squares[64:]
            began = time.perf_counter()
            int8 = open_encoder(model, device="cpu", precision="int8", sample=lambda n: rest[:n], note=print)
            print(f"{int8.engine}: ready after {time.perf_counter() - began:.0f} s")
            encoders.append(int8)
        compare(encoders, pixels, seconds=options.seconds, rounds=options.rounds)


def random_model(folder: Path, arch: str, image_size: int, arch_kwargs: dict) -> ModelFolder:
    facts = ModelFacts(arch, {"img_size": image_size} | arch_kwargs, image_size)
    torch.manual_seed(0)
    return save_model(folder / "random", create_vit(facts), facts, trained={})


def torch_encoder(model: ModelFolder, device: str, precision: str) -> Encoder:
    return Encoder(model, TorchEngine(model, device=device, planned_images=None, note=print, precision=precision))


def squares_of(folder: Path, fit: Fit) -> np.ndarray:
    paths = sorted(folder.glob("*.jpg"))
    random.Random(0).shuffle(paths)
    return np.stack([decode(path.read_bytes(), fit).pixels for path in paths[:320]])


def compare(encoders: list[Encoder], pixels: np.ndarray, *, seconds: float, rounds: int) -> None:
    vectors = [encoder.encode(pixels) for encoder in encoders]  # warms up, too
    best = [0.0] * len(encoders)
    for _ in range(rounds):
        for i, encoder in enumerate(encoders):
            best[i] = max(best[i], images_per_second(encoder, pixels, seconds))
    print(f"{encoders[0].model.arch} at {pixels.shape[1]} px, {n_cores()} cores")
    print(f"{'engine':<44} {'images/s':>9} {'ratio':>6} {'cosine':>8} {'least':>8}")
    for encoder, speed, found in zip(encoders, best, vectors, strict=True):
        cosines = (found * vectors[0]).sum(1)
        print(
            f"{encoder.engine:<44} {speed:>9.1f} {speed / best[0]:>6.2f} {cosines.mean():>8.5f} {cosines.min():>8.5f}"
        )


def images_per_second(encoder: Encoder, pixels: np.ndarray, seconds: float) -> float:
    """Through `Encoder.stream`, as indexing does, from the first picture to the last vector."""
    began = time.perf_counter()

    def pictures():
        while time.perf_counter() - began < seconds:
            yield from ((None, one) for one in pixels)

    n = sum(len(keys) for keys, _ in encoder.stream(pictures()))
    return n / (time.perf_counter() - began)


if __name__ == "__main__":
    main()
