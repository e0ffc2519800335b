"""The processor's engine: a converted ViT in OpenVINO, bf16 where the chip has it. Imports no torch once converted.

Measured with ViT-S/16 at 224 px on two cores: to read and compile the converted form takes 0.2 to 0.3 s, and 0.1 s with
OpenVINO's own cache of compiled models, which is therefore kept beside it. Partial batches are not padded: a dynamic
batch runs as fast as a fixed one.
"""

import contextlib
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from dinosearch.encoder.cache import discard
from dinosearch.encoder.conversion import converted_path, import_openvino, last_line
from dinosearch.errors import DinosearchError
from dinosearch.images import n_cores
from dinosearch.vit.folder import ModelFolder, Note

PIXELS_PER_BATCH = 8 * 224 * 224
"""Batches of 1 to 16 images of 224 px were equally fast: few, so that an interrupt or a query need not wait long."""
MOST_PER_BATCH = 32
"""Of 28-pixel images: enough to drown the cost of a call; 256 were slower by a tenth."""


class OpenVINOEngine:
    """Vectors of whole batches, several requests at once. `few` images: all cores on one request, for latency.

    `precision` is auto (bf16 where the chip has it), fp32 or bf16; or int8, for which `form` gives the quantised form,
    what it leaves in floating point runs as with auto. `form` is the folder that is run, made if need be; it is called
    again if what it gave cannot be read.
    """

    def __init__(
        self,
        model: ModelFolder,
        *,
        few: bool,
        note: Note,
        precision: str = "auto",
        form: Callable[[], Path] | None = None,
    ) -> None:
        openvino = import_openvino()
        core = openvino.Core()
        has_bf16 = "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        if precision == "bf16" and not has_bf16:
            note("this processor has no bf16; going on in fp32")
        floating = "bf16" if has_bf16 and precision != "fp32" else "fp32"
        settings = {
            "PERFORMANCE_HINT": "LATENCY" if few else "THROUGHPUT",
            "INFERENCE_PRECISION_HINT": floating.replace("fp32", "f32"),
            "INFERENCE_NUM_THREADS": n_cores(),
            # Decoding threads and other processes use the same cores; pinned threads would wait for each other.
            "ENABLE_CPU_PINNING": False,
        }
        form = form or partial(converted_path, model, note=note)
        path = form()
        try:
            self._compiled = _compile(core, path, settings)
        except RuntimeError as error:  # all of OpenVINO's
            note(f"the converted form of {model.name} is damaged ({last_line(error)}); making it again")
            discard(path)
            path = form()
            try:
                self._compiled = _compile(core, path, settings)
            except RuntimeError as still:
                raise DinosearchError(f"OpenVINO cannot run {path} ({last_line(still)}). Delete that folder") from still
        self._idle: list[Any] = []
        n_streams = self._compiled.get_property("OPTIMAL_NUMBER_OF_INFER_REQUESTS")
        self.in_flight = 1 if few else n_streams + 1
        self.batch = max(1, min(MOST_PER_BATCH, PIXELS_PER_BATCH // model.image_size**2))
        self.name = f"OpenVINO {'int8' if precision == 'int8' else floating}, {n_cores()} thread{'s' * (n_cores() > 1)}"

    def start(self, pixels: np.ndarray) -> Callable[[], np.ndarray]:
        """uint8 [n, S, S, channels] → a function that waits for float32 [n, dim]."""
        request = self._idle.pop() if self._idle else self._compiled.create_infer_request()
        request.start_async({0: pixels})

        def wait() -> np.ndarray:
            request.wait()
            vectors = request.get_output_tensor(0).data.copy()
            self._idle.append(request)
            return vectors

        return wait


def _compile(core: Any, path: Path, settings: dict[str, Any]) -> Any:
    """The compiled model, through OpenVINO's cache where `path` can be written: a blob for this chip and version.

    OpenVINO notices a shortened blob but not one whose pages a power cut left empty, so a new one is flushed at once;
    those of other chips or versions make room for it.
    """
    xml = str(path / "vit.xml")
    if not os.access(path, os.W_OK):
        return core.compile_model(xml, "CPU", settings)
    before = set(path.glob("*.blob"))
    compiled = core.compile_model(xml, "CPU", settings | {"CACHE_DIR": str(path)})
    added = set(path.glob("*.blob")) - before
    for blob in added:
        with blob.open("rb") as file:
            os.fsync(file.fileno())
    for blob in before if added else ():
        with contextlib.suppress(OSError):  # another process may be reading it, which some systems mind
            blob.unlink()
    return compiled
