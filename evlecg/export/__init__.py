"""The student alone, in a format that other software loads: written, proven, priced, described.

    result = export(Path("runs/latest"), out=Path("student"), format="onnx", dtype="int8", data=Path("data/synthetic"))

The new folder takes its final name only once the student in it, loaded in its own runtime, answers as the run's does:
its logits differ as little as the dtype allows, and its AUROC on the validation records falls by no more than was
asked. `manifest.json` holds the SHA-256 of every file, `gate.json` what was proven, `cost.json` what it costs.
"""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evlecg.errors import EvlecgError, RunFailed
from evlecg.files import new_folder, write_text_atomic
from evlecg.progress import Progress
from evlecg.recipe import nearest

if TYPE_CHECKING:
    from evlecg.export.gate import Proof
    from evlecg.export.price import Price
    from evlecg.models.load import Loaded
    from evlecg.models.trained import TrainedWith

LOGIT_TOLERANCE = 1e-5  # the same weights in the same dtype: anything above this is a defect, not rounding
# of log odds, per dtype that a graph computes in: where a page is resized, single pixels differ by one level of 256 (a
# tiny tiled Idefics3: 1.6e-3); quantised graphs are judged by their AUROC
GRAPH_TOLERANCE = {"float32": 2e-2, "float16": 0.25}
MAX_DROP_POINTS = 0.5
MOST_RECORDS = 1000
N_CALIBRATION = 64
GATE, COST = "gate.json", "cost.json"
# llama.cpp's convert_hf_to_gguf.py has a vision part for these (as of late 2025); of LLaVA it knows the original layout
GGUF_FAMILIES = ("idefics3", "smolvlm", "qwen2_vl", "qwen2_5_vl")
GGUF_TYPES = {"float32": "f32", "float16": "f16", "bfloat16": "bf16", "int8": "q8_0", "int4": "f16"}


@dataclass(frozen=True)
class ExportResult:
    """What was exported.

    Attributes:
        out: the folder.
        weights: its (first) weights file or graph.
        n_parameters: of the student.
        n_bytes: of all weights or graphs.
        max_logit_difference: of safetensors, between the run's logits and the reloaded ones; of graphs, between log
            odds.
        format, dtype: what it is.
        proof: what was scored beside the run's student.
        prices: the cost card; empty where it was not asked for.
        commands: what is left to do by hand (gguf).
    """

    out: Path
    weights: Path
    n_parameters: int
    n_bytes: int
    max_logit_difference: float
    format: str = "safetensors"
    dtype: str = "auto"
    proof: Proof | None = None
    prices: tuple[Price, ...] = ()
    commands: tuple[str, ...] = field(default=())

    def to_dict(self) -> dict[str, Any]:
        return {
            "out": str(self.out), "weights": str(self.weights), "n_parameters": self.n_parameters,
            "n_bytes": self.n_bytes, "max_logit_difference": self.max_logit_difference, "format": self.format,
            "dtype": self.dtype, "gate": self.proof.to_dict() if self.proof else None,
            "cost": [asdict(price) for price in self.prices], "commands": list(self.commands),
        }  # fmt: skip


def export(
    run: Path,
    *,
    out: Path,
    format: str = "safetensors",
    dtype: str = "auto",
    data: Path | None = None,
    max_drop_points: float = MAX_DROP_POINTS,
    most_records: int = MOST_RECORDS,
    cost: bool = False,
    max_shard_size: str = "5GB",
    overwrite: bool = False,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> ExportResult:
    """Writes a run's student for other software, and proves it before it takes its final name.

    Args:
        run: a finished run folder.
        out: folder to write; appears whole or not at all.
        format: a key of `formats.FORMATS`.
        dtype: one of the format's (fp32, bf16 and fp16 for short); auto: as trained, of graphs float32, of gguf
            float16.
        data: prepared folder whose validation records the gate scores (and int8-static is calibrated on its training
            records); None: a few synthetic records, whose logits alone are compared.
        max_drop_points: how far the AUROC of any label, or their mean, may fall, in hundredths.
        most_records: of the validation split.
        cost: measure parameters, FLOPs, latency and memory of teacher, student and export.
        max_shard_size: of a safetensors file, as transformers writes sizes.
        overwrite: replace what `out` holds.
        trust_remote_code: run Python files that came with the student.
        progress: who listens.

    Raises:
        EvlecgError: not a run, an unknown format or dtype, a missing package, a family that the format does not take,
            or an output folder that is in the way.
        RunFailed: the reloaded logits differ.
        NotAsGood: the exported student is too much worse (exit code 3).
    """
    progress = progress or Progress()
    dtype = _checked(format, dtype)
    if not (run / "student" / "config.json").is_file():
        hint = "evlecg distill leaves one; an unfinished run can be continued with --resume"
        raise EvlecgError("the folder holds no finished run", where=run, hint=hint)

    from evlecg.export import card, formats
    from evlecg.models import load as models
    from evlecg.models.trained import trained_with

    formats.check_packages(format)
    checkpoint = models.inspect(str(run), trust_remote_code=trust_remote_code)
    if format == "gguf" and checkpoint.model_type not in GGUF_FAMILIES:
        raise EvlecgError(f"llama.cpp's converter has no vision part for {checkpoint.model_type!r}", where="--format",
                          hint=f"gguf is for {', '.join(GGUF_FAMILIES)}; --format onnx runs this one")  # fmt: skip
    if dtype == "int8-static" and data is None:
        raise EvlecgError("int8-static is calibrated on records", where="--data", hint="--data DIR, or --dtype int8")
    trained = trained_with(Path(checkpoint.source))
    held = dtype if dtype in ("auto", "float32", "bfloat16", "float16") else "float32"
    held = "auto" if format == "gguf" else held  # its converter sets the type
    student = models.load(checkpoint, dtype=held)
    commands: tuple[str, ...] = ()
    prices: list[Price] = []
    with new_folder(out, overwrite) as folder:
        progress.info(f"exporting {run} ({student.n_parameters:,} parameters) to {format}, {dtype}")
        if formats.FORMATS[format].runs:
            difference, proof = _graphs(
                student, trained, folder, format, dtype, data, max_drop_points, most_records, out
            )
        else:
            formats.write_safetensors(student, trained, folder, max_shard_size=max_shard_size)
            difference = _reloaded(folder, student, trained, out)
            proof = _proof_of_files(run, folder, student, held, trained, data, max_drop_points, most_records, out)
            if format == "gguf":
                commands = _gguf(folder, out, dtype)
        for file in folder.iterdir():
            file.chmod(0o644)
        from evlecg.run import write_manifest

        if proof is not None:
            write_text_atomic(folder / GATE, json.dumps(proof.to_dict(), indent=2) + "\n")
        if cost:
            write_manifest(folder)  # the runner will not open it without
            prices = _prices(run, folder, student, trained, formats.FORMATS[format].runs, held, data, progress)
            write_text_atomic(folder / COST, json.dumps([price.to_dict() for price in prices], indent=2) + "\n")
        weights = card.weights_of(folder)
        write_text_atomic(folder / "README.md", card.card(
            run, trained, student, weights, format=format, dtype=dtype, difference=difference, proof=proof,
            prices=prices, commands=commands,
        ))  # fmt: skip
        write_manifest(folder)
        n_bytes = sum(file.stat().st_size for file in weights)
        result = ExportResult(
            out, out / weights[0].name, student.n_parameters, n_bytes, difference, format, dtype, proof, tuple(prices),
            commands,
        )  # fmt: skip
    progress.info(f"exported to {out}; reloaded, largest logit difference {difference:.1e}")
    return result


def _checked(format: str, dtype: str) -> str:
    """The dtype under its long name."""
    from evlecg.export.table import FORMATS, SHORT

    if format not in FORMATS:
        raise EvlecgError(f"unknown format {format!r}", where="--format", hint=nearest(format, FORMATS))
    known = FORMATS[format].dtypes
    dtype = SHORT.get(dtype, dtype)
    if dtype == "auto":
        return known[0]
    if dtype not in known:
        anywhere = {name for row in FORMATS.values() for name in row.dtypes}
        what = f"{format} cannot be {dtype}" if dtype in anywhere else f"unknown dtype {dtype!r}"
        raise EvlecgError(what, where="--dtype", hint=f"{format} can be {', '.join(known)}")
    return dtype


def _graphs(
    student: Loaded, trained: TrainedWith, folder: Path, format: str, dtype: str, data: Path | None,
    max_drop_points: float, most_records: int, out: Path,
) -> tuple[float, Proof]:  # fmt: skip
    """Writes graphs, opens them in their runtime and scores with them."""
    from evlecg.data.store import Prepared
    from evlecg.export import formats, gate
    from evlecg.export.prompt import questions_of
    from evlecg.models.batch import draw
    from evlecg.page.render import page_style
    from evlecg.run import open_student

    def calibration(opened: Any) -> Any:
        assert data is not None
        prepared = Prepared.open(data)
        view = opened.form if opened.form is not None else opened.size_px
        for index in prepared.indices("train").tolist()[:N_CALIBRATION]:
            yield draw(prepared, index, view, page_style(trained.page))

    formats.write_graphs(student, trained, folder, runtime=format)
    if dtype.startswith("int"):
        formats.quantise(folder, dtype, calibration)
    opened = open_student(folder)
    proof = gate.prove(
        lambda records: gate.TorchScoring(student, records, trained),
        lambda records: gate.runner_scoring(opened, records, trained),
        questions_of(student, trained), trained, data=data, max_drop_points=max_drop_points, most_records=most_records,
        where=out,
    )  # fmt: skip
    difference = proof.largest_logit_difference
    if not difference <= GRAPH_TOLERANCE.get(dtype, math.inf):
        raise RunFailed(f"the exported graphs' log odds differ by {difference:.2e}", where=out,
                        hint="nothing was kept; please report this family")  # fmt: skip
    return difference, proof


def _proof_of_files(
    run: Path, folder: Path, student: Loaded, held: str, trained: TrainedWith, data: Path | None,
    max_drop_points: float, most_records: int, out: Path,
) -> Proof | None:  # fmt: skip
    """Scores validation with the run's weights as trained and with the written ones; None without data or labels."""
    from evlecg.export import gate
    from evlecg.export.prompt import questions_of
    from evlecg.models import load as models

    if data is None or not (trained.labels or student.checkpoint.kind != "text"):
        return None
    trust = student.checkpoint.trust_remote_code
    written = models.load(models.inspect(str(folder), trust_remote_code=trust), dtype="auto")
    original = (
        student if held == "auto" else models.load(models.inspect(str(run), trust_remote_code=trust), dtype="auto")
    )
    return gate.prove(
        lambda records: gate.TorchScoring(original, records, trained),
        lambda records: gate.TorchScoring(written, records, trained),
        questions_of(student, trained), trained, data=data, max_drop_points=max_drop_points, most_records=most_records,
        where=out,
    )  # fmt: skip


def _prices(
    run: Path, folder: Path, student: Loaded, trained: TrainedWith, runs: bool, dtype: str, data: Path | None,
    progress: Progress,
) -> list[Price]:  # fmt: skip
    from evlecg.export.price import Asked, measure

    asked = [Asked("teacher", trained.teacher)] if trained.teacher and trained.teacher != "none" else []
    asked += [Asked("student", str(run)), Asked("exported", str(folder), runs=runs, dtype=dtype)]
    return measure(asked, trained=Path(student.checkpoint.source), data=data, progress=progress)


def _gguf(folder: Path, out: Path, dtype: str) -> tuple[str, ...]:
    """Runs llama.cpp's converter where it is on the path; the commands that are left otherwise."""
    script = shutil.which("convert_hf_to_gguf.py")
    kind = GGUF_TYPES[dtype]
    vision = ["--mmproj", "--outfile", f"mmproj-{'f16' if kind != 'f32' else kind}.gguf",
              "--outtype", "f16" if kind != "f32" else kind]  # fmt: skip
    parts = (["--outfile", f"model-{kind}.gguf", "--outtype", kind], vision)
    left = [f"python convert_hf_to_gguf.py {out} {part[0]} {' '.join(part[1:])}".replace(
        "--outfile ", f"--outfile {out}/") for part in parts]  # fmt: skip
    quantised = [f"llama-quantize {out}/model-f16.gguf {out}/model-Q4_K_M.gguf Q4_K_M"] if dtype == "int4" else []
    if script is None:
        return (*left, *quantised)
    for part in parts:
        placed = [str(folder / word) if word.endswith(".gguf") else word for word in part]
        done = subprocess.run([sys.executable, script, str(folder), *placed], capture_output=True, text=True)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise EvlecgError("llama.cpp's converter refused the student", where=script, hint=last)
    return tuple(quantised)


def push(folder: Path, repository: str, *, private: bool = True, progress: Progress | None = None) -> str:
    """Uploads an exported folder to a model hub, under the account that huggingface_hub is logged in with.

    Args:
        folder: what `export` wrote; it is compared with its manifest first.
        repository: owner/name; made where it does not exist.
        private: of a repository that is made.
        progress: who listens.

    Returns:
        Address of the commit.

    Raises:
        EvlecgError: the folder was changed, or the hub refuses.
    """
    from huggingface_hub import HfApi

    from evlecg.run import check_manifest

    check_manifest(folder)
    (progress or Progress()).info(f"uploading {folder} to {repository}")
    try:
        api = HfApi()
        api.create_repo(repository, private=private, exist_ok=True)
        made = api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Exported by evlecg")
    except Exception as error:  # its own errors, requests', and ValueErrors of names
        first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise EvlecgError(
            "the hub did not take the export", where=repository, hint=f"{first[:200]}; hf auth login"
        ) from error
    return str(made.commit_url)


def _reloaded(folder: Path, student: Loaded, trained: TrainedWith, out: Path) -> float:
    """Largest difference between the run's logits and those of the files in plain transformers.

    Raises:
        RunFailed: they differ.
    """
    from evlecg.export import plain

    if student.checkpoint.kind == "text":
        difference = plain.logit_difference(folder, student, trained)
    else:
        difference = plain.classifier_logit_difference(folder, student, trained)
    if not difference <= LOGIT_TOLERANCE:
        raise RunFailed(f"the exported model's logits differ by {difference:.2e}", where=out,
                        hint="nothing was kept; please report this family")  # fmt: skip
    return difference
