"""Model and prepared folder -> predictions -> report; and models against each other on the same records.

OUT/predictions.jsonl       one line for each label of each record, as it was scored
OUT/predictions_val.jsonl   the same of the validation split, on which thresholds and temperature are chosen
OUT/report.json, .md, .html
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np

from evlecg import launch
from evlecg.answering import TextProtocol, chosen_protocol, evaluate_text
from evlecg.cost import measure_cost
from evlecg.data.labels import labels_by_basis
from evlecg.data.signal_facts import BAND_FORMULAS, BANDS, bands, signal_facts
from evlecg.data.store import Prepared
from evlecg.data.tasks import chosen_labels, label_samples
from evlecg.disturbed import DISTURBANCES, DisturbedPages, check_disturbances
from evlecg.errors import EvlecgError
from evlecg.files import new_folder
from evlecg.metrics import AUROC, N_BOOT, Difference, Scored, compare, estimate
from evlecg.models import load as models
from evlecg.models.batch import draw
from evlecg.models.trained import trained_with
from evlecg.page.render import PageStyle, page_style
from evlecg.progress import Progress
from evlecg.recipe import DataConfig, PageConfig, SignalConfig
from evlecg.report import (
    Gates,
    Report,
    Robustness,
    WorstRecord,
    check_gates,
    environment,
    measure,
    on_shared,
    worst_records,
    write_report,
)
from evlecg.schema import Sample

if TYPE_CHECKING:
    from evlecg.models.score import Scorer

SPLIT_NAMES = ("train", "val", "test", "all")
THRESHOLDS_FROM = ("val", "none")
PREDICTIONS, VALIDATION = "predictions.jsonl", "predictions_val.jsonl"
QUESTIONS_READ = {"packed": "in one row a page", "shared": "from the cache of the page", "rows": "one row a question"}
N_WORST = 6  # records whose pages are drawn
WORST_PAGE_PX = (1100, 850)  # letters are still read


def evaluate(
    model: str,
    *,
    data: Path,
    out: Path,
    split: str = "test",
    labels: tuple[str, ...] = (),
    question: str | None = None,
    page: PageConfig | None = None,
    batch_size: int = 16,
    dtype: str = "float32",
    kind: str = "auto",
    signal: SignalConfig | None = None,
    bits: int | None = None,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    n_boot: int = N_BOOT,
    max_records: int | None = None,
    thresholds_from: str = "val",
    gates: Gates | None = None,
    robustness: tuple[str, ...] = (),
    cost: bool = False,
    overwrite: bool = False,
    protocol: str | None = "likelihood",
    text: TextProtocol | None = None,
    wordings: tuple[str, ...] = (),
    answers: Mapping[str, tuple[str, ...]] | None = None,
    calibration: str = "none",
    progress: Progress | None = None,
) -> Report:
    """Scores every assessed label of a split by the likelihood of "yes" against "no", and writes the report.

    Under the protocol `ecgbench` the model answers the dataset's own questions in words instead (answering.py).

    Args:
        model: run folder, export folder, checkpoint folder, hub id or builtin:NAME.
        data: prepared folder.
        out: folder for the report and its predictions; appears whole or not at all.
        split: train, val, test or all.
        labels: codes to score; empty: those it was trained on that the folder assessed, else all of the folder's.
        question: wording; None: the one that the model was trained with, else the default.
        page: page style; None: as trained, else the default.
        batch_size: records a forward pass.
        kind: "text", "image", "signal", or "auto" where the model's config is to decide.
        signal: how signals enter a model that reads them; None: as trained, else as its family wants.
        dtype, bits: as for `models.load.load`.
        trust_remote_code, allow_pickle: as for `models.load.inspect`.
        n_boot: bootstrap resamples over patients.
        max_records: score the first N records of the split only (and of validation).
        thresholds_from: val: score the validation split too, and choose thresholds and a temperature on it; it is
            passed over where there is none, and where its records are in `split`. none: do not.
        gates: what the report has to reach; the results stand in it.
        robustness: names of `DISTURBANCES`: score again under each.
        cost: measure parameters, FLOPs, latency and memory.
        overwrite: replace what `out` holds.
        protocol: `likelihood` or `ecgbench`; None: what the data and `text` call for.
        text: how answers in words are made and read; None: the defaults.
        wordings: several wordings of the question, of which the one with the highest macro AUROC on validation is
            taken; empty: `question`.
        answers: "yes" and "no" -> ways to write them, whose probabilities add up; None: as they are.
        calibration: of the likelihoods, `none` or `blank` (`models.score.Answering`).
        progress: who listens.

    Raises:
        EvlecgError: unknown names, nothing to score, or a gate that cannot be formed from what is scored.
    """
    progress = progress or Progress()
    gates = gates or Gates()
    prepared = Prepared.open(data)
    for value, known, where in (
        (split, SPLIT_NAMES, "--split"),
        (thresholds_from, THRESHOLDS_FROM, "--thresholds-from"),
    ):
        if value not in known:
            raise EvlecgError(f"unknown {where[2:]} {value!r}", where=where, hint=f"one of {', '.join(known)}")
    indices = (range(len(prepared)) if split == "all" else prepared.indices(split).tolist())[:max_records]
    text = text or TextProtocol()
    if chosen_protocol(protocol, prepared, indices, text) == "ecgbench":
        if wordings or answers:
            raise EvlecgError("the data's own questions have their own words", where="--question, --answers",
                              hint="--protocol likelihood")  # fmt: skip
        asked_of = labels if text.predictions else labels or _known_labels(model, prepared)
        if calibration != "none":
            text = dataclasses.replace(text, calibration=calibration)
        report: Any = None
        if launch.rank() == 0:  # answers in words are one process's work
            report = evaluate_text(
                model, prepared, indices, text, split=split, out=out, page=page, batch_size=batch_size, dtype=dtype,
                n_boot=n_boot, left_out=_left_out(prepared), overwrite=overwrite, progress=progress, gates=gates,
                robustness=robustness, cost=cost, labels=asked_of,
            )  # fmt: skip
        return launch.from_first(report)
    for sentence in wordings:
        if "{description}" not in sentence:
            raise EvlecgError(f"the question names no label: {sentence!r}", where="--question",
                              hint="put {description} where the label's name belongs")  # fmt: skip
    trained = trained_with(Path(models.resolve(model)[0]))
    wording = question or (wordings[0] if wordings else trained.question)
    known_labels = _known_labels(model, prepared)
    checkpoint = models.inspect(model, kind=kind, trust_remote_code=trust_remote_code, allow_pickle=allow_pickle)
    names = chosen_labels(prepared, DataConfig(labels=labels or known_labels, question=wording))
    if checkpoint.kind != "text":
        names = _names_in_head(checkpoint, names, explicit=bool(labels))
    for label in gates.min_label_auc:
        if label not in names:
            raise EvlecgError(f"the gate's label {label!r} is not scored", where="--min-label-auc",
                              hint=f"one of {', '.join(names)}")  # fmt: skip
    older = read_scored(gates.max_drop_vs) if gates.max_drop_vs is not None else None
    samples = _samples(prepared, split, max_records, names, wording)
    if not samples:
        raise EvlecgError(f"the split {split!r} has no record with an assessed label", where=data,
                          hint="--split all, or prepare more records")  # fmt: skip
    chosen_on, why_not = [], "--thresholds-from none"
    if thresholds_from == "val":
        why_not = f"the split {split!r} holds the validation records"
        if split in ("train", "test"):
            chosen_on, why_not = _samples(prepared, "val", max_records, names, wording), "there is no validation split"

    from evlecg.models.checks import check_samples  # torch loads here

    if len(wordings) > 1 and not chosen_on:
        raise EvlecgError(f"a wording cannot be chosen on validation: {why_not}", where="--question",
                          hint="give one --question, or score test with --thresholds-from val")  # fmt: skip
    check_samples(checkpoint, prepared, [*samples, *chosen_on])
    check_disturbances(checkpoint.kind, robustness)
    launch.join()
    with new_folder(out, overwrite) if launch.rank() == 0 else nullcontext() as folder:
        loaded = models.load(checkpoint, dtype=dtype, bits=bits, signal=signal)
        page = page or trained.page
        scorer = _scorer(loaded, prepared, page, samples, answers or {}, calibration)
        tried: dict[str, float | None] = {}
        if len(wordings) > 1:
            found = _try_wordings(scorer, prepared, wordings, max_records, names, batch_size, folder, progress)
            tried = launch.from_first(found)
            wording = max(tried, key=lambda sentence: tried[sentence] or 0.0)  # the first of equals
            samples = _samples(prepared, split, max_records, names, wording)
            chosen_on = _samples(prepared, "val", max_records, names, wording)
        style = page_style(page)
        _predict(scorer, samples, batch_size, folder and folder / PREDICTIONS, progress, f"score {model}")
        if chosen_on:
            told = f"score {model} on validation"
            _predict(scorer, chosen_on, batch_size, folder and folder / VALIDATION, progress, told)
        disturbed = _disturbed(scorer, samples, robustness, batch_size, style, progress)
        if folder is None:  # another process writes the report
            theirs: Any = None
            return launch.from_first(theirs)
        scored = read_scored(folder, names)
        validation = read_scored(folder, names, VALIDATION) if chosen_on else None
        group_N, about = _groups(prepared, samples)
        measured = measure(
            scored, validation, groups=group_N, group_orders=BANDS, label_groups=labels_by_basis(names),
            no_validation=why_not, n_boot=n_boot,
        )  # fmt: skip
        drops = None if older is None else {"macro AUROC": difference(older, scored, n_boot)}
        report = Report(
            model=model,
            dataset=str(prepared.manifest["dataset"]),
            split=split,
            n_records=len(scored.patient_ids),
            n_patients=len(set(scored.patient_ids)),
            measured=measured,
            left_out=_left_out(prepared),
            descriptions=prepared.label_descriptions,
            provenance=_provenance(loaded, prepared, wording, scorer, tried),
            worst=_worst(scored, prepared, samples, style, about),
            group_formulas={name: BAND_FORMULAS[name] for name in group_N if name in BAND_FORMULAS},
            robustness=_robustness(scored, disturbed, n_boot) if robustness else None,
            cost=measure_cost(loaded, scorer, samples) if cost else None,
            gates=check_gates(gates, measured.auroc, drops, measured.scores()),
        )
        write_report(report, folder)
    return launch.from_first(report)


def _known_labels(model: str, prepared: Prepared) -> tuple[str, ...]:
    """Labels that a model was trained with and the folder has."""
    trained = trained_with(Path(models.resolve(model)[0]))
    return tuple(label for label in trained.labels if label in prepared.label_names)


def _try_wordings(
    scorer: Scorer, prepared: Prepared, wordings: Sequence[str], max_records: int | None, names: Sequence[str],
    batch_size: int, folder: Path | None, progress: Progress,
) -> dict[str, float | None]:  # fmt: skip
    """Every wording of the question -> macro AUROC on validation records, on the process that writes the report."""
    tried = {}
    for number, sentence in enumerate(wordings, start=1):
        samples = _samples(prepared, "val", max_records, names, sentence)
        told = f"try wording {number} of {len(wordings)}"
        with nullcontext() if folder is None else tempfile.TemporaryDirectory(dir=folder) as held:
            path = Path(held) / PREDICTIONS if held is not None else None
            _predict(scorer, samples, batch_size, path, progress, told)
            scored = None if path is None else read_scored(path.parent, names)
        tried[sentence] = None if scored is None else estimate(AUROC, scored, n_boot=0).headline.value
    return tried


def _names_in_head(checkpoint: models.Checkpoint, names: tuple[str, ...], *, explicit: bool) -> tuple[str, ...]:
    """Of the labels that are to be scored, those that a classifier's head knows.

    Raises:
        EvlecgError: it knows none, or lacks one that was asked for by name.
    """
    found = tuple(name for name in names if name in checkpoint.labels)
    if not found or (explicit and len(found) < len(names)):
        missing = [name for name in names if name not in found]
        own = ", ".join(label for label in checkpoint.labels if label) or "none that the vocabulary knows"
        raise EvlecgError(f"the classifier has no label {', '.join(missing)}", where=checkpoint.name,
                          hint=f"its labels: {own}")  # fmt: skip
    return found


def _samples(
    prepared: Prepared, split: str, max_records: int | None, names: Sequence[str], wording: str
) -> list[Sample]:
    indices = range(len(prepared)) if split == "all" else prepared.indices(split).tolist()
    return label_samples(prepared, indices[:max_records], names, wording)


def _scorer(
    loaded: models.Loaded, prepared: Prepared, page: PageConfig, samples: Sequence[Sample],
    answers: Mapping[str, tuple[str, ...]], calibration: str,
) -> Scorer:  # fmt: skip
    import torch

    from evlecg.models.score import Answering, scorer_of

    if not hasattr(loaded.model, "hf_quantizer"):  # quantised weights are where they belong
        loaded.model.to("cuda" if torch.cuda.is_available() else "cpu")
    return scorer_of(loaded, prepared, page, samples, answering=Answering(answers, calibration))


def _predict(
    scorer: Scorer, samples: Sequence[Sample], batch_size: int, path: Path | None, progress: Progress, told: str
) -> dict[tuple[str, str], float]:
    """Scores by (record, label); every prediction is streamed to `path`, where there is one, as it comes.

    Where several processes run, each scores every so manieth batch, and all of them get all the scores.
    """
    found = {}
    batches = [samples[start : start + batch_size] for start in range(0, len(samples), batch_size)]
    with (
        path.open("w", encoding="utf-8") if path is not None else nullcontext() as stream,
        progress.task(told, len(samples)) as advance,
    ):
        for start in range(0, len(batches), launch.world()):
            turn = batches[start : start + launch.world()]
            mine = turn[launch.rank() : launch.rank() + 1]
            for prediction in launch.gathered([prediction for batch in mine for prediction in scorer.score(batch)]):
                found[prediction.record_id, prediction.label] = prediction.score
                if stream is not None:
                    stream.write(json.dumps(dataclasses.asdict(prediction)) + "\n")
            advance(sum(map(len, turn)))
    return found


def _provenance(
    loaded: models.Loaded, prepared: Prepared, question: str, scorer: Scorer, tried: Mapping[str, float | None]
) -> dict[str, object]:
    return {
        "model": {
            "family": loaded.checkpoint.model_type,
            "kind": loaded.checkpoint.kind,
            "parameters": loaded.n_parameters,
            "weights_sha256": models.weights_hash(loaded.checkpoint),
        },
        "data_fingerprint": prepared.fingerprint,
        "question": question,
        **({"question_chosen_by_validation_auroc": dict(tried)} if tried else {}),
        "answers": scorer.answering.to_dict(),
        "questions_read": f"{QUESTIONS_READ[scorer.way]} ({scorer.note})",
        "environment": environment(),
    }


def _left_out(prepared: Prepared) -> dict[str, str]:
    """Why records of the source are not in the prepared folder, with their numbers."""
    reasons = Counter(entry["reason"] for entry in prepared.quarantine())
    return {f"{count} records of the source": reason for reason, count in reasons.most_common()}


def _groups(prepared: Prepared, samples: Sequence[Sample]) -> tuple[dict[str, list[str]], dict[str, str]]:
    """What records are grouped by -> the group of every sample; record id -> what is known of it in words.

    A kind of group that is known of no record is left out.
    """
    rows = []
    about = {}
    for sample in samples:
        record = prepared.record(sample.record_index)
        facts = signal_facts(record.signal_mV, record.fs_hz)
        rows.append(bands(facts, {"sex": record.sex, "age": record.age, "device": record.device}))
        rate, noise_uV = facts.heart_rate_bpm, facts.noise_uV
        known = [
            "" if record.age is None else f"{record.age:.0f} years",
            record.sex or "",
            "" if rate is None else f"{rate:.0f}/min",
            "" if noise_uV is None else f"noise {noise_uV:.1f} µV",
        ]
        about[sample.record_id] = ", ".join(part for part in known if part)
    grouped = {name: [row[name] for row in rows] for name in BANDS}
    return {name: group_N for name, group_N in grouped.items() if any(group_N)}, about


def _worst(
    scored: Scored, prepared: Prepared, samples: Sequence[Sample], style: PageStyle, about: Mapping[str, str]
) -> tuple[WorstRecord, ...]:
    """The worst records with their pages, drawn as the model's are but large enough for a reader."""
    place = {sample.record_id: sample.record_index for sample in samples}
    worst = []
    for record in worst_records(scored, N_WORST):
        pixels = draw(prepared, place[record.record_id], WORST_PAGE_PX, style).pixels
        done, png = cv2.imencode(".png", pixels[..., ::-1], [cv2.IMWRITE_PNG_COMPRESSION, 9])
        assert done
        worst.append(dataclasses.replace(record, about=about[record.record_id], page_png=png.tobytes()))
    return tuple(worst)


def _disturbed(
    scorer: Scorer, samples: Sequence[Sample], names: Sequence[str], batch_size: int, style: PageStyle,
    progress: Progress,
) -> dict[str, dict[tuple[str, str], float]]:  # fmt: skip
    """Scores of the same records under every disturbance."""
    prepared, found = scorer.prepared, {}
    try:
        for name in names:
            scorer.prepared = DisturbedPages(prepared, name, style, scorer.view)
            found[name] = _predict(scorer, samples, batch_size, None, progress, f"score under {name}")
    finally:
        scorer.prepared = prepared
    return found


def _robustness(clean: Scored, disturbed: Mapping[str, Mapping[tuple[str, str], float]], n_boot: int) -> Robustness:
    """Every disturbance against the clean pages."""
    scored = {"clean": clean}
    for name, found in disturbed.items():
        value_NK = np.array([[found.get((record, label), np.nan) for label in clean.labels]
                             for record in clean.record_ids])  # fmt: skip
        scored[name] = clean.replaced(value_NK=value_NK)
    return Robustness(
        compare(AUROC, scored, baseline="clean", n_boot=n_boot), {name: DISTURBANCES[name].told for name in disturbed}
    )


def read_scored(folder: Path, labels: Sequence[str] | None = None, name: str = PREDICTIONS) -> Scored:
    """A report's predictions.

    Args:
        folder: report folder.
        labels: columns; None: as they come.
        name: `PREDICTIONS` or `VALIDATION`.

    Raises:
        EvlecgError: there are none, or they are damaged.
    """
    path = folder / name
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        return Scored.of_rows(rows, labels)
    except OSError as error:
        raise EvlecgError("not a report folder with predictions", where=folder,
                          hint="a folder that evlecg eval wrote") from error  # fmt: skip
    except (ValueError, KeyError, TypeError) as error:
        raise EvlecgError("predictions are damaged", where=path, hint="score the model again") from error


def difference(a: Scored, b: Scored, n_boot: int) -> Difference:
    """Macro AUROC of A minus B on the records and labels of both."""
    shared, _ = on_shared({"a": a, "b": b})
    return compare(AUROC, shared, n_boot=n_boot).pairs[0].headline
