"""The command line: prepare, distill, eval, export. The only place that prints and exits.

Exit codes: 0 done, 1 failure, 2 bad input, 3 a quality gate not met; 143 and 130: stopped by SIGTERM or SIGINT (a
training run has saved by then, and `--resume` goes on). Heavy modules load inside the commands, so that
`--help` and `--version` answer at once.
"""

from __future__ import annotations

import json
import sys
import time
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from evlecg import __version__, launch
from evlecg.errors import EvlecgError, Stopped
from evlecg.progress import ConsoleProgress, Progress

if TYPE_CHECKING:
    from evlecg.prepare import PrepareSummary

GATE_NOT_MET = 3
MOST_COLUMNS = 12  # of a table in a terminal; with more labels their numbers stand in the report alone

app = typer.Typer(
    name="evlecg",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # drawing help with rich would double the time that it takes
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Distil a large ECG vision-language model into a small one (EVL-ECG, arXiv 2605.29977).\n\n"
    "Try it: evlecg distill trains, scores and exports a small student on synthetic ECGs in minutes.",
)

Json = Annotated[bool, typer.Option("--json", help="Machine-readable result on stdout; everything else on stderr.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Warnings and the result only.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="More detail.")]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run Python files that come with a checkpoint (read them first).")
]
AllowPickle = Annotated[
    bool, typer.Option("--allow-pickle", help="Read pickled weights where there are no safetensors.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what the output folder holds.")]


class Split(str, Enum):
    """Splits that can be scored."""

    train = "train"
    val = "val"
    test = "test"
    all = "all"


class Kind(str, Enum):
    """What a model reads and answers."""

    auto = "auto"
    text = "text"
    image = "image"
    signal = "signal"


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"evlecg {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


@app.command(
    epilog="Examples: evlecg prepare --list · "
    "evlecg prepare --dataset ptbxl --source ~/ptb-xl/1.0.3 --out data/ptbxl · "
    "evlecg prepare --teacher X --dataset data/ptbxl --out caches/x-ptbxl (teacher cache) · "
    "evlecg prepare --dataset ecgqa --source ecg-qa --signals ptb-xl=~/ptb-xl/1.0.3 --out data/ecgqa · "
    "evlecg prepare --join data/ptbxl --join data/synthetic=train --out data/both · "
    "accelerate launch --num_processes 8 -m evlecg.cli prepare --dataset mimic-iv-ecg --source DIR --out data/mimic",
)
def prepare(
    dataset: Annotated[str | None, typer.Option(help="Dataset name (--list shows all).")] = None,
    out: Annotated[Path | None, typer.Option(help="Prepared folder to write.")] = None,
    source: Annotated[Path | None, typer.Option(help="The download as published (not needed for synthetic).")] = None,
    labels: Annotated[
        str | None, typer.Option(help="Label set, or several joined by + (--list-labels); default: the dataset's.")
    ] = None,
    fs: Annotated[
        int | None, typer.Option(help="Sampling rate in Hz: as published where it was, else resampled to it.")
    ] = None,
    signals: Annotated[
        list[str] | None,
        typer.Option(metavar="ROOT=DIR", help="Where the signals of a dialogue dataset lie, repeatable."),
    ] = None,
    table: Annotated[Path | None, typer.Option(help="CSV of labels, for a folder that has none of its own.")] = None,
    exclude: Annotated[
        list[Path] | None,
        typer.Option(help="Prepared folder whose signals are left out, whatever their names; repeatable."),
    ] = None,
    joined: Annotated[
        list[str] | None,
        typer.Option("--join", metavar="DIR[=SPLITS]", help="Put prepared folders, or splits of them, into one."),
    ] = None,
    split: Annotated[
        str | None, typer.Option(help="With --join: draw splits anew, by patient, as TRAIN/VAL/TEST (50/10/40).")
    ] = None,
    train: Annotated[int, typer.Option(help="Synthetic training records.", min=1)] = 1000,
    val: Annotated[int, typer.Option(help="Synthetic validation records.", min=1)] = 300,
    test: Annotated[int, typer.Option(help="Synthetic test records.", min=1)] = 500,
    seed: Annotated[int, typer.Option(help="Of synthetic records, and of splits a dataset does not bring.", min=0)] = 0,
    workers: Annotated[int | None, typer.Option(help="Reading processes (default: one a core).", min=1)] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Fail if any record is rejected.")] = False,
    list_: Annotated[bool, typer.Option("--list", help="Show the datasets: size, access, licence, citation.")] = False,
    list_labels: Annotated[bool, typer.Option("--list-labels", help="Show the label sets and equivalences.")] = False,
    teacher: Annotated[
        str | None, typer.Option(help="Run this teacher on a prepared --dataset; --out becomes its cache for distill.")
    ] = None,
    recipe: Annotated[str | None, typer.Option(help="With --teacher: recipe of the runs that will read it.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="With --teacher: any recipe key, repeatable.")
    ] = None,
    compression: Annotated[
        str | None, typer.Option(help="With --teacher: none, bf16, int8 or low_rank (a quarter of fp16).")
    ] = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Turn a dataset as published into a checked, patient-disjoint, memory-mapped folder.

    With --teacher, run a teacher once on a prepared folder and keep what the losses read of it. With --join, put
    prepared folders together; a DIR=SPLITS gives these splits only, as they are. An interrupted command goes on where
    it stopped when it is repeated (--join begins anew); a finished one does nothing.
    """
    if list_ or list_labels:
        return _print_catalogue(list_labels, as_json)
    if joined or split:
        aside = {"--dataset": dataset, "--source": source, "--fs": fs, "--signals": signals, "--table": table,
                 "--teacher": teacher, "--recipe": recipe, "--set": set_, "--compression": compression}  # fmt: skip
        if given := [name for name, value in aside.items() if value]:
            raise EvlecgError(f"--join and --split read prepared folders: {', '.join(given)} has no place there",
                              where=given[0], hint="evlecg prepare --join DIR --join DIR --out DIR")  # fmt: skip
        if out is None:
            raise EvlecgError("a joint folder needs a place", where="--out", hint="--out data/NAME")
        options = {"labels": labels, "seed": seed, "exclude": exclude or [], "strict": strict, "overwrite": overwrite}
        return _join(joined or [], out, split, options, as_json, _progress(quiet, verbose))
    if dataset is None or out is None:
        missing = "--dataset" if dataset is None else "--out"
        hint = "evlecg prepare --dataset NAME --source DIR --out DIR; --list shows the names"
        raise EvlecgError("prepare needs a dataset and a folder to write", where=missing, hint=hint)
    if teacher is not None:
        given = {"teacher": teacher, "data.dir": dataset, "cache.dir": str(out), "cache.compression": compression}
        return _cache_teacher(recipe, given, set_ or [], as_json, _progress(quiet, verbose))
    from evlecg.prepare import prepare as job

    counts = {"train": train, "val": val, "test": test}
    summary = job(
        dataset, source=source, out=out, labels=labels, overwrite=overwrite, strict=strict, seed=seed, fs=fs,
        counts=counts if dataset == "synthetic" else None, signals=_named_folders(signals or []), table=table,
        exclude=tuple(exclude or ()), workers=workers, progress=_progress(quiet, verbose),
    )  # fmt: skip
    if not launch.rank():
        _print_prepared(summary, as_json)


@app.command(
    epilog="Examples: evlecg distill (the quickstart) · "
    "evlecg distill --teacher X --student Y --data data/ptbxl --out runs/mine · "
    "evlecg distill --teacher X --student Y --data data/ptbxl --cache caches/x-ptbxl (the teacher runs once) · "
    "evlecg distill --teacher none --student Y --set train.lr=1e-4 (plain fine-tuning) · "
    "evlecg distill --recipe R --out runs/mine --set evaluate.every=200 --set evaluate.patience=5 · "
    "evlecg distill --out runs/mine --resume · "
    "evlecg distill --study methods --out studies/methods --workers 2",
)
def distill(
    teacher: Annotated[str | None, typer.Option(help="Teacher: path, hub id, builtin:NAME, or none.")] = None,
    student: Annotated[str | None, typer.Option(help="Student: path, hub id or builtin:NAME.")] = None,
    data: Annotated[
        str | None, typer.Option(help="Prepared folder or dataset name (default: the newest in ./data).")
    ] = None,
    recipe: Annotated[
        str | None, typer.Option(help="Shipped recipe or YAML file (default: quickstart, where no model is named).")
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any recipe key, repeatable.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Run folder (default: runs/TIME-NAME).")] = None,
    method: Annotated[
        str | None,
        typer.Option(
            help="evl, ce (SFT-only), seqkd, kl, rkl, jsd, uld, multilevel_ot, dskd, minilm, rkd, feature or em_kd."
        ),
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the training records.")] = None,
    max_steps: Annotated[int | None, typer.Option(help="Stop after so many optimizer steps.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Records a step on each process.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of weights and order.")] = None,
    study: Annotated[
        str | None, typer.Option(help="Study file or shipped study: a grid of runs, told in one table (needs --out).")
    ] = None,
    workers: Annotated[int, typer.Option(help="Runs of a study at the same time.", min=1)] = 1,
    student_dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, float16 or auto (as stored).")] = None,
    teacher_dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, float16 or auto (as stored).")] = None,
    teacher_bits: Annotated[int | None, typer.Option(help="8 or 4: quantise the teacher while it loads.")] = None,
    cache: Annotated[
        Path | None, typer.Option(help="Teacher cache: filled where it lacks something, the teacher is run once.")
    ] = None,
    lora_rank: Annotated[int | None, typer.Option(help="Train adapters of this rank (with the projector).")] = None,
    trust_remote_code: TrustRemoteCode = False,
    allow_pickle: AllowPickle = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Checks, memory and time of a step; of a study, its table so far. Leaves nothing on disk."
        ),
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Go on where the run is not expected to fit.")] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the newest whole checkpoint in --out, to the bit.")
    ] = False,
    keep_last: Annotated[
        int | None, typer.Option(help="Checkpoints that are kept (beside the best validated one).")
    ] = None,
    track: Annotated[
        list[str] | None, typer.Option(help="tensorboard, wandb, mlflow, trackio, ...: follow the run; repeatable.")
    ] = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Train a student on a teacher; score it, its control and the teacher; export it.

    A run can be killed at any moment, and goes on with --resume as if it had not been. SIGTERM and the first SIGINT
    finish the step, save, and exit with 143 and 130; a full disk or a dead loader process exits with 1.
    """
    from evlecg.recipe import load_recipe, parse_set

    if study is not None:
        return _run_study(study, out, workers, dry_run, as_json, _progress(quiet, verbose))
    overrides: dict[str, Any] = {
        "teacher": teacher, "student": student, "data.dir": data, "method": method, "seed": seed,
        "train.epochs": epochs, "train.max_steps": max_steps, "train.batch_size": batch_size,
        "train.dtype": student_dtype, "train.teacher_dtype": teacher_dtype, "train.teacher_bits": teacher_bits,
        "cache.dir": None if cache is None else str(cache),
        "lora.rank": lora_rank, "trust_remote_code": trust_remote_code or None, "allow_pickle": allow_pickle or None,
        "checkpoint.keep_last": keep_last, "track": track or None,
    }  # fmt: skip
    if resume and out is None:
        raise EvlecgError("--resume needs the run to go on with", where="--out", hint="--out RUN")
    if recipe is None and resume:
        recipe = str(out / "recipe.yaml") if out and (out / "recipe.yaml").is_file() else None
    elif recipe is None and teacher is None and student is None:
        recipe = "quickstart"
    resolved = load_recipe(recipe, overrides | parse_set(set_ or []))
    if out is None:
        out = launch.from_first(Path("runs") / f"{time.strftime('%Y%m%d-%H%M%S')}-{resolved.name}")

    from evlecg.pipeline import rehearse_line, run_line  # torch loads here: bad recipes have failed by now

    progress = _progress(quiet, verbose)
    if dry_run:
        rehearsed = rehearse_line(resolved, force=force, progress=progress)
        if launch.rank():
            return None
        if as_json:
            return _print_json(rehearsed.to_dict())
        typer.echo(
            f"dry run: {rehearsed.total_steps} steps of {rehearsed.step_s:.3g} s: about "
            f"{_duration(rehearsed.estimated_s)} of training, start"
            + (f" and {rehearsed.evaluations} evaluations" if rehearsed.evaluations else "")
            + " included; nothing was written"
        )
        return None
    result = run_line(resolved, out=out, resume=resume, overwrite=overwrite, force=force, progress=progress)
    if launch.rank():
        return None
    if as_json:
        return _print_json(result.to_dict())
    if result.reports:
        _print_comparison(result.reports)
    if result.gain is not None and result.gain.value is not None:
        low, high = result.gain.ci95 or (float("nan"), float("nan"))
        typer.echo(
            f"distilled minus SFT-only: {result.gain.value:+.3f} macro AUC (95% interval {low:+.3f} to {high:+.3f}, "
            f"p {result.gain.p:.3f}; same records, one seed)"
        )
    typer.echo(f"run: {out} ({result.run.steps} steps, {result.run.seconds:.0f} s)")
    if result.exported is not None:
        typer.echo(f"student: {result.exported.weights}")


def _join(
    joined: list[str], out: Path, split: str | None, options: dict[str, Any], as_json: bool, progress: Progress
) -> None:
    from evlecg.joining import join, part_of, shares_of

    if launch.rank():
        return  # one process joins
    parts = [part_of(text) for text in joined]
    summary = join(parts, out=out, shares=shares_of(split) if split else None, progress=progress, **options)
    _print_prepared(summary, as_json)


def _print_prepared(summary: PrepareSummary, as_json: bool) -> None:
    if as_json:
        return _print_json(summary.to_dict())
    splits = ", ".join(f"{name} {count}" for name, count in summary.splits.items())
    typer.echo(f"{summary.out}: {summary.n_kept} records of {summary.n_patients} patients ({splits})")
    typer.echo(
        f"  read {summary.n_read}: kept {summary.n_kept} (of them repaired {summary.n_repaired}), "
        f"rejected {summary.n_rejected}, dropped {summary.n_dropped}"
    )
    for verb, counted in (("repaired", summary.repairs), ("left out", summary.reasons)):
        for what, count in counted.items():
            typer.echo(f"  {verb} {count} x {what}")
    if summary.positives:
        typer.echo("  positives: " + ", ".join(f"{label} {count}" for label, count in summary.positives.items()))
    if summary.n_questions:
        typer.echo(f"  questions: {summary.n_questions}")


def _cache_teacher(
    recipe: str | None, given: dict[str, Any], sets: list[str], as_json: bool, progress: Progress
) -> None:
    from evlecg.recipe import load_recipe, parse_set

    resolved = load_recipe(recipe, given | parse_set(sets))
    from evlecg.caching import cache_teacher
    from evlecg.pipeline import training_data

    result = cache_teacher(resolved, data=training_data(resolved, progress), progress=progress)
    if launch.rank():
        return
    if as_json:
        return _print_json(result.to_dict())
    held = result.contents
    typer.echo(f"{result.cache}: {held['rows']} rows of {held['records']} records, {held['bytes'] / 2**20:.1f} MiB "
               f"({held['share_of_fp16']:.3f} of fp16)")  # fmt: skip
    for name, told in held["fields"].items():
        typer.echo(f"  {name}: {told['bytes'] / 2**20:.1f} MiB, relative error {told['relative_error']:.2%}")


def _run_study(
    name: str, out: Path | None, workers: int, dry_run: bool, as_json: bool, progress: Progress
) -> None:  # fmt: skip
    from evlecg.study import find_study, load_study, run_study, study_table, tell

    if out is None:
        raise EvlecgError("a study needs a folder to write", where="--out", hint="--out studies/NAME")
    study = load_study(find_study(name))
    told = tell(study, out) if dry_run else run_study(study, out=out, workers=workers, progress=progress)
    if as_json:
        return _print_json(told)
    typer.echo(study_table(study, told))
    if not dry_run:
        typer.echo(f"results: {out / 'results.json'}")


@app.command(
    name="eval",
    epilog="Examples: evlecg eval --dataset ptbxl (newest run) · "
    "evlecg eval --model owner/name --dataset data/ludb --split all --out reports/ludb · "
    "evlecg eval --dataset ptbxl --min-auc 0.9 --min-label-auc AFIB=0.95 --max-drop-vs reports/last --junit gates.xml "
    "(exit code 3 where a gate is not met) · "
    "evlecg eval --compare runs/distilled runs/sft owner/teacher --dataset ptbxl",
)
def eval_(
    compared: Annotated[
        list[str] | None, typer.Argument(metavar="[MODEL]...", help="With --compare: models or report folders.")
    ] = None,
    dataset: Annotated[
        str | None, typer.Option(help="Dataset name (./data/NAME or $EVLECG_DATA/NAME) or prepared folder.")
    ] = None,
    model: Annotated[str, typer.Option(help="Run, export, checkpoint, hub id or builtin:NAME.")] = "runs/latest",
    split: Annotated[Split, typer.Option(help="What to score.")] = Split.test,
    out: Annotated[Path | None, typer.Option(help="Report folder (default: reports/TIME-DATASET-SPLIT).")] = None,
    labels: Annotated[str | None, typer.Option(help="Label codes to score, comma-separated (default: all).")] = None,
    batch_size: Annotated[int, typer.Option(help="Records a forward pass.", min=1)] = 16,
    max_records: Annotated[int | None, typer.Option(help="Score the first N records only.", min=1)] = None,
    thresholds_from: Annotated[
        str, typer.Option(help="val (score validation too, choose thresholds and a temperature on it) or none.")
    ] = "val",
    compare: Annotated[
        bool, typer.Option("--compare", help="The models named as arguments on the same records, paired.")
    ] = False,
    min_auc: Annotated[float | None, typer.Option(help="Gate: least macro AUROC.")] = None,
    min_label_auc: Annotated[
        list[str] | None, typer.Option(metavar="LABEL=AUROC", help="Gate: least AUROC of a label, repeatable.")
    ] = None,
    max_drop_vs: Annotated[
        Path | None,
        typer.Option(help="Gate: report folder that macro AUROC, or a subset's number, may not fall behind."),
    ] = None,
    max_drop: Annotated[float | None, typer.Option(help="How far it may (default: 0.01).")] = None,
    min_score: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE",
            help="Gate: least auc_hard, f1, accuracy, ...; of answers in words SUBSET or SUBSET.METRIC; repeatable.",
        ),
    ] = None,
    junit: Annotated[Path | None, typer.Option(help="JUnit XML of the gates.")] = None,
    robustness: Annotated[
        str | None, typer.Option(help="Score again under noise, lead-loss, layout, photo (comma-separated).")
    ] = None,
    cost: Annotated[bool, typer.Option("--cost", help="Measure FLOPs, latency and memory of one record.")] = False,
    kind: Annotated[Kind, typer.Option(help="What the model reads and answers (auto: its config tells).")] = Kind.auto,
    trust_remote_code: TrustRemoteCode = False,
    allow_pickle: AllowPickle = False,
    question: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SENTENCE",
            help="Wording of the yes/no question, with {description}; of several the best on validation is taken "
            "(default: as trained).",
        ),
    ] = None,
    answers: Annotated[
        list[str] | None,
        typer.Option(metavar="YES/NO", help="How yes and no are written; probabilities of several ways add up."),
    ] = None,
    calibration: Annotated[
        str, typer.Option(help="none, or blank: against the likelihoods on blank paper (for untrained models).")
    ] = "none",
    choose_by: Annotated[
        str | None,
        typer.Option(help="Multiple choice by the likeliest letter, text or line, instead of a generated answer."),
    ] = None,
    protocol: Annotated[
        str | None,
        typer.Option(
            help="likelihood (of labels) or ecgbench (answers in words; default where the data are ECGBench)."
        ),
    ] = None,
    parser: Annotated[
        str, typer.Option(help="How answers in words are read: pulse (as published) or strict.")
    ] = "pulse",
    predictions: Annotated[
        Path | None, typer.Option(help="Score these answers (jsonl, json or a folder) instead of asking a model.")
    ] = None,
    judged: Annotated[
        Path | None, typer.Option(help="A judge's verdicts on reports and the arena, file or folder.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Where an answer in words is cut off.", min=1)] = 1024,
    seed: Annotated[int, typer.Option(help="Of pulse's random letters (42: as published).")] = 42,
    overwrite: Overwrite = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Score a model by the likelihood of its answers (AUC per label), or by its answers in words (ECGBench)."""
    from evlecg.answering import TextProtocol
    from evlecg.disturbed import chosen_disturbances
    from evlecg.evaluate import evaluate
    from evlecg.pipeline import named_data
    from evlecg.report import Gates, write_junit

    progress = _progress(quiet, verbose)
    only_labels = tuple(labels.split(",")) if labels else ()
    if compared and not compare:
        raise EvlecgError(f"{compared[0]!r} is not an option", where="eval",
                          hint="--model MODEL scores one model, --compare A B several")  # fmt: skip
    gates = Gates(min_auc, _bounds(min_label_auc or [], "--min-label-auc needs LABEL=AUROC", "AFIB=0.9"), max_drop_vs,
                  **({} if max_drop is None else {"max_drop": max_drop}),
                  min_score=_bounds(min_score or [], "--min-score needs NAME=VALUE", "auc_hard=0.7"))  # fmt: skip
    asked = min_auc is not None or bool(min_label_auc) or max_drop_vs is not None or bool(min_score)
    worded: dict[str, Any] = {"wordings": tuple(question or ()), "answers": _written_as(answers or []),
                              "calibration": calibration}  # fmt: skip
    for given, needs in ((junit is not None and not asked, "--junit"), (max_drop is not None and not max_drop_vs,
                         "--max-drop")):  # fmt: skip
        if given:
            any_gate = "--min-auc, --min-label-auc, --min-score or --max-drop-vs"
            hint = "--max-drop-vs REPORT" if needs == "--max-drop" else any_gate
            raise EvlecgError(f"{needs} needs a gate", where=needs, hint=hint)
    if compare and (asked or robustness or cost):
        raise EvlecgError("gates, --robustness and --cost are of one model", where="--compare",
                          hint="score each model by itself, then compare the report folders")  # fmt: skip
    if compare:
        return _compare(
            compared or [], dataset, out, as_json, overwrite, progress, split=split.value, labels=only_labels,
            batch_size=batch_size, max_records=max_records, thresholds_from=thresholds_from, kind=kind.value,
            trust_remote_code=trust_remote_code, allow_pickle=allow_pickle, **worded,
        )  # fmt: skip
    if dataset is None:
        raise EvlecgError("eval needs a dataset", where="--dataset", hint="evlecg eval --dataset NAME")
    disturbances = chosen_disturbances(robustness or "")
    data = named_data(dataset, progress=progress)
    if predictions is None and model == "runs/latest" and not Path(model).exists():
        raise EvlecgError("there is no run to score yet", where=model, hint="evlecg distill, or --model MODEL")
    if out is None:
        named = f"{time.strftime('%Y%m%d-%H%M%S')}-{Path(dataset).name}-{split.value}"
        out = launch.from_first(Path("reports") / named)
    report = evaluate(
        model, data=data, out=out, split=split.value, labels=only_labels, batch_size=batch_size,
        max_records=max_records, thresholds_from=thresholds_from, gates=gates, robustness=disturbances, cost=cost,
        kind=kind.value, trust_remote_code=trust_remote_code, allow_pickle=allow_pickle, overwrite=overwrite,
        protocol=protocol, text=TextProtocol(parser, predictions, judged, max_new_tokens, seed, choose_by),
        progress=progress, **worded,
    )  # fmt: skip
    if launch.rank():
        return
    if junit is not None:
        write_junit(junit, report.gates, f"{model} on {report.dataset} ({report.split})")
    if as_json:
        _print_json(report.to_dict())
    else:
        if report.text is not None:
            title, columns, rows = report.text.tables()[0]
            _print_table(f"{report.model} on {report.dataset}, {report.split}. {title}", columns, rows)
        else:
            _print_comparison([(model, report)])
        for gate in report.gates:
            typer.echo(f"{'met' if gate.met else 'NOT MET'}: {gate.name}: {gate.detail}")
        typer.echo(f"report: {out / 'report.html'}")
    if not report.gates_met:
        raise typer.Exit(GATE_NOT_MET)


def _compare(
    named: list[str], dataset: str | None, out: Path | None, as_json: bool, overwrite: bool, progress: Progress,
    **scoring: Any,
) -> None:  # fmt: skip
    """Scores those that are not reports yet, then all against each other."""
    from evlecg.comparing import compare_reports, is_report
    from evlecg.evaluate import evaluate
    from evlecg.pipeline import named_data

    if len(set(named)) < 2:
        raise EvlecgError("a comparison needs two models or more", where="--compare",
                          hint="evlecg eval --compare A B --dataset NAME")  # fmt: skip
    to_score = [name for name in named if not is_report(Path(name))]
    if to_score and dataset is None:
        raise EvlecgError(f"{to_score[0]} is not a report folder, hence is to be scored", where="--dataset",
                          hint="evlecg eval --compare A B --dataset NAME")  # fmt: skip
    out = out or launch.from_first(Path("reports") / f"{time.strftime('%Y%m%d-%H%M%S')}-compared")
    short = {name: Path(name).name for name in named}
    if len(set(short.values())) < len(short):
        short = {name: name for name in named}
    folders = {}
    for place, name in enumerate(dict.fromkeys(named)):
        folders[short[name]] = Path(name)
        if name in to_score:
            assert dataset is not None
            folders[short[name]] = out.with_name(f"{out.name}-{place + 1}-{Path(name).name.replace(':', '-')}")
            evaluate(
                name, data=named_data(dataset, progress=progress), out=folders[short[name]], overwrite=overwrite,
                progress=progress, **scoring,
            )  # fmt: skip
    if launch.rank():
        return None
    found = compare_reports(folders, out=out, overwrite=overwrite)
    if as_json:
        return _print_json(found.to_dict())
    typer.echo((out / "comparison.md").read_text(encoding="utf-8"))
    typer.echo(f"comparison: {out / 'comparison.html'}")


def _bounds(pairs: list[str], what: str, example: str) -> dict[str, float]:
    """`AF=0.9` -> name and bound."""
    bounds = {}
    for pair in pairs:
        name, _, least = pair.rpartition("=")
        try:
            bounds[name] = float(least)
        except ValueError:
            name = ""
        if not name:
            raise EvlecgError(what, where=pair, hint=f"for example {example}")
    return bounds


def _written_as(pairs: list[str]) -> dict[str, tuple[str, ...]] | None:
    """`Yes/No` -> how the answers yes and no are written."""
    parts = [pair.split("/") for pair in pairs]
    for pair, part in zip(pairs, parts, strict=True):
        if len(part) != 2 or not all(word.strip() for word in part):
            raise EvlecgError("--answers needs YES/NO", where=pair, hint="for example --answers Yes/No")
    return {"yes": tuple(yes for yes, _ in parts), "no": tuple(no for _, no in parts)} if parts else None


@app.command(
    epilog="Examples: evlecg export runs/latest --out student · "
    "evlecg export runs/latest --format onnx --dtype int8 --cost --out student-int8 "
    "(then python -m evlecg.run student-int8 record.hea, without torch) · "
    "evlecg export runs/latest --out student --push-to-hub owner/name",
)
def export(
    run: Annotated[Path, typer.Argument(help="Run folder.")],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    format: Annotated[str, typer.Option(help="safetensors, onnx, openvino or gguf.")] = "safetensors",
    dtype: Annotated[
        str,
        typer.Option(help="auto, fp32, bf16, fp16; of onnx also int8, int8-static (calibrated), int4."),
    ] = "auto",
    data: Annotated[
        str | None, typer.Option(help="Dataset name or prepared folder for the gate (default: the run's).")
    ] = None,
    max_drop: Annotated[
        float, typer.Option(help="Gate: points of AUROC that a label, or their mean, may lose (exit code 3).", min=0)
    ] = 0.5,
    max_records: Annotated[int, typer.Option(help="Gate: validation records at most.", min=1)] = 1000,
    gate: Annotated[
        bool, typer.Option("--gate/--no-gate", help="Score validation again, in the export's own runtime.")
    ] = True,
    cost: Annotated[
        bool, typer.Option("--cost", help="Measure size, FLOPs, latency and memory beside student and teacher.")
    ] = False,
    max_shard_size: Annotated[str, typer.Option(help="Of a safetensors file.")] = "5GB",
    push_to_hub: Annotated[
        str | None, typer.Option(metavar="OWNER/NAME", help="Upload the export to a model hub (private).")
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Write the student alone, load it in its own runtime, and score it beside the run's."""
    from evlecg.export import export as job
    from evlecg.export import push

    progress = _progress(quiet, verbose)
    there = (run / "student").is_dir()  # otherwise the job says what is wrong
    gated = _gate_data(run, data, progress) if gate and there else None
    result = job(
        run, out=out, format=format, dtype=dtype, data=gated,
        max_drop_points=max_drop, most_records=max_records, cost=cost, max_shard_size=max_shard_size,
        overwrite=overwrite, trust_remote_code=trust_remote_code, progress=progress,
    )  # fmt: skip
    pushed = push(out, push_to_hub, progress=progress) if push_to_hub else None
    if as_json:
        return _print_json(result.to_dict() | {"pushed": pushed})
    typer.echo(f"student: {result.weights} ({result.n_parameters:,} parameters, {result.n_bytes:,} bytes)")
    proof = result.proof
    if proof is not None and proof.original:
        worst, points = proof.worst
        typer.echo(f"gate: {proof.n_records} validation records, largest drop {points:.2f} points of AUROC ({worst})")
    for command in result.commands:
        typer.echo(f"left to do: {command}")
    if pushed:
        typer.echo(f"pushed: {pushed}")


def _gate_data(run: Path, given: str | None, progress: Progress) -> Path:
    """The prepared folder that an export is scored on: the one that is named, else the run's, known by its content."""
    from evlecg.data.store import Prepared, is_prepared
    from evlecg.pipeline import data_roots, named_data
    from evlecg.recipe import load_recipe

    if given is not None:
        return named_data(given, progress=progress)
    if not (run / "run.json").is_file():
        raise EvlecgError("the run does not say which data it was trained on", where=run,
                          hint="--data DIR, or --no-gate")  # fmt: skip
    made = json.loads((run / "run.json").read_text(encoding="utf-8"))["data"]["fingerprint"]
    named = load_recipe(str(run / "recipe.yaml"), {}).data.dir
    folders = [Path(named)] if named else []
    folders += [item.parent for root in data_roots() for item in sorted(root.glob("*/manifest.json"))]
    for folder in folders:
        if is_prepared(folder) and Prepared.open(folder).fingerprint == made:
            return folder
    raise EvlecgError("the data that the run was trained on is neither where it was nor in ./data", where=run,
                      hint="--data DIR, or --no-gate")  # fmt: skip


def main() -> None:
    """The console script."""
    try:
        code = app(standalone_mode=False)
    except EvlecgError as error:
        _fail(error)
        code = error.exit_code
    except KeyboardInterrupt:
        typer.echo("interrupted", err=True)
        code = 130
    except typer.Abort:
        code = 1
    except Exception as error:
        code = _usage(error)
        if code is None:
            raise
    sys.exit(code or 0)


def _usage(error: Exception) -> int | None:
    """Exit code of a mistyped command line, None for any other error."""
    show = getattr(error, "show", None)
    if show is None or not hasattr(error, "exit_code"):
        return None
    show()
    return int(getattr(error, "exit_code"))  # noqa: B009


def _fail(error: EvlecgError) -> None:
    typer.echo(f"{error}" if isinstance(error, Stopped) else f"error: {error}", err=True)
    if "--json" in sys.argv:
        _print_json({"error": {"what": error.what, "where": error.where, "hint": error.hint}})


def _named_folders(pairs: list[str]) -> dict[str, Path]:
    folders = {}
    for pair in pairs:
        name, equals, folder = pair.partition("=")
        if not (name and equals and folder):
            raise EvlecgError(
                "--signals needs ROOT=DIR", where=pair, hint="for example --signals ptb-xl=~/ptb-xl/1.0.3"
            )
        folders[name] = Path(folder).expanduser()
    return folders


def _print_catalogue(labels: bool, as_json: bool) -> None:
    from evlecg.data.catalogue import datasets
    from evlecg.data.catalogue import labels as label_catalogue

    if as_json:
        return _print_json(label_catalogue() if labels else datasets())
    if labels:
        known = label_catalogue()
        for name, codes in known["sets"].items():
            typer.echo(f"{name} ({len(codes)})")
            for code, phrase in codes.items():
                typer.echo(f"  {code:<10} {phrase}")
        typer.echo("equivalent codes of the CinC challenges")
        for label, names in known["equivalences"].items():
            typer.echo(f"  {label:<10} {' = '.join(names)}")
        typer.echo("SNOMED codes without a label")
        for code, why in known["without_label"].items():
            typer.echo(f"  {code:<16} {why}")
        return
    for name, about in datasets().items():
        unknown_size = "as large as what you bring" if about["get"] else "no download"
        known = [
            about["title"],
            f"{about['records']:,} records" if about["records"] else "",
            f"download about {about['download_GB']:g} GB" if about["download_GB"] else unknown_size,
            f"prepared about {about['prepared_GB']:g} GB" if about["prepared_GB"] else "",
            about["licence"],
            about["access"],
        ]
        typer.echo(f"{name}: " + " · ".join(part for part in known if part))
        for key in ("needs", "labels", "citation", "url"):
            if about[key]:
                typer.echo(f"  {key}: {about[key]}")
        for command in about["get"]:
            typer.echo(f"  get: {command}")


def _progress(quiet: bool, verbose: bool) -> Progress:
    if launch.rank():
        return Progress()
    return ConsoleProgress(-1 if quiet else int(verbose))


def _duration(seconds: float) -> str:
    """Seconds, minutes or hours, whichever reads best."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _print_json(tree: dict[str, Any]) -> None:
    typer.echo(json.dumps(tree, indent=2, ensure_ascii=False))


def _print_comparison(reports: list[tuple[str, Any]]) -> None:
    from evlecg.report import comparison_table

    first = reports[0][1]
    columns, rows = comparison_table(reports)
    if len(columns) > MOST_COLUMNS:
        columns, rows = columns[:2], [row[:2] for row in rows]
    title = f"{first.dataset}, {first.split}: {first.n_records} records, {first.n_patients} patients"
    _print_table(title, columns, rows)


def _print_table(title: str, columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for column in columns:
        table.add_column(column, no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console = Console(markup=False, width=None if sys.stdout.isatty() else 200)
    console.print(table)


if __name__ == "__main__":
    main()
