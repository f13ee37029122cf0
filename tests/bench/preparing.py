"""How fast a PTB-XL-sized download is prepared, in how much memory, and how often its bytes are read.

    python -m tests.bench.preparing [--records 21800] [--workers 2] [--folder DIR] [--json FILE]

A folder in PTB-XL's true layout (tables, records500/NN000/NNNNN_hr.{hea,dat}, 10 s at 500 Hz) is generated first, from
a few hundred synthetic hearts, shifted and with noise of their own; that takes longer than preparing it. Then
`evlecg prepare` runs as a command. Memory is the sum over its processes of their proportional set sizes, sampled; bytes
read are what its processes asked the system for (libraries and sampling included). On a machine with other work, the
processor's time tells more than the clock's: it stands beside that of only reading and hashing the same files.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from evlecg.data.synthetic import generate
from evlecg.schema import LEADS

BASE = 200
SAMPLE_S = 0.05
# statement -> superclass, subclass
CODES = {"NORM": ("NORM", "NORM"), "IMI": ("MI", "IMI"), "NDT": ("STTC", "STTC"), "CLBBB": ("CD", "CLBBB"),
         "LVH": ("HYP", "LVH")}  # fmt: skip


def write_ptbxl(root: Path, n_records: int) -> int:
    """A folder in PTB-XL's layout; returns its bytes."""
    rng = np.random.default_rng(0)
    base = [np.rint(record.signal_mV * 1000).astype("<i2") for record in generate({"train": BASE}, fs_hz=500.0)]
    n_bytes = 0
    rows = []
    channels = [
        f"{{name}}.dat 16 1000.0(0)/mV 16 0 {{first[{lead}]}} 0 0 {name.upper()}" for lead, name in enumerate(LEADS)
    ]
    for number in range(1, n_records + 1):
        stem = f"records500/{number // 1000 * 1000:05d}/{number:05d}_hr"
        steps_LT = np.roll(base[number % BASE], int(rng.integers(5000)), axis=1)
        steps_LT = steps_LT + rng.integers(-3, 4, steps_LT.shape, dtype="<i2")
        path = root / stem
        path.parent.mkdir(parents=True, exist_ok=True)
        data = np.ascontiguousarray(steps_LT.T).tobytes()
        path.with_name(path.name + ".dat").write_bytes(data)
        lines = [f"{path.name} 12 500 5000", *(line.format(name=path.name, first=steps_LT[:, 0]) for line in channels)]
        header = "\n".join(lines) + "\n"
        path.with_name(path.name + ".hea").write_text(header)
        n_bytes += len(data) + len(header)
        code = list(CODES)[number % len(CODES)]
        rows.append(
            {
                "ecg_id": number, "patient_id": float(number), "age": 60.0, "sex": number % 2, "device": "CS-12",
                "height": "", "weight": "", "recording_date": "1990-01-01 00:00:00",
                "report": "sinusrhythmus normales ekg", "scp_codes": str({code: 100.0, "SR": 0.0}),
                "strat_fold": number % 10 + 1,
                "filename_lr": stem.replace("500", "100", 1), "filename_hr": stem,
            }
        )  # fmt: skip
    _write_csv(root / "ptbxl_database.csv", rows)
    columns = ("", "diagnostic", "diagnostic_class", "diagnostic_subclass")
    statements = [(code, "1.0", *names) for code, names in CODES.items()] + [("SR", "", "", "")]
    _write_csv(root / "scp_statements.csv", [dict(zip(columns, row, strict=True)) for row in statements])
    return n_bytes + sum((root / name).stat().st_size for name in ("ptbxl_database.csv", "scp_statements.csv"))


def _write_csv(path: Path, rows: list[dict]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def measured(command: list[str]) -> dict[str, float]:
    """Seconds by the clock and on processors, peak memory (MiB), bytes read: of a command and all its processes."""
    start_s = time.perf_counter()
    job = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    peak_KiB, before_bytes, before_cpu_s = 0, _read_bytes(), _cpu_s()
    while job.poll() is None:
        total_KiB = 0
        for pid in _family(job.pid):
            try:
                rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
                total_KiB += int(rollup.split("\nPss:")[1].split()[0])
            except (OSError, IndexError):  # it ended meanwhile
                continue
        peak_KiB = max(peak_KiB, total_KiB)
        time.sleep(SAMPLE_S)
    if job.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {job.returncode}")
    return {
        "s": time.perf_counter() - start_s, "cpu_s": _cpu_s() - before_cpu_s, "peak_MiB": peak_KiB / 1024,
        "read_bytes": _read_bytes() - before_bytes,
    }  # fmt: skip


def _cpu_s() -> float:
    """User and system seconds of all children that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def read_and_hash_s(folder: Path) -> float:
    """Processor seconds of reading and hashing all files of a folder, and nothing else."""
    start_s = time.process_time()
    for path in folder.rglob("*.*"):
        hashlib.sha256(path.read_bytes()).digest()
    return time.process_time() - start_s


def _read_bytes() -> int:
    """Bytes that this process and all children that have ended asked the system for."""
    return int(Path("/proc/self/io").read_text().split()[1])


def _family(pid: int) -> list[int]:
    found = [pid]
    for parent in found:
        try:
            for task in Path(f"/proc/{parent}/task").iterdir():
                found += [int(child) for child in (task / "children").read_text().split()]
        except OSError:
            continue
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--records", type=int, default=21_800)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="work here, and go on with a download generated there before")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="evlecg-bench-"))
    try:
        source, out = folder / f"ptbxl-{arguments.records}", folder / "prepared"
        if not (source / "scp_statements.csv").is_file():
            write_ptbxl(source, arguments.records)
        size = sum(path.stat().st_size for path in source.rglob("*.*"))
        shutil.rmtree(out, ignore_errors=True)
        command = [sys.executable, "-m", "evlecg.cli", "prepare", "--dataset", "ptbxl", "--quiet"]
        command += ["--source", str(source), "--out", str(out), "--workers", str(arguments.workers)]
        first, again = measured(command), measured(command)
        hash_s = read_and_hash_s(source)
        kept = json.loads((out / "manifest.json").read_text())["n_kept"]
    finally:
        if arguments.folder is None:
            shutil.rmtree(folder)
    result = {
        "records": arguments.records, "kept": kept, "workers": arguments.workers, "source_bytes": size,
        "seconds": first["s"], "cpu_seconds": first["cpu_s"], "read_and_hash_cpu_seconds": hash_s,
        "records_per_s": arguments.records / first["s"], "peak_MiB": first["peak_MiB"],
        "times_read": first["read_bytes"] / size, "again_seconds": again["s"],
        "again_times_read": again["read_bytes"] / size,
    }  # fmt: skip
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")
    for key, value in result.items():
        print(f"{key:>25}  {value:,.3f}" if isinstance(value, float) else f"{key:>25}  {value:,}")


if __name__ == "__main__":
    main()
