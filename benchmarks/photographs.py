"""Make a folder of equal photographs from any that you have: crops of 4:3, 500×375, JPEG.

    python benchmarks/photographs.py 600 ~/Pictures --to /tmp/photos600

So anyone can repeat the figures of benchmarks/index.py. Each photograph gives about as many crops as the others, at
seeded places and scales of at least one pixel for one; no two files are alike, and none is of one colour.
"""

import argparse
import random
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from dinosearch.images import BadImage, content_hash, decode_rgb, find_images, read_bytes

WIDTH, HEIGHT = 500, 375
LEAST_CONTRAST = 12
"""Standard deviation of grey levels: below it there is sky or a wall."""
MOST_TRIES = 5
"""Per crop wanted of a photograph, before it is done with."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("n", type=int, help="how many")
    parser.add_argument("folders", type=Path, nargs="+", help="folders with photographs")
    parser.add_argument("--to", type=Path, required=True, help="folder to make")
    parser.add_argument("--quality", type=int, default=90, help="of the JPEGs")
    options = parser.parse_args()
    photographs = distinct(options.folders)
    options.to.mkdir(parents=True)
    seen: set[str] = set()
    for number, path in enumerate(photographs):
        wanted = -(-(options.n - len(seen)) // (len(photographs) - number))
        for data in crops(path, wanted, quality=options.quality, random=random.Random(number)):
            if content_hash(data) not in seen:
                (options.to / f"{len(seen):06d}.jpg").write_bytes(data)
                seen.add(content_hash(data))
    print(f"{len(seen)} photographs in {options.to}, of {len(photographs)}")


def distinct(folders: list[Path]) -> list[Path]:
    """Image files that are large enough, each content once."""
    found: dict[str, Path] = {}
    for folder in folders:
        for image in find_images(folder).images:
            path = folder / image.path
            with Image.open(path) as opened:
                if opened.width >= WIDTH and opened.height >= HEIGHT:
                    found.setdefault(content_hash(read_bytes(path)), path)
    return list(found.values())


def crops(path: Path, n: int, *, quality: int, random: random.Random) -> Iterator[bytes]:
    try:
        photograph = decode_rgb(read_bytes(path))
    except BadImage:
        return
    largest = min(photograph.width / WIDTH, photograph.height / HEIGHT)
    n_made = 0
    for _ in range(MOST_TRIES * n):
        scale = random.uniform(1, largest)
        width, height = scale * WIDTH, scale * HEIGHT
        left, top = random.uniform(0, photograph.width - width), random.uniform(0, photograph.height - height)
        crop = photograph.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC, (left, top, left + width, top + height))
        if np.asarray(crop.convert("L")).std() < LEAST_CONTRAST:
            continue
        file = BytesIO()
        crop.save(file, "JPEG", quality=quality)
        yield file.getvalue()
        n_made += 1
        if n_made == n:
            return


if __name__ == "__main__":
    main()
