"""Multi-crop augmentation of a whole batch at once, on any device. Knows pixels only, no files and no model.

The operations and probabilities are those of DINO (arXiv 2104.14294, appendix; main_dino.py's DataAugmentationDINO):
random resized crop, flip, colour jitter, grayscale, blur, solarize. Every crop draws its own parameters; only the
order of the four jitter operations is drawn once per batch for each kind of crop, so that nothing waits for the GPU.
A crop is two small matrix products (rows × image × columns), which is exact antialiased bicubic resampling.
"""

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dinosearch.pretrain.distributed import ALONE, Team

ASPECT_RANGE = (3 / 4, 4 / 3)
CROP_TRIES = 10
"""Both as torchvision's RandomResizedCrop."""
SMALLEST_BLUR = 0.35
"""Standard deviation in pixels below which a Gaussian leaves an image as it is."""


@dataclass(frozen=True)
class ViewSettings:
    """How the crops of one image are made."""

    global_size: int = 224
    """Side of the two global crops in pixels; the image size of the model."""
    local_size: int = 96
    """Side of the local crops in pixels; a multiple of the patch size."""
    n_local: int = 8
    """Number of local crops: more is better and slower; 0 leaves only the global ones."""
    global_scale: tuple[float, float] = (0.4, 1.0)
    """Share of the image's area that a global crop covers."""
    local_scale: tuple[float, float] = (0.05, 0.4)
    """Share of the image's area that a local crop covers."""
    flip: float = 0.5
    """Probability of a left-right flip; 0 where left and right differ in meaning."""
    jitter: float = 0.8
    """Probability of colour jitter."""
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.2
    hue: float = 0.1
    """Strengths of the jitter, as torchvision's ColorJitter takes them."""
    grayscale: float = 0.2
    """Probability of losing all colour."""
    blur: tuple[float, float, float] = (1.0, 0.1, 0.5)
    """Probability of blur: first global, second global, local crops."""
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    """Standard deviation of the blur in pixels of a 224-pixel crop; smaller crops get proportionally less."""
    solarize: tuple[float, float, float] = (0.0, 0.2, 0.0)
    """Probability of solarizing: first global, second global, local crops."""
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)


def multi_crop(
    pixels: Tensor, aspect: Tensor, settings: ViewSettings, *, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Two global and n local crops of every image.

    pixels: uint8 [batch, channels, side, side], images squeezed into squares; 1 channel (grey) goes for all.
    aspect: float [batch], width / height of the images before that. generator: a CPU generator, on every device, so
    that equal seeds give equal crops everywhere.
    Returns normalised float32 [2, batch, channels, global_size, global_size] and [n_local, batch, …, local_size].
    """
    images = pixels.float() / 255.0
    globals_ = [_crops(images, aspect, settings, kind, n_each=1, generator=generator) for kind in (0, 1)]
    side, n_local = settings.local_size, settings.n_local
    if n_local == 0:
        return torch.stack(globals_), images.new_empty(0, len(images), len(settings.mean), side, side)
    local = _crops(images, aspect, settings, 2, n_each=n_local, generator=generator)
    return torch.stack(globals_), local.unflatten(0, (-1, n_local)).transpose(0, 1).contiguous()


def _crops(
    images: Tensor, aspect: Tensor, settings: ViewSettings, kind: int, *, n_each: int, generator: torch.Generator
) -> Tensor:
    """n_each crops of every image, one image's after another's: normalised float32 [n × n_each, channels, size, size].

    kind: 0 first global, 1 second global, 2 local.
    """
    local = kind == 2
    size = settings.local_size if local else settings.global_size
    scale = settings.local_scale if local else settings.global_scale
    box = crop_boxes(aspect.repeat_interleave(n_each), scale=scale, generator=generator)
    flip = _draw(len(box), generator) < settings.flip
    crops = resample(images, box, flip, size=size)
    crops = distort_colours(crops, settings, generator=generator)
    crops = blur(crops, settings.blur[kind], settings.blur_sigma, generator=generator)
    crops = solarize(crops, settings.solarize[kind], generator=generator)
    return normalise(crops, settings.mean, settings.std)


def crop_boxes(aspect: Tensor, *, scale: tuple[float, float], generator: torch.Generator) -> Tensor:
    """Random boxes [n, 4] as left, top, width, height in shares of the image, as torchvision's RandomResizedCrop.

    An area and an aspect ratio are drawn up to ten times until the box fits; else the largest central box of an
    allowed ratio is taken. Areas and ratios are meant in the image's true shape, of which `aspect` tells.
    """
    n = len(aspect)
    true = aspect.float().cpu()[:, None]
    area = _draw((n, CROP_TRIES), generator) * (scale[1] - scale[0]) + scale[0]
    low, high = (math.log(limit) for limit in ASPECT_RANGE)
    ratio = torch.exp(_draw((n, CROP_TRIES), generator) * (high - low) + low)
    width = torch.sqrt(area * ratio / true)
    height = torch.sqrt(area * true / ratio)
    fits = (width <= 1) & (height <= 1)
    first = fits.int().argmax(dim=1, keepdim=True)
    width, height = width.gather(1, first)[:, 0], height.gather(1, first)[:, 0]
    central = (true / true.clamp(*ASPECT_RANGE))[:, 0]  # > 1: too wide, keep its middle; < 1: too tall
    none = ~fits.any(dim=1)
    width = torch.where(none, (1 / central).clamp(max=1), width)
    height = torch.where(none, central.clamp(max=1), height)
    place = torch.where(none[:, None], 0.5, _draw((n, 2), generator))
    return torch.stack([place[:, 0] * (1 - width), place[:, 1] * (1 - height), width, height], dim=1)


def resample(images: Tensor, box: Tensor, flip: Tensor, *, size: int) -> Tensor:
    """Cut boxes [n × m, 4] (shares), m of each image, out of images [n, c, h, w], flip where asked, resize.

    Returns [n × m, c, size, size].
    """
    n, c, h, w = images.shape
    m = len(box) // n
    box = _on(images.device, box)
    columns = resampling_matrix(box[:, 0] * w, box[:, 2] * w, source=w, size=size)
    columns = torch.where(_on(images.device, flip)[:, None, None], columns.flip(1), columns)
    rows = resampling_matrix(box[:, 1] * h, box[:, 3] * h, source=h, size=size)
    # all crops of an image in one product, so that it need not be there m times
    across = torch.bmm(images.reshape(n, c * h, w), columns.reshape(n, m * size, w).transpose(1, 2))
    across = across.reshape(n, c, h, m, size).permute(0, 3, 2, 1, 4).reshape(n * m, h, c * size)
    down = torch.bmm(rows, across)  # [n × m, size, c × size]
    return down.reshape(n * m, size, c, size).transpose(1, 2).clamp(0, 1)


def resampling_matrix(start: Tensor, length: Tensor, *, source: int, size: int) -> Tensor:
    """Weights [n, size, source] that resize the pixels [start, start + length) of a line to `size` pixels.

    Bicubic with a = −0.5, widened when shrinking (antialias), as Pillow and torchvision define it. start, length: [n].
    """
    scale = (length / size)[:, None, None]
    centre = start[:, None, None] + (torch.arange(size, device=start.device)[None, :, None] + 0.5) * scale
    position = torch.arange(source, device=start.device)[None, None, :] + 0.5
    inside = (position > start[:, None, None] - 0.5) & (position < (start + length)[:, None, None] + 0.5)
    x = ((position - centre) / scale.clamp(min=1)).abs()
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    weight = torch.where(x < 1, near, torch.where(x < 2, far, 0.0)) * inside
    return weight / weight.sum(dim=2, keepdim=True)


def distort_colours(images: Tensor, settings: ViewSettings, *, generator: torch.Generator) -> Tensor:
    """Colour jitter and grayscale on [n, c, h, w] in 0..1. Grey images (c = 1) have no saturation and hue to change.

    Channels that are no colours (c other than 1 and 3) are each given a brightness and a contrast of their own: nothing
    ties the stains or bands of an image together as light ties red, green and blue.
    """
    n, channels = images.shape[:2]
    alone = channels if channels not in (1, 3) else 1
    chosen = _draw(n, generator) < settings.jitter

    def factor(strength: float) -> Tensor:
        drawn = 1 + strength * (2 * _draw((n, alone), generator) - 1)
        return _on(images.device, torch.where(chosen[:, None], drawn, 1.0))[:, :, None, None]

    brightness, contrast, saturation = (
        factor(strength) for strength in (settings.brightness, settings.contrast, settings.saturation)
    )
    turn = _on(images.device, torch.where(chosen, settings.hue * (2 * _draw(n, generator) - 1), 0.0))
    for operation in torch.randperm(4, generator=generator).tolist():
        if operation == 0:
            images = (images * brightness).clamp(0, 1)
        elif operation == 1:
            mean = (luma(images) if alone == 1 else images).mean(dim=(2, 3), keepdim=True)
            images = torch.lerp(mean, images, contrast).clamp(0, 1)
        elif operation == 2 and channels == 3:
            images = torch.lerp(luma(images).expand_as(images), images, saturation).clamp(0, 1)
        elif operation == 3 and channels == 3 and settings.hue > 0:
            images = turn_hue(images, turn)
    grey = _on(images.device, _draw(n, generator) < settings.grayscale)
    if channels == 3:
        images = torch.where(grey[:, None, None, None], luma(images), images)
    return images


def luma(images: Tensor) -> Tensor:
    """Brightness [n, 1, h, w] as ITU-R 601 weighs red, green and blue."""
    if images.shape[1] == 1:
        return images
    weights = _constant((0.299, 0.587, 0.114), images.device)
    return torch.einsum("nchw,c->nhw", images, weights)[:, None]


def turn_hue(images: Tensor, turn: Tensor) -> Tensor:
    """Shift the hue of [n, 3, h, w] in 0..1 by `turn` [n], in turns of the colour circle, through HSV."""
    value, _ = images.max(dim=1)
    low, _ = images.min(dim=1)
    chroma = value - low
    red, green, blue = images.unbind(dim=1)
    safe = chroma.clamp(min=1e-8)
    hue = torch.where(
        value == red,
        (green - blue) / safe,
        torch.where(value == green, 2 + (blue - red) / safe, 4 + (red - green) / safe),
    )
    hue = (hue / 6 + turn[:, None, None]) % 1.0
    # k = (n + 6h) mod 6, channel = v − c · max(0, min(k, 4 − k, 1)), n = 5, 3, 1 for red, green, blue
    k = (hue[:, None] * 6 + _constant((5.0, 3.0, 1.0), hue.device)[None, :, None, None]) % 6
    return value[:, None] - chroma[:, None] * torch.minimum(k, 4 - k).clamp(0, 1)


def blur(images: Tensor, probability: float, sigma_range: tuple[float, float], *, generator: torch.Generator) -> Tensor:
    """Gaussian blur of [n, c, size, size] with a random standard deviation, with the given probability."""
    n, c, size, _ = images.shape
    low, high = (sigma * size / 224 for sigma in sigma_range)
    chosen = _draw(n, generator) < probability
    sigma = _draw(n, generator) * (high - low) + low
    if probability == 0 or high < SMALLEST_BLUR:
        return images
    sigma = _on(images.device, torch.where(chosen, sigma, 1e-3))[:, None, None]
    at = torch.arange(size, device=images.device, dtype=torch.float32)
    kernel = torch.exp(-0.5 * ((at[:, None] - at[None, :])[None] / sigma) ** 2)
    kernel = kernel / kernel.sum(dim=2, keepdim=True)  # [n, size, size], symmetric but at the borders
    across = torch.bmm(images.reshape(n, c * size, size), kernel.transpose(1, 2)).reshape(n, c, size, size)
    return torch.matmul(kernel[:, None], across)


def solarize(images: Tensor, probability: float, *, generator: torch.Generator) -> Tensor:
    """Invert what is brighter than half, with the given probability per image."""
    chosen = _draw(len(images), generator) < probability
    if probability == 0:
        return images
    invert = _on(images.device, chosen)[:, None, None, None] & (images >= 128 / 255)
    return torch.where(invert, 1 - images, images)


def normalise(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """[n, 1 or channels, h, w] in 0..1 → [n, channels, h, w] as the model expects them."""
    mean_, std_ = (_constant(tuple(values), images.device)[:, None, None] for values in (mean, std))
    return (images - mean_) / std_


def _on(device: torch.device, drawn: Tensor) -> Tensor:
    """What the CPU drew, where it is needed; a GPU is not waited for."""
    return drawn.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else drawn.to(device)


@functools.cache
def _constant(values: tuple[float, ...], device: torch.device) -> Tensor:
    """float32, made once: to make a tensor of numbers waits for a GPU."""
    return torch.tensor(values, dtype=torch.float32, device=device)


class BatchGenerator(torch.Generator):
    """The CPU generator of a batch that a team shares: all draw for the whole batch, and each keeps its part.

    So the crops are those of one process, whatever the number of processes.
    """

    team: Team = ALONE


def _draw(shape: int | tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Uniform in 0..1, from the CPU's generator on every device. The first dimension is that of the images, or of crops
    in the order of their images."""
    n, *others = shape if isinstance(shape, tuple) else (shape,)
    team = generator.team if isinstance(generator, BatchGenerator) else ALONE
    return team.part(torch.rand((n * team.size, *others), generator=generator))
