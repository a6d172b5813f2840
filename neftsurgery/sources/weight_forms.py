"""Forms of weights that are not read: they are not fetched, and not copied beside changed weights."""

from __future__ import annotations

__all__ = ["OTHER_ENDINGS", "OTHER_FOLDERS"]

OTHER_ENDINGS = (
    ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".ggml", ".onnx", ".onnx_data", ".h5", ".msgpack", ".ot",
    ".tflite", ".mlmodel", ".nemo", ".npz", ".pkl", ".bin.index.json",
)  # fmt: skip
OTHER_FOLDERS = ("original", "onnx", "openvino", "coreml", "mlx")
