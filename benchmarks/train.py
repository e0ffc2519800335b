"""How fast `train` learns, beside lightly-train and a plain torch loop, and what each has learnt after the same time.

    python -m venv lightly && lightly/bin/pip install lightly-train timm
    python benchmarks/train.py --idx fashion-mnist --peer-python lightly/bin/python
    python benchmarks/train.py --idx fashion-mnist --peer-python lightly/bin/python --minutes 10

All sides train one architecture of timm with the same sizes and numbers of crops, batch, head and precision, on the
same PNG files, with both cores of the machine, in turns, so that a busy machine slows all alike; the fastest round of
each counts. Every side is a process of its own: ours is `dinosearch train` as users call it, lightly-train has its own
trainer and loader with the workers that it chooses, the plain loop is in benchmarks/train_peers.py. images/s are
counted after the first three steps, so starting up and decoding ours in advance are in none of them. Memory is the
proportional set size (PSS) of the process with its children, highest of samples.

With --minutes every side runs once for so long in all of what it does after its start, and the k-NN accuracy (k = 20)
of its backbone, embedded by the same code, is measured on Fashion-MNIST's test images. Learning rates and schedules are
then each side's own.
"""

import argparse
import gzip
import json
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import numpy as np
from index import tree_memory
from PIL import Image

from dinosearch.images import n_cores

SHAPES = {
    "small": {
        "arch": "vit_tiny_patch16_224",
        "arch_kwargs": {"img_size": 28, "patch_size": 7, "embed_dim": 128, "depth": 4, "num_heads": 4},
        "image_size": 28,
        "local_size": 14,
        "local_crops": 4,
        "hidden": 512,
        "bottleneck": 128,
    },
    "tiny": {
        "arch": "vit_tiny_patch16_224",
        "arch_kwargs": {"img_size": 32, "patch_size": 4},
        "image_size": 32,
        "local_size": 16,
        "local_crops": 6,
        "hidden": 2048,
        "bottleneck": 256,
    },
}
"""The two models that were compared before: 4 blocks × 128 with 2 + 4 crops, and ViT-Ti/4 with 2 + 6."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--idx", type=Path, required=True, help="folder with Fashion-MNIST's IDX files")
    parser.add_argument("--peer-python", type=Path, help="Python that has lightly-train and timm")
    parser.add_argument("--shape", choices=SHAPES, default="small", help="architecture and crops; see SHAPES")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--local-crops", type=int, help="other than the shape's")
    parser.add_argument("--prototypes", type=int, default=1024)
    parser.add_argument("--precision", default="bf16-mixed", help="of lightly-train and the plain loop; or 32-true")
    parser.add_argument("--seconds", type=float, default=30.0, help="of each side in each round")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--minutes", type=float, help="train each side once for so long, then compare k-NN accuracy")
    parser.add_argument("--images", type=int, default=60_000, help="training images to write")
    parser.add_argument("--sides", nargs="+", choices=["ours", "lightly", "plain"])
    parser.add_argument("--json", type=Path, help="file for images/s of each side's fastest round, and k-NN accuracies")
    options = parser.parse_args()
    sides = options.sides or ["ours", *(["lightly"] if options.peer_python else []), "plain"]
    with tempfile.TemporaryDirectory() as temporary:
        job = SHAPES[options.shape] | {
            "images": str(write_images(Path(temporary) / "images", options.idx, options.images)),
            "batch": options.batch,
            "prototypes": options.prototypes,
            "precision": options.precision,
            "seconds": options.minutes * 60 if options.minutes else options.seconds,
            "epochs": 1000,
        }
        if options.local_crops is not None:
            job["local_crops"] = options.local_crops
        print(
            f"{job['arch']} {job['arch_kwargs']}, 2×{job['image_size']} + {job['local_crops']}×{job['local_size']} px, "
            f"batch {job['batch']}, {options.precision}, {options.images} images, {n_cores()} cores",
            flush=True,
        )
        measured: dict[str, list[dict]] = {side: [] for side in sides}
        for turn in range(1 if options.minutes else options.rounds):
            for side in sides:
                out = Path(temporary) / f"{side}-{turn}"
                out.mkdir()
                measured[side].append(run_side(side, job | {"out": str(out)}, options))
                print(f"round {turn + 1}, {side}: {measured[side][-1]}", file=sys.stderr, flush=True)
        knn = knn_of(measured, job, options.idx) if options.minutes else {}
        print_rows(measured, knn)
        if options.json:
            options.json.write_text(json.dumps({"images_per_second": fastest(measured), "knn": knn}))


def write_images(folder: Path, idx: Path, n: int) -> Path:
    folder.mkdir()
    for i, pixels in enumerate(read_images(idx, "train")[:n]):
        Image.fromarray(pixels).save(folder / f"{i:05}.png", compress_level=1)
    return folder


def read_images(idx: Path, split: str) -> np.ndarray:
    """uint8 [n, 28, 28]"""
    bytes_ = gzip.decompress((idx / f"{split}-images-idx3-ubyte.gz").read_bytes())
    return np.frombuffer(bytes_, np.uint8, offset=16).reshape(-1, 28, 28)


def read_labels(idx: Path, split: str) -> np.ndarray:
    return np.frombuffer(gzip.decompress((idx / f"{split}-labels-idx1-ubyte.gz").read_bytes()), np.uint8, offset=8)


def run_side(side: str, job: dict, options: argparse.Namespace) -> dict:
    environment = os.environ | {"LIGHTLY_TRAIN_EVENTS_DISABLED": "1", "OMP_NUM_THREADS": str(n_cores())}
    if side == "ours":
        output, peak = watched(our_command(job), environment, None)
        report = json.loads(output)
        weights = Path(job["out"]) / report["model"] / "weights.safetensors"
        return {
            "images_per_second": report["images_per_second"],
            "steps": report["steps"],
            "weights": str(weights),
            "MB": peak,
        }
    if side == "lightly" and options.minutes:
        # its schedules run over epochs: the speed of a trial says how many there will be
        trial = job | {"seconds": 45.0, "out": f"{job['out']}-trial"}
        speed = run_side(side, trial, argparse.Namespace(peer_python=options.peer_python, minutes=None))
        job = job | {"epochs": max(1, round(speed["images_per_second"] * job["seconds"] / options.images))}
    python = options.peer_python if side == "lightly" else sys.executable
    output, peak = watched(
        [str(python), str(Path(__file__).with_name("train_peers.py")), side], environment, json.dumps(job)
    )
    return json.loads(output.splitlines()[-1]) | {"MB": peak}


def our_command(job: dict) -> list[str]:
    sizes = {"img_size", "patch_size"}
    kwargs = {name: value for name, value in job["arch_kwargs"].items() if name not in sizes}
    options = {
        "--name": "ours",
        "--minutes": job["seconds"] / 60,
        "--arch": job["arch"],
        "--image-size": job["image_size"],
        "--patch-size": job["arch_kwargs"]["patch_size"],
        "--local-crops": job["local_crops"],
        "--batch-size": job["batch"],
        "--out-dim": job["prototypes"],
    }
    if job["local_crops"]:
        options["--local-size"] = job["local_size"]
    settings = {
        "arch_kwargs": json.dumps(kwargs),
        "head_hidden_dim": job["hidden"],
        "head_bottleneck_dim": job["bottleneck"],
        "drop_path_rate": 0,
    }
    if job["seconds"] > 120:
        settings["lr"] = 1e-3 * (job["batch"] / 64) ** 0.5  # a small model's, as the recipe has it without --arch
    command = [sys.executable, "-m", "dinosearch", "train", job["images"], "--json", "--device", "cpu"]
    command += [str(word) for option in options.items() for word in option]
    command += [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]
    return ["env", f"DINOSEARCH_MODELS={job['out']}", *command]


def watched(command: list[str], environment: dict[str, str], text: str | None) -> tuple[str, int]:
    """The output of a process, and the peak of the memory of all below it in MB."""
    peak = 0
    with (
        tempfile.TemporaryFile("w+") as log,
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=environment
        ) as process,
    ):
        ended = threading.Event()

        def sample() -> None:
            nonlocal peak
            while not ended.wait(0.5):
                peak = max(peak, tree_memory(process.pid))

        sampler = threading.Thread(target=sample)
        sampler.start()
        output, _ = process.communicate(text)
        ended.set()
        sampler.join()
        if process.returncode != 0:
            log.seek(0)
            sys.exit(f"{' '.join(command)} ended with {process.returncode}:\n{log.read()[-3000:]}")
    return output, round(peak / 1e6)


def knn_of(measured: dict[str, list[dict]], job: dict, idx: Path) -> dict[str, float]:
    """k-NN accuracy (k = 20) on the test images, by the class token of each side's backbone."""
    from dinosearch.query.probe import knn_vote

    labels = {split: read_labels(idx, split).astype(np.int64) for split in ("train", "t10k")}
    pictures = {split: read_images(idx, split) for split in ("train", "t10k")}
    found = {}
    for side, (run,) in measured.items():
        vectors = {split: embed(run["weights"], job, images) for split, images in pictures.items()}
        guess = knn_vote(vectors["train"], labels["train"], vectors["t10k"], k=20)
        found[side] = float((guess == labels["t10k"]).mean())
    return found


def embed(weights: str, job: dict, images: np.ndarray) -> np.ndarray:
    """Unit float32 [n, dim]; uint8 [n, 28, 28] resized bicubically where the model wants another size."""
    import timm
    import torch
    from safetensors.torch import load_file

    load = load_file if weights.endswith(".safetensors") else lambda path: torch.load(path, weights_only=True)
    vit = timm.create_model(job["arch"], num_classes=0, **job["arch_kwargs"])
    vit.load_state_dict(load(weights))
    vit.eval()
    mean, std = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    size = [job["image_size"]] * 2
    found = []
    with torch.inference_mode():
        for chunk in torch.from_numpy(images.copy()).split(512):
            pixels = torch.nn.functional.interpolate(
                chunk[:, None] / 255, size, mode="bicubic", antialias=True, align_corners=False
            )
            features = vit((pixels.clamp(0, 1) - mean) / std)
            found.append(torch.nn.functional.normalize(features, dim=1))
    return torch.cat(found).numpy()


def fastest(measured: dict[str, list[dict]]) -> dict[str, float]:
    """images/s"""
    return {side: max(run["images_per_second"] for run in runs) for side, runs in measured.items()}


def print_rows(measured: dict[str, list[dict]], knn: dict[str, float]) -> None:
    labels = {"ours": "dinosearch train", "lightly": "lightly-train", "plain": "plain torch loop"}
    rates = fastest(measured)
    print(f"{'':<20} {'images/s':>9} {'ours to it':>11} {'peak MB':>8} {'k-NN':>7}")
    for side, rate in rates.items():
        ratio = f"{rates['ours'] / rate:.2f}" if "ours" in rates else ""
        peak = max(run["MB"] for run in measured[side])
        accuracy = f"{knn[side]:.4f}" if side in knn else ""
        print(f"{labels[side]:<20} {rate:>9.1f} {ratio:>11} {peak:>8} {accuracy:>7}")


if __name__ == "__main__":
    main()
