"""What the process does in which nncf quantises a converted model: weights and activations of its products to int8."""

from pathlib import Path

import numpy as np

from dinosearch.encoder.conversion import import_openvino


def main(form: str, squares_path: str, into: str) -> None:
    """Read the form in a folder and uint8 [n, S, S, channels] from an .npy, write the int8 `vit.xml` and `.bin`."""
    openvino = import_openvino()  # first: nncf, too, reports itself unless openvino_telemetry cannot be imported
    import nncf

    squares = np.load(squares_path, allow_pickle=False)
    quantized = nncf.quantize(
        openvino.Core().read_model(str(Path(form) / "vit.xml")),
        nncf.Dataset([square[None] for square in squares]),
        model_type=nncf.ModelType.TRANSFORMER,  # nncf's way of keeping attention accurate
        subset_size=len(squares),
    )
    openvino.save_model(quantized, str(Path(into) / "vit.xml"), compress_to_fp16=True)
