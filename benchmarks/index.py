"""How fast a folder of photographs becomes an index, beside what the model and decoding alone allow, in one run.

    python benchmarks/photographs.py 600 ~/Pictures --to /tmp/photos600
    python benchmarks/index.py /tmp/photos600 --arch vit_small_patch16_224 --image-size 224

Measured in rounds that alternate, so that a busy machine slows all alike; the fastest round of each counts:
  script   what people write: timm in float32, torch's DataLoader with one worker per core, timm's own transforms
  model    the engine alone, fed from memory, through the same stream that indexing uses
  decode   the processes alone: read, hash, decode, resize
  index    files to a finished index: scan, read, decode, encode, catalog, FAISS file; a new index each time
`limit` is what model and decode allow together when both use all cores, 1 / (1/model + 1/decode). Starting the engine
is in none of them. Weights are random, which is all the same to speed. Memory is the proportional set size (PSS) of the
process with its children, highest of samples during index, in a process of its own.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np

from dinosearch.images import find_images, n_cores, pixel_budget
from dinosearch.images.workers import DecodePool

BATCH = 32
_SAMPLED_EVERY = 0.5  # seconds; to ask the system for a process's memory takes it milliseconds, from the same cores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder of photographs")
    parser.add_argument("--arch", default="vit_small_patch16_224", help="timm's name of the architecture")
    parser.add_argument("--image-size", type=int, default=224, help="side of the square in pixels")
    parser.add_argument("--device", default="auto", help="of model and index")
    parser.add_argument("--precision", default="auto", help="of model and index; int8 is calibrated by the photographs")
    parser.add_argument("--images", type=int, help="use so many images of the folder; all without")
    parser.add_argument("--script-images", type=int, default=128, help="of them for the script, which is slow")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--without-script", action="store_true", help="leave out the slow part")
    parser.add_argument("--index-only", type=Path, help=argparse.SUPPRESS)  # MODEL: the process that is measured
    options = parser.parse_args()
    if options.index_only:
        print(json.dumps(index_once(options.folder, options.index_only, options)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = some_of(options.folder, options.images, Path(temporary))
        print_rows(measure(folder, Path(temporary), options), folder, options)


def some_of(folder: Path, n: int | None, temporary: Path) -> Path:
    """The folder, or one of links to its first `n` images."""
    if n is None:
        return folder
    (temporary / "photographs").mkdir()
    for found in find_images(folder).images[:n]:
        (temporary / "photographs" / found.path.replace("/", "_")).symlink_to((folder / found.path).resolve())
    return temporary / "photographs"


def measure(folder: Path, temporary: Path, options: argparse.Namespace) -> dict[str, list[float]]:
    from dinosearch.encoder import open_encoder

    model = random_model(temporary, options.arch, options.image_size)
    paths = [str(folder / found.path) for found in find_images(folder).images]
    plain = open_encoder(model, device=options.device)
    encoder = plain
    if options.precision != "auto":
        sample = partial(decoded, paths, plain)
        encoder = open_encoder(model, device=options.device, precision=options.precision, sample=sample)
        print(f"mean cosine to {plain.engine}: {agreement(plain, encoder, sample(64)):.4f}", flush=True)
    rates: dict[str, list[float]] = {"script": [], "model": [], "decode": [], "index": [], "MB": []}
    for _ in range(options.rounds):
        if not options.without_script:
            rates["script"].append(script(model, paths[: options.script_images]))
        rates["decode"].append(decode_only(paths, encoder))
        rates["model"].append(model_only(encoder, len(paths)))
        rate, megabytes = index_in_a_process(folder, model.path, options)
        rates["index"].append(rate)
        rates["MB"].append(megabytes)
    return rates


def decoded(paths: list[str], encoder, n: int) -> np.ndarray:
    """uint8 [n, side, side, 3]"""
    with DecodePool(encoder.fit, workers=1, max_pixels=pixel_budget(1)) as pool:
        found = []
        for path in paths[:n]:
            with pool.read(path) as file:
                found.append(file.decode().pixels)
        return np.stack(found)


def agreement(one, other, pixels: np.ndarray) -> float:
    """Mean cosine of two encoders' vectors."""
    return float((one.encode(pixels) * other.encode(pixels)).sum(axis=1).mean())


def random_model(temporary: Path, arch: str, image_size: int):
    import torch

    from dinosearch.vit.folder import ModelFacts, create_vit, save_model

    facts = ModelFacts(arch, {"img_size": image_size}, image_size)
    torch.manual_seed(0)
    return save_model(temporary / "random", create_vit(facts), facts, trained={})


def script(model, paths: list[str]) -> float:
    """The plain script, in a process of its own as it would be, from the first batch to the last vector."""
    code = """
import sys, time, json, torch, timm
from PIL import Image
from torch.utils.data import DataLoader, Dataset
arch, image_size, n_cores, paths = json.loads(sys.stdin.read())
torch.set_num_threads(n_cores)
vit = timm.create_model(arch, pretrained=False, num_classes=0, img_size=image_size).eval()
transform = timm.data.create_transform(**timm.data.resolve_data_config(vit.pretrained_cfg, model=vit))
class Files(Dataset):
    def __len__(self): return len(paths)
    def __getitem__(self, i): return transform(Image.open(paths[i]).convert("RGB"))
with torch.inference_mode():
    vit(torch.zeros(32, 3, image_size, image_size))
    began, found = time.perf_counter(), []
    for batch in DataLoader(Files(), batch_size=32, num_workers=n_cores):
        found.append(torch.nn.functional.normalize(vit(batch), dim=1))
    torch.cat(found).numpy()
print(len(paths) / (time.perf_counter() - began))
"""
    job = json.dumps([model.arch, model.image_size, n_cores(), paths])
    environment = os.environ | {"OMP_NUM_THREADS": str(n_cores())}
    done = subprocess.run([sys.executable, "-c", code], input=job, env=environment, **CAPTURED)
    return float(done.stdout)


CAPTURED = {"stdout": subprocess.PIPE, "text": True, "check": True}


def decode_only(paths: list[str], encoder) -> float:
    def square(path: str) -> None:
        with pool.read(path) as file:
            file.decode()

    workers = n_cores()
    pool = DecodePool(encoder.fit, workers=workers, max_pixels=pixel_budget(workers))
    with pool, ThreadPoolExecutor(workers) as threads:
        list(threads.map(square, paths[: 2 * workers]))
        began = time.perf_counter()
        list(threads.map(square, paths))
        return len(paths) / (time.perf_counter() - began)


def model_only(encoder, n: int) -> float:
    side = encoder.fit.image_size
    pixels = np.random.default_rng(0).integers(0, 256, (64, side, side, 3), dtype=np.uint8)
    encoder.encode(pixels)
    began = time.perf_counter()
    done = sum(len(keys) for keys, _ in encoder.stream((None, pixels[i % 64]) for i in range(n)))
    return done / (time.perf_counter() - began)


def index_in_a_process(folder: Path, model: Path, options: argparse.Namespace) -> tuple[float, float]:
    """Images/s and the peak of the memory in MB, of a process that does nothing else."""
    command = [sys.executable, __file__, str(folder), "--device", options.device, "--precision", options.precision]
    command += ["--index-only", str(model)]
    peak = 0
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        ended = threading.Event()

        def sample() -> None:
            nonlocal peak
            while not ended.wait(_SAMPLED_EVERY):
                peak = max(peak, tree_memory(process.pid))

        sampler = threading.Thread(target=sample)
        sampler.start()
        output, _ = process.communicate()
        ended.set()
        sampler.join()
    assert process.returncode == 0
    return json.loads(output), peak / 1e6


def tree_memory(pid: int) -> int:
    """Bytes of a process and all below it, what they share counted once (Linux; 0 elsewhere)."""
    total = 0
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                total += int(line.split()[1]) * 1024
        children = {child for path in Path(f"/proc/{pid}/task").iterdir() for child in _children_of(path)}
    except OSError:
        return total
    return total + sum(tree_memory(child) for child in children)


def _children_of(task: Path) -> list[int]:
    return [int(word) for word in (task / "children").read_text().split()]


def index_once(folder: Path, model_path: Path, options: argparse.Namespace) -> float:
    from dinosearch.encoder import open_encoder
    from dinosearch.index.sync import sync_index
    from dinosearch.vit.folder import open_model

    model = open_model(model_path)
    with tempfile.TemporaryDirectory() as temporary:
        progress = sync_index(
            [folder],
            index_path=Path(temporary) / "index",
            model=model,
            encoder_for=lambda plan: open_encoder(
                model,
                device=options.device,
                planned_images=plan.images,
                precision=plan.precision,
                sample=plan.sample,
            ),
            precision=options.precision,
        )
        *_, last = progress
    assert last.summary.failed == 0
    return last.summary.embedded / (last.summary.new / last.summary.images_per_second)


def print_rows(rates: dict[str, list[float]], folder: Path, options: argparse.Namespace) -> None:
    best = {name: max(values, default=0.0) for name, values in rates.items()}
    limit = 1 / (1 / best["model"] + 1 / best["decode"])
    n = len(find_images(folder).images)
    print(f"{n} images, {options.arch} at {options.image_size} px, {n_cores()} cores, best of {options.rounds} rounds")
    print(f"{'':<32} {'images/s':>9} {'to script':>10}")
    for name, label in [
        ("script", "script: timm fp32 + DataLoader"),
        ("model", "model only"),
        ("decode", "decode only"),
        ("index", "index: files to index"),
    ]:
        ratio = f"{best[name] / best['script']:>10.2f}" if best["script"] else ""
        print(f"{label:<32} {best[name]:>9.1f} {ratio}")
    print(f"{'limit of model and decode':<32} {limit:>9.1f}")
    print(f"share of the limit reached: {best['index'] / limit:.1%}")
    print(f"peak memory of index: {best['MB']:.0f} MB")


if __name__ == "__main__":
    main()
