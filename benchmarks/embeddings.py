"""A million embeddings of real crops of real images, made once, for benchmarks/search.py.

    python benchmarks/embeddings.py million.npy --images photos drawings --idx fashion-mnist

Crops of 15 to 70 % of the short side are cut at random places from every image file found, evenly, and one from each
picture of the IDX files (Fashion-MNIST); they are embedded as `index` does it. Without --model a small ViT (384 wide,
2 blocks, 32 px in 16-pixel patches) is first trained on a sample of the crops with DINO for a few minutes, because the
vectors of random weights lie closer together than any model's that one would search with. Writes float16 [n, 384],
unit length, in random order, each only once: crops of one colour are all alike. Seeded, but for a training that is
limited by time.
"""

import argparse
import gzip
import hashlib
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dinosearch.encoder import open_encoder
from dinosearch.images import BadImage, find_images, in_threads, n_cores, read_bytes
from dinosearch.images.decode import decode_rgb
from dinosearch.pretrain.bank import Survey
from dinosearch.pretrain.recipe import plan_recipe
from dinosearch.pretrain.run import Run
from dinosearch.vit.folder import ModelFolder, models_path
from dinosearch.vit.resolve import resolve_model

N_TRAINING_CROPS = 40_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help=".npy file to write")
    parser.add_argument("--images", type=Path, nargs="*", default=[], help="folders of image files")
    parser.add_argument("--idx", type=Path, nargs="*", default=[], help="folders with Fashion-MNIST's IDX files")
    parser.add_argument("--n", type=int, default=1_002_000, help="vectors: a million, and some to ask for")
    parser.add_argument("--model", help="name in models/ or folder of a model; without one, a small one is trained")
    parser.add_argument("--seed", type=int, default=0, help="of the crops")
    parser.add_argument("--minutes", type=float, default=3.0, help="of training, without --model")
    options = parser.parse_args()

    pictures = [image for folder in options.idx for image in idx_pictures(folder)]
    files = [folder / image.path for folder in options.images for image in find_images(folder).images]
    per_file = -(-int(1.1 * options.n - len(pictures)) // len(files))  # a tenth, or less, will be of one colour
    if options.model:
        model = resolve_model(options.model, models=models_path())
    else:
        model = train(options.out.with_suffix(".model"), files, pictures, minutes=options.minutes)
    embed(options.out, model, [*files, *pictures], per_file=per_file, n=options.n, seed=options.seed)


def idx_pictures(folder: Path) -> list[Image.Image]:
    pixels = [
        np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8, offset=16).reshape(-1, 28, 28)
        for path in sorted(folder.glob("*-images-idx3-ubyte.gz"))
    ]
    return [Image.fromarray(one) for part in pixels for one in part]


def crops(sources: list[Path | Image.Image], *, per_file: int, side: int, seed: int) -> Iterator[np.ndarray]:
    """uint8 [n, side, side, 3] of each file or picture."""

    def cut(numbered: tuple[int, Path | Image.Image]) -> np.ndarray:
        number, source = numbered
        random = np.random.default_rng([seed, number])
        if isinstance(source, Image.Image):
            image, n, smallest, largest = source.convert("RGB"), 1, 0.7, 1.0
        else:
            try:
                image, n, smallest, largest = decode_rgb(read_bytes(source)), per_file, 0.15, 0.7
            except BadImage:
                return np.empty((0, side, side, 3), np.uint8)
            image.thumbnail((256, 256), Image.Resampling.BILINEAR, reducing_gap=2.0)
        short, found = min(image.size), []
        for scale, x, y in random.random((n, 3)):
            edge = max(1.0, short * (smallest + (largest - smallest) * scale))
            left, top = x * (image.width - edge), y * (image.height - edge)
            box = (left, top, left + edge, top + edge)
            found.append(np.asarray(image.resize((side, side), Image.Resampling.BILINEAR, box=box)))
        return np.stack(found)

    yield from in_threads(cut, enumerate(sources), workers=n_cores())


def train(folder: Path, files: list[Path], pictures: list[Image.Image], *, minutes: float) -> ModelFolder:
    random = np.random.default_rng(0)
    some = [files[i] for i in random.permutation(len(files))[:4000]]
    few = [pictures[i] for i in random.permutation(len(pictures))[: N_TRAINING_CROPS // 8]]
    bank = np.concatenate(list(crops([*some, *few], per_file=N_TRAINING_CROPS // len(some), side=36, seed=1)))
    bank = np.ascontiguousarray(bank.transpose(0, 3, 1, 2))  # [n, 3, 36, 36]
    survey = Survey(len(bank), 36, 36, grey=False)
    overrides = {"image_size": 32, "patch_size": 16, "local_size": 16, "out_dim": 2048, "stripes": 1}
    recipe, _ = plan_recipe(survey, accelerator=False, overrides=overrides)
    recipe = replace(recipe, arch_kwargs=recipe.arch_kwargs | {"embed_dim": 384, "depth": 2, "num_heads": 6})
    torch.set_num_threads(n_cores())
    run = Run(recipe, seed=0, device=torch.device("cpu"))
    began, done, step, shown = time.monotonic(), 0.0, 0, 0.0
    while done < 1:
        chosen = random.integers(0, len(bank), recipe.batch_size)
        outcome = run.step(bank[chosen], np.ones(len(chosen), np.float32), step=step, done=done)
        step, done = step + 1, (time.monotonic() - began) / (60 * minutes)
        if done - shown > 0.1:
            shown = done
            print(f"{done:.0%} of the training, step {step}, loss {outcome.loss:.3f}", flush=True)
    return run.export(folder, trained={"method": "dino", "steps": step, "data": "crops"})


def embed(
    out: Path, model: ModelFolder, sources: list[Path | Image.Image], *, per_file: int, n: int, seed: int
) -> None:
    encoder = open_encoder(model, device="cpu")
    vectors = np.lib.format.open_memmap(out, "w+", np.float16, (n, encoder.dim))
    random = np.random.default_rng(seed)
    order = random.permutation(n)  # neighbours in a file would be crops of one image
    shuffled = [sources[i] for i in random.permutation(len(sources))]
    blocks = crops(shuffled, per_file=per_file, side=model.image_size, seed=seed)
    seen: set[bytes] = set()
    began = time.monotonic()
    for _, batch in encoder.stream((None, square) for block in blocks for square in block):
        for vector in batch.astype(np.float16):
            digest = hashlib.blake2b(vector.tobytes(), digest_size=8).digest()
            if digest not in seen and len(seen) < n:
                vectors[order[len(seen)]] = vector
                seen.add(digest)
                if len(seen) % 65536 == 0:
                    print(f"{len(seen)} of {n}, {len(seen) / (time.monotonic() - began):.0f} crops/s", flush=True)
        if len(seen) == n:
            break
    assert len(seen) == n, f"only {len(seen)} different crops: give more images"
    vectors.flush()


if __name__ == "__main__":
    main()
