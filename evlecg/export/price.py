"""What a record costs: teacher, student and exported student, measured side by side in one run.

Every model lives in a process of its own, so that its memory is its own; that of an exported student imports no torch,
so neither does this module. They take turns record by record: whatever
else the machine does meets all of them alike.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from evlecg.errors import EvlecgError
from evlecg.process import peak_bytes
from evlecg.progress import Progress

WARM_UP, TIMED = 3, 20
THREADS = (1, 2)


@dataclass(frozen=True)
class Price:
    """One model's row of the cost card.

    Attributes:
        name: "teacher", "student" or "exported".
        model: what was loaded.
        parameters: None for graphs: see the student's.
        flops: of one record with all its questions; None where they are not counted.
        disk_bytes: of its weights or graphs.
        latency_ms, latency_p95_ms: threads -> one record alone, page drawing included.
        peak_memory_bytes: of its whole process with one thread, libraries included.
        failed: why there are no numbers; empty where there are.
    """

    name: str
    model: str
    parameters: int | None = None
    flops: int | None = None
    disk_bytes: int | None = None
    latency_ms: dict[str, float] = field(default_factory=dict)
    latency_p95_ms: dict[str, float] = field(default_factory=dict)
    peak_memory_bytes: int | None = None
    failed: str = ""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Asked:
    """What to measure.

    Attributes:
        name: of the row.
        model: folder, hub id or builtin:NAME; of `runs`, an exported folder.
        runs: evlecg.run runs it; else PyTorch does.
        dtype: of PyTorch's.
    """

    name: str
    model: str
    runs: bool = False
    dtype: str = "float32"


def measure(
    asked: Sequence[Asked], *, trained: Path, data: Path | None, progress: Progress | None = None
) -> list[Price]:
    """Measures all of them.

    Args:
        asked: what.
        trained: folder of the student's evlecg.json: all are asked its questions.
        data: prepared folder whose validation records are scored; None: synthetic ones.
        progress: who listens.
    """
    progress = progress or Progress()
    workers = [_Worker(each, trained, data) for each in asked]
    times: dict[str, dict[str, list[float]]] = {each.name: {} for each in asked}
    try:
        with progress.task("measure cost", len(THREADS) * (WARM_UP + TIMED)) as advance:
            for threads in THREADS:
                for worker in workers:
                    worker.say({"threads": threads})
                for record in range(WARM_UP + TIMED):
                    for worker in workers:
                        found = worker.say({"record": record})
                        if found is not None and record >= WARM_UP:
                            times[worker.asked.name].setdefault(str(threads), []).append(found["ms"])
                    advance(1)
                if threads == THREADS[0]:
                    for worker in workers:
                        worker.peak = (worker.say({"peak": True}) or {}).get("peak")
        facts = [worker.say({"facts": True}) or {} for worker in workers]
    finally:
        for worker in workers:
            worker.stop()
    return [
        Price(
            worker.asked.name, worker.asked.model, each.get("parameters"), each.get("flops"), each.get("disk_bytes"),
            {threads: float(np.median(ms)) for threads, ms in times[worker.asked.name].items()},
            {threads: float(np.percentile(ms, 95)) for threads, ms in times[worker.asked.name].items()},
            worker.peak, worker.failed,
        )
        for worker, each in zip(workers, facts, strict=True)
    ]  # fmt: skip


class _Worker:
    """A process that holds one model and answers one line with one line."""

    def __init__(self, asked: Asked, trained: Path, data: Path | None) -> None:
        self.asked, self.failed, self.peak = asked, "", None
        spec = json.dumps(asdict(asked) | {"trained": str(trained), "data": str(data) if data else None})
        root = Path(__file__).resolve().parents[2]
        path = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
        self.process = subprocess.Popen(
            [sys.executable, "-m", "evlecg.export.price", spec], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, text=True, env=os.environ | {"PYTHONPATH": path},
        )  # fmt: skip
        self.say({"hello": True})

    def say(self, line: dict[str, Any]) -> dict[str, Any] | None:
        if self.failed:
            return None
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps(line) + "\n")
            self.process.stdin.flush()
            answer = json.loads(self.process.stdout.readline())
        except (OSError, ValueError):
            answer = {"failed": "its process ended (out of memory?)"}
        self.failed = answer.get("failed", "")
        return None if self.failed else answer

    def stop(self) -> None:
        with contextlib.suppress(OSError):
            assert self.process.stdin is not None
            self.process.stdin.close()
        try:
            self.process.wait(timeout=30)
        except subprocess.TimeoutExpired:  # its numbers are in: how it ends is of no interest
            self.process.kill()
            self.process.wait()


def _serve(spec: dict[str, Any]) -> None:
    """The other side of `_Worker`."""
    import time

    answers = sys.stdout
    sys.stdout = sys.stderr  # whatever a library prints is no answer
    scoring = facts = samples = None
    for line in sys.stdin:
        asked = json.loads(line)
        answer: dict[str, Any] = {}
        try:
            if "threads" in asked:
                score_one, facts, samples = _opened(spec, asked["threads"], scoring)
                scoring = score_one
            elif "record" in asked:
                assert samples is not None and scoring is not None
                start_s = time.perf_counter()
                scoring([samples[asked["record"] % len(samples)]])
                answer["ms"] = 1000 * (time.perf_counter() - start_s)
            elif "peak" in asked:
                answer["peak"] = peak_bytes()
            elif "facts" in asked and facts is not None:
                answer = facts()
        except EvlecgError as error:
            answer = {"failed": str(error)}
        except Exception as error:
            answer = {"failed": f"{type(error).__name__}: {error}"[:200]}
        print(json.dumps(answer), file=answers, flush=True)


def _opened(spec: dict[str, Any], threads: int, before: Any) -> tuple[Any, Any, Any]:
    """(scores samples, gives facts, samples) of one model; PyTorch's is loaded once and told its threads."""
    from evlecg.data.store import Prepared
    from evlecg.models.trained import trained_with

    trained = trained_with(Path(spec["trained"]))
    if spec["runs"]:
        from evlecg.run import load

        student = load(spec["model"], threads=threads)
        records, samples = _records(spec, trained, Prepared, set(student.labels))
        files = [
            file
            for name in student.told["graphs"].values()
            for file in Path(spec["model"]).glob(f"{Path(name).stem}.*")
        ]
        facts = {"disk_bytes": sum(file.stat().st_size for file in files)}

        def score(chosen: Any) -> None:
            for sample in chosen:
                record = records.record(sample.record_index)
                student.scores([student.draw(record.signal_mV, record.fs_hz)])

        return score, lambda: facts, samples

    import torch

    from evlecg.export.gate import TorchScoring
    from evlecg.models import load as models

    torch.set_num_threads(threads)
    if before is not None:
        return before, *_SEEN
    loaded = models.load(models.inspect(spec["model"]), dtype=spec["dtype"])
    known = None if loaded.checkpoint.kind == "text" else set(loaded.model.rows)
    records, samples = _records(spec, trained, Prepared, known)
    scoring: Any = TorchScoring(loaded, records, _as_it_sees(spec, trained))

    def facts_of() -> dict[str, Any]:
        from evlecg.cost import count_flops

        folder = Path(loaded.checkpoint.source)
        return {
            "parameters": loaded.n_parameters,
            "flops": count_flops(loaded.model, lambda: list(scoring.scorer(samples).score(samples[:1]))),
            "disk_bytes": sum(file.stat().st_size for file in folder.glob("*.safetensors")) or None,
        }

    _SEEN[:] = [facts_of, samples]
    return scoring, facts_of, samples


_SEEN: list[Any] = []


def _as_it_sees(spec: dict[str, Any], trained: Any) -> Any:
    """The student's pages; a teacher's have the size that it had in training."""
    from dataclasses import replace

    if spec["name"] != "teacher":
        return trained
    return replace(trained, page=replace(trained.page, student_size=trained.page.teacher_size))


def _records(spec: dict[str, Any], trained: Any, prepared_kind: Any, known: set[str] | None) -> tuple[Any, Any]:
    from evlecg.data.tasks import label_samples
    from evlecg.export.drawn import Drawn
    from evlecg.schema import Question

    labels = tuple(label for label in trained.labels if known is None or label in known) or tuple(sorted(known or ()))
    if spec["data"] is not None:
        prepared = prepared_kind.open(Path(spec["data"]))
        found = label_samples(prepared, prepared.indices("val").tolist()[: WARM_UP + TIMED], labels, trained.question)
        if found:
            return prepared, found
    questions = [
        Question(
            trained.question.replace("{description}", trained.labels.get(label, label)), "yes", ("yes", "no"), label
        )
        for label in labels
    ]
    drawn = Drawn(WARM_UP + TIMED)
    return drawn, drawn.samples(questions)


if __name__ == "__main__":
    _serve(json.loads(sys.argv[1]))
