"""The formats that a student can have, known before anything heavy is imported."""

from __future__ import annotations

from dataclasses import dataclass

SHORT = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


@dataclass(frozen=True)
class Format:
    """One format; formats.py says who writes it.

    Attributes:
        dtypes: what it can hold, the default first; "auto" is the run's.
        runs: whether evlecg.run runs it.
        packages: what has to be installed, and the extra that does it.
    """

    dtypes: tuple[str, ...]
    runs: bool = False
    packages: tuple[str, ...] = ()
    extra: str = ""


FORMATS: dict[str, Format] = {
    "safetensors": Format(("auto", "float32", "bfloat16", "float16")),
    "onnx": Format(("float32", "float16", "int8", "int8-static", "int4"), True, ("onnx", "onnxscript", "onnxruntime"),
                   "onnx"),
    "openvino": Format(("float32", "float16"), True, ("openvino",), "openvino"),
    "gguf": Format(("float16", "float32", "bfloat16", "int8", "int4")),
}  # fmt: skip
