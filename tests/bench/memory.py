"""Is the memory estimate right? Beside measured peaks; then the tables of real pairs, which no machine here can hold.

    python -m tests.bench.memory [--runs N] [--only real|measured] [--device cpu|cuda] [--json FILE]

With `--device cuda` all of them are measured, the real pairs with random weights in the published shapes, by what
PyTorch's allocator says of itself: `allocated` is what is alive, `reserved` what the process takes of the GPU.

Measured on a CPU: every case runs N times in a process of its own. There the code, its libraries and a step on small
models come first; then the peak is reset (`/proc/self/clear_refs`), the models are built with random weights, three
optimizer steps are taken (the first with the gradient norms that the log shows), and the peak resident set above what
was resident before is read off (`VmHWM`). The median is compared with what `evlecg.training.estimate` says. Linux only.

glibc keeps freed blocks under 32 MiB for later, so that a process holds more than is alive in it. What is alive shows
where it is told to give them back (MALLOC_MMAP_THRESHOLD_): with that the estimate of what is alive has to agree within
15%. The same without, as a run has it, stands beside it, and has to stay under `KEPT_BY_GLIBC` times the estimate with
the allocator's own.

Real pairs: from published configs, on the meta device (but with `--device cuda`), bfloat16, batches of four rows with
96 tokens of text.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from evlecg.models.memory import KEPT_BY_GLIBC
from evlecg.recipe import Recipe, load_recipe, parse_set
from tests.bench.timing import save

TERMS = ["objective.lambda_m=0.3", "objective.lambda_r=10", "objective.lambda_ot=0.1", "log.gradients_every=50"]
LORA = ["lora.rank=64", "lora.alpha=16", "lora.dropout=0.05"]  # the paper's presumed setting
TOLERANCE = 0.15

# name -> (teacher, student, rows, tokens of text, recipe keys)
MEASURED: dict[str, tuple[str | None, str, int, int, list[str]]] = {
    "builtin pair, 32 rows": ("builtin:teacher", "builtin:student", 32, 32, []),
    "100M pair, 2 rows": ("llava-100M", "idefics3-100M", 2, 64, []),
    "100M pair, 8 rows": ("llava-100M", "idefics3-100M", 8, 96, []),
    "100M SFT only, 6 rows": (None, "llava-100M", 6, 96, []),
    "100M pair, LoRA, 6 rows": ("llava-100M", "llava-100M", 6, 96, LORA),
    "100M, checkpointed, 8 rows": (None, "llava-100M", 8, 96, ["train.gradient_checkpointing=true"]),
}
REAL: list[tuple[str, str, list[str]]] = [
    ("PULSE-7B", "FastVLM-1.5B", LORA),
    ("PULSE-7B", "FastVLM-1.5B", [*LORA, "train.gradient_checkpointing=true", "train.teacher_bits=8"]),
    ("PULSE-7B", "Qwen2-VL-2B", [*LORA, "train.gradient_checkpointing=true"]),
    ("PULSE-7B", "SmolVLM-256M", []),
    ("PULSE-7B", "SmolVLM-500M", []),
    ("PULSE-7B", "SmolVLM-256M", ["train.gradient_checkpointing=true"]),
]


def _recipe(teacher: str | None, keys: list[str]) -> Recipe:
    return load_recipe(None, parse_set([f"teacher={teacher or 'none'}", *TERMS, *keys]))


def _kind(name: str) -> Any:
    """A model of tests.real_configs, or a built-in one in their manner."""
    from evlecg.models import load as models
    from tests.real_configs import Kind, _square, _tiles, kinds

    if not name.startswith("builtin:"):
        return kinds()[name]
    config = models.inspect(name).config
    return Kind(name, config, *((144, _square(168)) if "teacher" in name else (36, _tiles(1, 168))))


def _batch(teacher: str | None, student: str, rows: int, n_text: int) -> Any:
    from tests.real_configs import batch

    return batch(_kind(student), _kind(teacher) if teacher else None, rows, n_text=n_text)


def _estimate(teacher: str | None, student: str, rows: int, n_text: int, keys: list[str], device: str = "cpu") -> Any:
    from evlecg.training.estimate import step_memory

    checkpoint = _kind(teacher).checkpoint if teacher else None
    made = _batch(teacher, student, rows, n_text)
    return step_memory(_recipe(teacher, keys), made, _kind(student).checkpoint, checkpoint, device=device)


def _steps(teacher: str | None, student: str, rows: int, n_text: int, keys: list[str], batch: Any, n: int = 3,
           device: str = "cpu") -> None:  # fmt: skip
    """Real optimizer steps on random weights."""
    import torch
    from transformers import AutoModelForImageTextToText

    from evlecg.losses.objective import METHODS
    from evlecg.models.load import Loaded
    from evlecg.training.estimate import adapt_student, bare_job
    from evlecg.training.processes import optimizer_of
    from evlecg.training.step import Position, step

    recipe = _recipe(teacher, keys)
    loaded = []
    dtypes = {student: recipe.train.dtype, teacher: recipe.train.teacher_dtype}
    for name in (student, *([teacher] if teacher else [])):
        checkpoint = dataclasses.replace(_kind(name).checkpoint, trained=True)
        with torch.device(device):
            model = AutoModelForImageTextToText.from_config(checkpoint.config, dtype=getattr(torch, dtypes[name]))
        loaded.append(Loaded(checkpoint, model.to(device), None))
    small, large = loaded[0], loaded[1] if teacher else None
    adapt_student(recipe, small)
    facts = large.facts if large else None
    objective = METHODS[recipe.effective_method](recipe.objective, student=small.facts, teacher=facts)
    objective.to(device)
    optimizer = optimizer_of(recipe, small.model, objective)
    job = bare_job(recipe, small, large, objective, optimizer)
    for number in range(n):
        step(job, [batch], Position(), diagnose=number == 0, gradients=number == 0)


def _status(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def measure(name: str) -> int:
    """Peak resident bytes above the baseline, of one case in this process."""
    import gc

    import torch

    torch.set_num_threads(1)
    case = MEASURED[name]
    batch = _batch(*case[:4])
    warm = ("builtin:teacher" if case[0] else None, "builtin:student", 2, 16)
    _steps(*warm, case[4] if "lora.rank=64" not in case[4] else [], _batch(*warm))
    if "lora.rank=64" in case[4]:
        import peft  # noqa: F401
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what the small steps left free would be used again, and not be seen
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    _steps(*case, batch)
    return _status("VmHWM") - before


def measure_gpu(case: str) -> dict[str, Any]:
    """Estimate beside what the GPU's allocator tells, of one case (its index among `_gpu_cases`) in this process."""
    import torch

    teacher, student, rows, n_text, keys = _gpu_cases()[case]
    told = _estimate(teacher, student, rows, n_text, keys, "cuda")
    batch = _batch(teacher, student, rows, n_text)
    before, _ = torch.cuda.mem_get_info()
    _steps(teacher, student, rows, n_text, keys, batch, device="cuda")
    after, _ = torch.cuda.mem_get_info()
    return {
        "case": case, "parameters": told.student.parameters, "estimate": told.needed, "alive": told.peak,
        "allocated": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved(),
        "taken": before - after, "device": torch.cuda.get_device_name(), "why_unknown": told.why_unknown,
    }  # fmt: skip


def _gpu_cases() -> dict[str, tuple[str | None, str, int, int, list[str]]]:
    """The measured cases and the real pairs; quantised teachers apart, whose library may not be there."""
    halves = ["train.dtype=bfloat16", "train.teacher_dtype=bfloat16"]
    real = {
        f"{teacher} -> {student}{', '.join(['', *(key.split('=')[0] for key in keys)])}":
        (teacher, student, 4, 96, [*halves, *keys])
        for teacher, student, keys in REAL
        if not any("bits" in key for key in keys)
    }  # fmt: skip
    return MEASURED | real


def compare_gpu(only: str | None) -> list[dict[str, Any]]:
    """Every case in a process of its own."""
    found = []
    for case in _gpu_cases():
        if only and (case in MEASURED) != (only == "measured"):
            continue
        command = [sys.executable, "-m", "tests.bench.memory", "--device", "cuda", "--measure", case]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            print(f"{case}: failed: {done.stderr.strip().splitlines()[-1]}", flush=True)
            found.append({"case": case, "error": done.stderr[-2000:]})
            continue
        row = json.loads(done.stdout.splitlines()[-1])
        row |= {"ratio": row["estimate"] / row["reserved"], "alive_ratio": (row["alive"] or 0) / row["allocated"]}
        found.append(row)
        gib = 2**30
        print(f"{case}: alive {(row['alive'] or 0) / gib:.2f} GiB, allocated {row['allocated'] / gib:.2f} GiB, ratio "
              f"{row['alive_ratio']:.3f}; estimate {row['estimate'] / gib:.2f} GiB, reserved "
              f"{row['reserved'] / gib:.2f} GiB, ratio {row['ratio']:.3f} ({row['device']}) {row['why_unknown']}",
              flush=True)  # fmt: skip
    return found


def compare(runs: int) -> list[dict[str, Any]]:
    """Estimates beside medians of measured peaks, with what was freed given back, and kept as it is by default."""
    found = []
    for name, case in MEASURED.items():
        told = _estimate(*case)
        peaks = {kept: [_peak(name, kept) for _ in range(runs)] for kept in (False, True)}
        given, kept = (statistics.median(peaks[way]) for way in (False, True))
        found.append({"case": name, "parameters": told.student.parameters, "estimate": told.needed,
                      "alive": told.peak, "measured": peaks[False], "measured_kept": peaks[True],
                      "ratio": told.peak / given,
                      "kept_over_estimate": kept / told.needed})  # fmt: skip
        row = found[-1]
        spread = f"{min(peaks[False]) / 2**20:.1f} to {max(peaks[False]) / 2**20:.1f}, n={runs}"
        print(f"{name:28} {row['parameters']:>12,}  alive, estimated {told.peak / 2**20:8.1f} MiB  measured "
              f"{given / 2**20:8.1f} MiB ({spread})  ratio {row['ratio']:.3f}; by default {kept / 2**20:8.1f} MiB, "
              f"{row['kept_over_estimate']:.2f} x the estimate", flush=True)  # fmt: skip
    return found


def _peak(name: str, kept: bool) -> int:
    """One case in a process of its own, whose C library keeps what is freed, or gives it back."""
    command = [sys.executable, "-m", "tests.bench.memory", "--measure", name]
    back = {} if kept else {"MALLOC_MMAP_THRESHOLD_": "262144", "MALLOC_TRIM_THRESHOLD_": "262144"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, **back})
    return int(done.stdout.split()[-1])


def tables() -> list[dict[str, Any]]:
    """The real pairs."""
    from evlecg.progress import ConsoleProgress

    progress = ConsoleProgress()
    progress.console.file = sys.stdout
    found = []
    for teacher, student, keys in REAL:
        told = _estimate(teacher, student, 4, 96, ["train.dtype=bfloat16", "train.teacher_dtype=bfloat16", *keys])
        progress.table(f"{teacher} -> {student}, bfloat16{''.join(f', {key}' for key in keys)}", *told.table())
        if told.why_unknown:
            print("not traced:", told.why_unknown)
        found.append({"teacher": teacher, "student": student, "keys": keys, **told.to_dict()})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Estimated and measured memory.")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--only", choices=("real", "measured"))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure and given.device == "cuda":
        print(json.dumps(measure_gpu(given.measure)))
        return
    if given.measure:
        print(measure(given.measure))
        return
    if given.device == "cuda":
        rows = compare_gpu(given.only)
        save(given.json, {"measured": rows})
        far = [row["case"] for row in rows if abs(row.get("alive_ratio", 0) - 1) > TOLERANCE]
        print(f"within {TOLERANCE:.0%}: {'no: ' + ', '.join(far) if far else 'yes'}")
        sys.exit(1 if far else 0)
    measured = compare(given.runs) if given.only != "real" else []
    real = tables() if given.only != "measured" else []
    save(given.json, {"measured": measured, "real": real})
    far = [row["case"] for row in measured if abs(row["ratio"] - 1) > TOLERANCE]
    over = [row["case"] for row in measured if row["kept_over_estimate"] > KEPT_BY_GLIBC]
    if measured:
        print(f"within {TOLERANCE:.0%}: {'no: ' + ', '.join(far) if far else 'yes'}")
        print(f"under {KEPT_BY_GLIBC} times the estimate as it is: {'no: ' + ', '.join(over) if over else 'yes'}")
    sys.exit(1 if far or over else 0)


if __name__ == "__main__":
    main()
