"""evlecg: distil a large ECG vision-language model into a small one (EVL-ECG, arXiv 2605.29977)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from evlecg.run import Student

__version__ = "0.1.0"


def load(artifact: Any, *, threads: int | None = None) -> Student:
    """Opens a student that was exported to onnx or openvino: `evlecg.load(folder).predict(signal_mV, fs_hz)`.

    Args:
        artifact: its folder.
        threads: for its arithmetic; None: as many as the runtime likes.

    Raises:
        EvlecgError: not such a folder, one that was changed since, or a missing package.
    """
    from evlecg.run import load as open_artifact  # numpy and the rest load here

    return open_artifact(artifact, threads=threads)
