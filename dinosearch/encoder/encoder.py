"""One encoder in front of several engines: squares of pixels → unit vectors, in batches and in order."""

import ctypes
import platform
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Protocol, TypeVar

import numpy as np

from dinosearch.errors import DinosearchError, UsageError
from dinosearch.images import Fit
from dinosearch.vit.folder import ModelFolder, Note

if TYPE_CHECKING:
    from dinosearch.encoder.quantization import Sample

T = TypeVar("T")

PRECISIONS = ("auto", "fp32", "bf16", "int8")
"""What the model may compute in: auto is bf16 where the device has it, else fp32."""

FEW_IMAGES = 16
"""Up to so many images the processor has answered before torch and CUDA have started (about 5 s)."""


class Engine(Protocol):
    """Runs one model on one device."""

    name: str
    """For people: library, precision, device."""
    batch: int
    """Images per call of `start`, at most."""
    in_flight: int
    """Calls of `start` that keep the device busy while the oldest result is awaited and used."""

    def start(self, pixels: np.ndarray) -> Callable[[], np.ndarray]:
        """uint8 [n, S, S, channels] → a function that waits for the vectors, float32 [n, dim] of any length."""


class Encoder:
    """A model on a device. Several streams may run at once, also from several threads."""

    def __init__(self, model: ModelFolder, engine: Engine) -> None:
        self.model = model
        self.fingerprint = model.fingerprint
        self.dim = model.dim
        self.fit = Fit(model.image_size, model.fit, model.crop_pct, model.interpolation, model.channels)
        """How `dinosearch.images.decode` makes the squares that this encoder takes."""
        self.engine = engine.name
        """For people, such as "OpenVINO bf16, 2 threads"."""
        self._engine = engine

    def encode(self, pixels: np.ndarray) -> np.ndarray:
        """uint8 [n, S, S, channels] → float32 [n, dim], each of unit length; n may be 0. Three channels are RGB."""
        side = self.fit.image_size
        assert pixels.dtype == np.uint8
        assert pixels.shape[1:] == (side, side, self.fit.channels)
        parts = [vectors for _, vectors in self.stream((None, one) for one in pixels)]
        return np.concatenate(parts) if parts else np.empty((0, self.dim), np.float32)

    def stream(self, pictures: Iterable[tuple[T, np.ndarray]]) -> Iterator[tuple[list[T], np.ndarray]]:
        """(key, uint8 [S, S, channels]) one by one → batches of keys with their vectors, float32 [n, dim], in order.

        Reads ahead no further than the engine needs to stay busy: at most `in_flight` + 1 batches are held.
        """
        running: deque[tuple[list[T], Callable[[], np.ndarray]]] = deque()
        for keys, pixels in _batches(pictures, self._engine.batch):
            running.append((keys, self._engine.start(pixels)))
            if len(running) >= self._engine.in_flight:
                done, wait = running.popleft()
                yield done, _unit(wait())
        while running:
            done, wait = running.popleft()
            yield done, _unit(wait())


def open_encoder(
    model: ModelFolder,
    *,
    device: str = "auto",
    planned_images: int | None = None,
    precision: str = "auto",
    sample: "Sample | None" = None,
    note: Note | None = None,
) -> Encoder:
    """The engine that suits the device: OpenVINO on the processor, torch on a GPU.

    `device` is auto, cpu, cuda, cuda:N or mps; "torch-cpu" is torch on the processor, which is also what remains where
    OpenVINO cannot be imported. `planned_images`, if known, tells whether starting a GPU or compiling repays itself.
    `precision` is one of PRECISIONS; what cannot be had becomes auto. int8, on the processor only, uses the form in the
    model's cache, which is made from `sample` if there is none. Vectors of all precisions agree (mean cosine of 0.995
    to fp32 or more), so an index may be asked in another one than made it.
    Raises UsageError for another device or precision, DinosearchError if the device is not there.
    """
    note = note or _silent
    check_precision(precision)
    kind = device.partition(":")[0]
    if kind not in ("auto", "cpu", "cuda", "mps", "torch-cpu") or (":" in device and not _is_cuda_number(device)):
        raise UsageError(f"no device {device!r}. Choose auto, cpu, cuda, cuda:N or mps")
    if kind == "auto":
        device = kind = _best_device(planned_images)
    if kind == "cpu":
        from dinosearch.encoder.conversion import import_openvino

        try:
            import_openvino()
        except ImportError as error:
            note(f"OpenVINO cannot be imported ({error}); using torch, which is slower to start and to run")
            device = "torch-cpu"
        else:
            return Encoder(model, _openvino_engine(model, _few(planned_images), precision, sample, note))
    from dinosearch.encoder.torch_engine import TorchEngine, is_present

    if not is_present(device):
        raise DinosearchError(f"torch sees no {device} here. Use --device cpu, or mend the driver or torch's build")
    if precision == "int8":
        if sample:
            note(f"int8 is for processors, through OpenVINO; {device} computes in its usual precision")
        precision = "auto"
    engine = TorchEngine(model, device=device, planned_images=planned_images, precision=precision, note=note)
    return Encoder(model, engine)


def check_precision(precision: str) -> None:
    """Raise UsageError if there is none of that name."""
    if precision not in PRECISIONS:
        raise UsageError(f"no precision {precision!r}. Choose {', '.join(PRECISIONS[:-1])} or {PRECISIONS[-1]}")


def _openvino_engine(model: ModelFolder, few: bool, precision: str, sample: "Sample | None", note: Note) -> Engine:
    if precision == "int8":
        from dinosearch.encoder.quantization import int8_engine

        if engine := int8_engine(model, few=few, sample=sample, note=note):
            return engine
        precision = "auto"
    from dinosearch.encoder.openvino_engine import OpenVINOEngine

    return OpenVINOEngine(model, few=few, precision=precision, note=note)


def _silent(_line: str) -> None:
    pass


def _is_cuda_number(device: str) -> bool:
    kind, _, number = device.partition(":")
    return kind == "cuda" and number.isdecimal()


def _few(planned_images: int | None) -> bool:
    return planned_images is not None and planned_images <= FEW_IMAGES


def _best_device(planned_images: int | None) -> str:
    """Asks the driver first: importing torch only to learn that there is no GPU would take longer than a query."""
    if _few(planned_images):
        return "cpu"
    wanted = "cuda" if _driver_sees_gpu() else "mps" if _is_apple() else "cpu"
    if wanted == "cpu":
        return wanted
    from dinosearch.encoder.torch_engine import is_present

    return wanted if is_present(wanted) else "cpu"


def _is_apple() -> bool:
    return sys.platform == "darwin" and platform.machine() == "arm64"


def _driver_sees_gpu() -> bool:
    """Whether NVIDIA's driver is installed and shows a GPU to this process (it minds CUDA_VISIBLE_DEVICES)."""
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return False
    n_gpus = ctypes.c_int(0)
    return driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(n_gpus)) == 0 and n_gpus.value > 0


def _batches(pictures: Iterable[tuple[T, np.ndarray]], size: int) -> Iterator[tuple[list[T], np.ndarray]]:
    keys: list[T] = []
    squares: list[np.ndarray] = []
    for key, pixels in pictures:
        keys.append(key)
        squares.append(pixels)
        if len(keys) == size:
            yield keys, np.stack(squares)
            keys, squares = [], []
    if keys:
        yield keys, np.stack(squares)


def _unit(vectors: np.ndarray) -> np.ndarray:
    """In float32 whatever the engine's precision, so that a vector's length is 1 to the last digit."""
    vectors = vectors.astype(np.float32)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
