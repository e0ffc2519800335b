"""Make a folder of equal photographs from any that you have: centres of 4:3, 500×375, JPEG.

    python benchmarks/photographs.py 600 ~/Pictures --to /tmp/photos600

So anyone can repeat the figures of benchmarks/index.py. Where there are fewer photographs than wanted, further ones are
crops of them: corners and mirrored, no two files alike.
"""

import argparse
import itertools
import random
from pathlib import Path

from PIL import Image, ImageOps

from dinosearch.images import BadImage, decode_rgb, find_images, read_bytes

SIZE = (500, 375)
CENTRE = (0.5, 0.5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("n", type=int, help="how many")
    parser.add_argument("folders", type=Path, nargs="+", help="folders with photographs")
    parser.add_argument("--to", type=Path, required=True, help="folder to make")
    parser.add_argument("--quality", type=int, default=90, help="of the JPEGs")
    options = parser.parse_args()
    options.to.mkdir(parents=True)
    n = 0
    for image in itertools.islice(cuts(options.folders), options.n):
        image.save(options.to / f"{n:06d}.jpg", quality=options.quality)
        n += 1
    print(f"{n} photographs in {options.to}")


def cuts(folders: list[Path]):
    paths = [folder / found.path for folder in folders for found in find_images(folder).images]
    random.Random(0).shuffle(paths)
    anchors = [CENTRE, (0.0, 0.0), (1.0, 1.0), (1.0, 0.0), (0.0, 1.0)]
    for mirrored, anchor in itertools.product((False, True), anchors):
        for path in paths:
            try:
                image = decode_rgb(read_bytes(path))
            except BadImage:
                continue
            if image.width < SIZE[0] or image.height < SIZE[1]:
                continue
            if anchor != CENTRE:  # three quarters of the picture, else corners would be no other than the centre
                image = ImageOps.fit(image, (image.width * 3 // 4, image.height * 3 // 4), centering=anchor)
            image = ImageOps.fit(image, SIZE, Image.Resampling.LANCZOS)
            yield ImageOps.mirror(image) if mirrored else image


if __name__ == "__main__":
    main()
