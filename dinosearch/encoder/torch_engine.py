"""The GPU's engine: timm's ViT in torch, bf16 on CUDA, compiled only where that repays itself.

On the processor ("torch-cpu") it runs in float32: the reference that other engines are compared with, and what remains
where OpenVINO cannot be imported.

JPEGs are not decoded on the GPU, though torchvision could: another decoder gives other pixels, and a query, which may
come from a machine without a GPU, has to meet the model as the index did.
"""

from collections.abc import Callable

import numpy as np
import torch

from dinosearch.encoder.shortcut import skip_unread_tokens
from dinosearch.errors import DinosearchError
from dinosearch.images import compiler_present
from dinosearch.vit.folder import ModelFolder, Note

COMPILE_FROM = 1_000_000
"""Images that repay torch.compile: it takes about 40 s and makes a plain ViT on a large GPU a fifth faster, which at
20,000 images per second saves 10 s per million for ViT-S and a minute or more for ViT-B and larger."""

PIXELS_PER_BATCH = {"cuda": 256 * 224 * 224, "mps": 32 * 224 * 224, "cpu": 8 * 224 * 224}
MOST_PER_BATCH = 1024


class TorchEngine:
    """Vectors of whole batches; on CUDA, copies from pinned memory run beside the work, a partial batch is padded.

    `precision` is fp32, bf16 or auto: bf16 on CUDA GPUs that have it, fp32 elsewhere. Where memory is too short for a
    batch, it and all that follow are halved.
    """

    def __init__(
        self,
        model: ModelFolder,
        *,
        device: str,
        planned_images: int | None,
        note: Note,
        precision: str = "auto",
    ) -> None:
        self._device = torch.device("cpu" if device == "torch-cpu" else device)
        on_gpu = self._device.type == "cuda"
        has_bf16 = not on_gpu or torch.cuda.is_bf16_supported()
        if precision == "bf16" and not has_bf16:
            note("this GPU has no bf16; going on in fp32")
        in_bf16 = has_bf16 and (precision == "bf16" or (precision == "auto" and on_gpu))
        self._precision = torch.bfloat16 if in_bf16 else torch.float32
        model.verify()
        vit = model.load_vit()
        skip_unread_tokens(vit, channels=model.channels, image_size=model.image_size)
        vit = vit.to(self._device, self._precision)
        mean = torch.tensor(model.mean, device=self._device) * 255
        scale = 1 / (torch.tensor(model.std, device=self._device) * 255)

        def embed(pixels: torch.Tensor) -> torch.Tensor:
            normalised = (pixels.float() - mean) * scale  # [n, S, S, channels]
            return vit(normalised.permute(0, 3, 1, 2).to(self._precision)).float()  # [n, dim]

        self.batch = max(1, min(MOST_PER_BATCH, PIXELS_PER_BATCH[self._device.type] // model.image_size**2))
        self.in_flight = 3 if on_gpu else 1
        self._embed = embed
        self._note = note
        words = [f"torch {'bf16' if self._precision == torch.bfloat16 else 'fp32'} on {self._device}"]
        if on_gpu:
            words[0] += f" ({torch.cuda.get_device_name(self._device)})"
        if on_gpu and planned_images is not None and planned_images >= COMPILE_FROM:
            if compiler_present():
                note("compiling the model, once per run (about 40 s)")
                self._embed = torch.compile(embed)
                words.append("compiled")
            else:
                note("no C++ compiler found, so the model is not compiled and runs a little slower")
        self.name = ", ".join(words)

    def start(self, pixels: np.ndarray) -> Callable[[], np.ndarray]:
        """uint8 [n, S, S, channels] → a function that waits for float32 [n, dim].

        Raises DinosearchError when there is too little memory for a single image.
        """
        waits: list[Callable[[], np.ndarray]] = []
        done = 0
        while done < len(pixels):
            batch = self.batch  # another thread may halve it
            part = pixels[done : done + batch]
            try:
                waits.append(self._start(part, padded_to=batch))
            except torch.OutOfMemoryError as error:
                tried = batch if self._device.type == "cuda" else len(part)  # padded there
                if tried == 1:
                    raise DinosearchError(
                        f"{self._device} has too little memory for this model. Free some, use a smaller one, "
                        "or --device cpu"
                    ) from error
                self.batch = min(self.batch, tried // 2)
                self._note(f"{self._device} has too little memory for {tried} images at once: taking {self.batch}")
                if self._device.type == "cuda":
                    torch.cuda.empty_cache()
                continue
            done += len(part)
        return waits[0] if len(waits) == 1 else lambda: np.concatenate([wait() for wait in waits])

    def _start(self, pixels: np.ndarray, *, padded_to: int) -> Callable[[], np.ndarray]:
        n = len(pixels)
        with torch.inference_mode():
            if self._device.type != "cuda":
                vectors = self._embed(torch.from_numpy(pixels).to(self._device))
                return lambda: vectors.cpu().numpy()
            square = torch.empty((padded_to, *pixels.shape[1:]), dtype=torch.uint8, pin_memory=True)
            square[:n] = torch.from_numpy(pixels)
            square[n:] = 0
            with torch.cuda.device(self._device):
                on_gpu = self._embed(square.to(self._device, non_blocking=True))[:n]
                vectors = torch.empty(on_gpu.shape, pin_memory=True)
                vectors.copy_(on_gpu, non_blocking=True)
                ready = torch.cuda.Event()
                ready.record()

        def wait() -> np.ndarray:
            ready.synchronize()
            return vectors.numpy()

        return wait


def is_present(device: str) -> bool:
    """Whether torch can use the device: "torch-cpu", "cuda", "cuda:N" or "mps"."""
    kind, _, number = device.partition(":")
    if kind == "cuda":
        return torch.cuda.is_available() and int(number or 0) < torch.cuda.device_count()
    return kind != "mps" or torch.backends.mps.is_available()
