"""What scoring one record costs: parameters, FLOPs, latency and memory, measured where the model stands."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from evlecg.models.load import Loaded
from evlecg.process import peak_bytes
from evlecg.report import Cost, counted
from evlecg.schema import Sample

if TYPE_CHECKING:
    from evlecg.models.score import Scorer

WARM_UP = 3
TIMED = 30


def measure_cost(loaded: Loaded, scorer: Scorer, samples: Sequence[Sample]) -> Cost:
    """Scores single records again, and counts.

    Args:
        loaded: the model, on its device.
        scorer: as it scored the report.
        samples: records of the report; the first `WARM_UP` are not timed, up to `TIMED` more are.
    """
    return measure_calls(
        loaded, [lambda sample=sample: list(scorer.score([sample])) for sample in samples[: WARM_UP + TIMED]],
        n_questions=len(samples[0].questions), unit="One record at a time with all its questions",
    )  # fmt: skip


def measure_calls(loaded: Loaded, calls: Sequence[Callable[[], object]], *, n_questions: int, unit: str) -> Cost:
    """Times calls one by one, and counts the first's FLOPs.

    Args:
        loaded: the model, on its device.
        calls: each does one unit's work and waits for its result; the first `WARM_UP` are not timed.
        n_questions: that the first of them answers.
        unit: what one call is, in words.
    """
    import torch

    device = next(loaded.model.parameters()).device
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    seconds = []
    chosen = [calls[0]] * WARM_UP + list(calls) if len(calls) <= WARM_UP else list(calls)
    for call in chosen:
        start_s = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start_s)
    timed_ms = 1000 * np.array(seconds[WARM_UP:])
    peak = torch.cuda.max_memory_allocated(device) if on_gpu else peak_bytes()
    return Cost(
        parameters=loaded.n_parameters,
        flops=count_flops(loaded.model, chosen[0]),
        latency_ms=float(np.median(timed_ms)),
        latency_p95_ms=float(np.percentile(timed_ms, 95)),
        peak_memory_bytes=peak,
        n_records=len(timed_ms),
        n_questions=n_questions,
        device=torch.cuda.get_device_name(device) if on_gpu else f"CPU, {counted(torch.get_num_threads(), 'thread')}",
        method=f"{unit}, page drawing included, after {WARM_UP} to warm up; FLOPs of the same by PyTorch's counter "
        "with eager attention (convolutions and matrix products; a multiplication and an addition are two); peak "
        "memory "
        + ("allocated on the device." if on_gpu else "of the whole process since it started, data and libraries too."),
    )  # fmt: skip


def count_flops(model: Any, call: Callable[[], object]) -> int | None:
    """FLOPs of a call that runs the model, a multiplication and an addition counted as two.

    None where attention cannot be made eager: fused attention is not counted everywhere.
    """
    from torch.utils.flop_counter import FlopCounterMode

    model = model if hasattr(model, "set_attn_implementation") else getattr(model, "model", model)  # a classifier
    before = getattr(getattr(model, "config", None), "_attn_implementation", None)
    try:
        model.set_attn_implementation("eager")
    except (AttributeError, ValueError):
        return None
    try:
        with FlopCounterMode(display=False) as counter:
            call()
    finally:
        if before:
            model.set_attn_implementation(before)
    return int(counter.get_total_flops())
