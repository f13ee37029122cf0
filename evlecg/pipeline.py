"""The whole line in one call: find or make the data, train, train the control, score all, export.

It holds no work of its own; each stage is a job that can be run by itself.
"""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evlecg import launch
from evlecg.comparing import compare_reports, paired
from evlecg.data.readers import READERS
from evlecg.data.store import Prepared, is_prepared, read_manifest
from evlecg.data.tasks import chosen_labels
from evlecg.distill import DryRun, RunResult, distill, rehearse
from evlecg.errors import EvlecgError
from evlecg.evaluate import evaluate
from evlecg.export import ExportResult, export
from evlecg.files import write_text_atomic
from evlecg.metrics import Difference
from evlecg.models import load as models
from evlecg.prepare import find_dataset, prepare
from evlecg.progress import Progress
from evlecg.recipe import Recipe, nearest
from evlecg.report import Report, comparison_dict, comparison_markdown

DATA_ROOT = Path("data")


@dataclass(frozen=True)
class LineResult:
    """What `evlecg distill` leaves.

    Attributes:
        run: the student's run.
        data: prepared folder that was used.
        reports: (role, report), the roles `teacher`, `SFT-only` and `distilled` as far as they were asked for.
        gain: distilled minus SFT-only on the same records, where both were scored.
        exported: the exported student, where asked for.
    """

    run: RunResult
    data: Path
    reports: list[tuple[str, Report]]
    gain: Difference | None
    exported: ExportResult | None

    def to_dict(self) -> dict[str, Any]:
        return {
            "run": str(self.run.run),
            "data": str(self.data),
            "steps": self.run.steps,
            "seconds": self.run.seconds,
            **comparison_dict(self.reports),
            "distilled_minus_sft": self.gain.to_dict() if self.gain else None,
            "export": self.exported.to_dict() if self.exported else None,
        }


def run_line(
    recipe: Recipe,
    *,
    out: Path,
    resume: bool = False,
    overwrite: bool = False,
    force: bool = False,
    progress: Progress | None = None,
) -> LineResult:
    """Trains what the recipe says and does what its `finish` section asks for.

    Args:
        recipe: the whole run.
        out: run folder; the control stands in out/control, reports in out/report, the export in out/export.
        resume: go on from the newest checkpoint in `out`.
        overwrite: replace an older run.
        force: train where the memory estimate says that the run does not fit.
        progress: who listens.
    """
    progress = progress or Progress()
    data = training_data(recipe, progress)
    finish = recipe.finish
    run = distill(recipe, data=data, out=out, resume=resume, overwrite=overwrite, force=force, progress=progress)
    point_latest(out)
    distils = recipe.needs_teacher
    control = out / "control"
    if finish.control and distils:
        sft = dataclasses.replace(recipe, method="ce", name=f"{recipe.name} (SFT-only control)")
        done = (control / "run.json").is_file()
        if not (resume and done):
            distill(sft, data=data, out=control, resume=resume and control.is_dir(), force=force, progress=progress)
    reports: list[tuple[str, Report]] = []
    gain = None
    scored = finish.eval_split != "none" and bool(read_manifest(data)["label_names"])
    if finish.eval_split != "none" and not scored:
        progress.info("no AUC report: the prepared folder has no labels")
    if scored:
        wanted = [("teacher", recipe.teacher)] if finish.teacher and distils else []
        wanted += [("SFT-only", str(control))] if finish.control and distils else []
        wanted += [("distilled" if distils else "student", str(out))]
        for role, model in wanted:
            page = dataclasses.replace(recipe.page, student_size=recipe.page.teacher_size)
            folder = out / "report" / role
            is_teacher, labels = role == "teacher", recipe.data.labels
            if is_teacher:
                found = teacher_labels(recipe, data)
                if not found:
                    progress.info("no report of the teacher: its head knows none of the labels")
                    continue
                labels = labels and found
            as_teacher: dict[str, Any] = {}
            if is_teacher:
                as_teacher = {"dtype": recipe.train.teacher_dtype, "bits": recipe.train.teacher_bits}
            report = evaluate(
                model, data=data, out=folder, split=finish.eval_split, labels=labels,
                question=recipe.data.question, page=page if is_teacher else None,
                kind=recipe.teacher_kind if is_teacher else "auto",
                signal=recipe.teacher_signal if is_teacher else None,
                batch_size=recipe.train.batch_size, overwrite=True, progress=progress,
                thresholds_from=finish.thresholds_from,
                trust_remote_code=recipe.trust_remote_code, allow_pickle=recipe.allow_pickle, **as_teacher,
            )  # fmt: skip
            reports.append((role, report))
    first = launch.rank() == 0  # under accelerate launch all train and score, one process reports and exports
    if scored and first:
        if len(reports) > 1:
            folders = {role: out / "report" / role for role, _ in reversed(reports)}  # distilled minus the others
            compare_reports(folders, out=out / "report" / "paired", overwrite=True)
            if {"SFT-only", "distilled"} <= set(folders):  # by themselves: a teacher may know fewer labels
                gain = paired(folders["distilled"], folders["SFT-only"])
        about = f"{reports[0][1].dataset} ({finish.eval_split}), {reports[0][1].n_records} records\n\n"
        write_text_atomic(out / "report" / "comparison.md", about + comparison_markdown(reports))
    if not first:
        return LineResult(run, data, reports, None, None)
    exported = None
    if finish.export:
        trust = recipe.trust_remote_code
        gated = data if scored else None
        exported = export(
            out, out=out / "export", data=gated, overwrite=True, trust_remote_code=trust, progress=progress
        )
    result = LineResult(run, data, reports, gain, exported)
    write_text_atomic(out / "report" / "comparison.json", json.dumps(result.to_dict(), indent=2) + "\n")
    return result


def teacher_labels(recipe: Recipe, data: Path) -> tuple[str, ...]:
    """Of the labels that a run asks about, those that its teacher can be scored on: all, unless it is a classifier."""
    labels = chosen_labels(Prepared.open(data), recipe.data)
    teacher = models.inspect(recipe.teacher, kind=recipe.teacher_kind, trust_remote_code=recipe.trust_remote_code)
    return labels if teacher.kind == "text" else tuple(label for label in labels if label in teacher.labels)


def rehearse_line(recipe: Recipe, *, force: bool = False, progress: Progress | None = None) -> DryRun:
    """Everything up to the first steps, and what the training would take; nothing is left on disk.

    Raises:
        EvlecgError: bad input; or the data has to be prepared first.
    """
    progress = progress or Progress()
    with tempfile.TemporaryDirectory() as folder:  # for a synthetic set that is not there yet
        data = training_data(recipe, progress, made_in=Path(folder))
        return rehearse(recipe, data=data, force=force, progress=progress)


def training_data(recipe: Recipe, progress: Progress, *, made_in: Path = DATA_ROOT) -> Path:
    """The prepared folder to train on: the recipe's, else the newest in ./data, else the built-in synthetic set."""
    if recipe.data.dir is not None:
        path = Path(recipe.data.dir)
        if not is_prepared(path) and recipe.data.dir in READERS:
            return named_data(recipe.data.dir, recipe, progress, made_in=made_in)
        return path
    folders = [
        item.parent for root in data_roots() for item in root.glob("*/manifest.json") if is_prepared(item.parent)
    ]
    if folders:
        newest = max(folders, key=lambda folder: (folder / "manifest.json").stat().st_mtime)
        progress.info(f"data: {newest} (prepared last; --data DIR chooses another)")
        return newest
    progress.info("data: nothing is prepared in ./data, so the built-in synthetic set is used")
    return named_data("synthetic", recipe, progress, made_in=made_in)


def named_data(
    name_or_dir: str,
    recipe: Recipe | None = None,
    progress: Progress | None = None,
    *,
    made_in: Path = DATA_ROOT,
) -> Path:
    """The prepared folder of a dataset name or folder; a raw download is prepared first, synthetic data is made.

    Args:
        name_or_dir: dataset name or folder.
        recipe: says how large a synthetic set is.
        progress: who listens.
        made_in: where a synthetic set is made; with another than `DATA_ROOT`, raw downloads are not prepared.

    Raises:
        EvlecgError: there is none; the hint holds the commands that get and prepare it.
    """
    progress = progress or Progress()
    found = find_dataset(name_or_dir, data_roots())
    if found is not None and found.prepared:
        return found.path
    if found is not None and found.prepare_to is not None:
        if made_in != DATA_ROOT:
            raise EvlecgError(f"{found.dataset} is not prepared yet", where=found.path,
                              hint=f"evlecg prepare --dataset {found.dataset} --source {found.path} --out "
                                   f"{found.prepare_to}")  # fmt: skip
        progress.info(f"{found.path} is a raw download of {found.dataset}: preparing it in {found.prepare_to}")
        prepare(found.dataset, source=found.path, out=found.prepare_to, progress=progress)
        return found.prepare_to
    if name_or_dir == "synthetic":
        config = (recipe or Recipe()).data
        counts = {"train": config.synthetic_train, "val": config.synthetic_val, "test": config.synthetic_test}
        out = made_in / "synthetic"
        prepare("synthetic", source=None, out=out, counts=counts, progress=progress)
        return out
    if name_or_dir in READERS:
        reader = READERS[name_or_dir]
        folder = DATA_ROOT / name_or_dir  # where reader.get puts it, and where find_dataset looks
        steps = [*reader.get, f"evlecg prepare --dataset {name_or_dir} --source {folder} --out {folder}-prepared"]
        raise EvlecgError(
            f"{name_or_dir} is not in {' or '.join(str(root) for root in data_roots())}",
            hint="get and prepare it: " + " && ".join(steps),
        )
    raise EvlecgError(f"no dataset and no prepared folder {name_or_dir!r}", hint=nearest(name_or_dir, READERS))


def data_roots() -> list[Path]:
    """Where named datasets lie: ./data, then $EVLECG_DATA."""
    extra = os.environ.get("EVLECG_DATA")
    return [DATA_ROOT, *([Path(extra)] if extra else [])]


def point_latest(run: Path) -> None:
    """`latest` beside the runs in a folder called `runs` points to the newest."""
    run = run.resolve()
    if run.parent.name != "runs":
        return
    link = run.parent / "latest"
    if link.is_symlink() or not link.exists():
        partial = run.parent / f".latest-{os.getpid()}"
        partial.symlink_to(run.name)
        partial.replace(link)
