"""A prepared folder's own questions -> a model's answers as text (made here, or a file) -> a report of them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evlecg.cost import TIMED, WARM_UP, measure_calls
from evlecg.data.dialogues import split_options
from evlecg.data.store import Prepared
from evlecg.data.tasks import training_samples
from evlecg.disturbed import DISTURBANCES, DisturbedPages
from evlecg.errors import EvlecgError, RunFailed
from evlecg.files import kept_folder, new_folder, write_text_atomic
from evlecg.metrics import ACCURACY, AUC_HARD, compare
from evlecg.models import load as models
from evlecg.models.encode import Turn
from evlecg.models.trained import trained_with
from evlecg.page.render import page_style
from evlecg.progress import Progress
from evlecg.protocol import (
    PARSERS,
    SUBSETS,
    Item,
    Joined,
    Reply,
    ReplyLog,
    TextScores,
    Verdicts,
    join,
    model_of,
    read_replies,
    read_verdicts,
    score,
)  # fmt: skip
from evlecg.protocol.bench import LABELS, OPEN
from evlecg.protocol.past import PARSED, Rows, check_questions, drops_since, read_parsed
from evlecg.recipe import DataConfig, PageConfig, nearest, page_size
from evlecg.report import Cost, Gates, Report, Robustness, check_gates, counted, environment, write_report
from evlecg.schema import Question, Sample

PROTOCOLS = ("likelihood", "ecgbench")
PREDICTIONS, WORK = "predictions.jsonl", "work.json"
CHOOSE_BY = ("line", "letter", "text")  # of models.score.OPTIONS, which this module does not load torch to read


@dataclass(frozen=True)
class TextProtocol:
    """How answers as text are made and read.

    Attributes:
        parser: `pulse` (as published) or `strict`.
        predictions: file or folder of answers made elsewhere; None: the model answers.
        judged: file or folder of a judge's verdicts on free-text answers.
        max_new_tokens: where an answer is cut off.
        seed: of the random letters of `pulse`.
        choose_by: `line`, `letter` or `text`: questions with options are answered by the likeliest option, written so
            (`models.score.Answering`); None: answers are generated.
        calibration: of those likelihoods, `none` or `blank`.
    """

    parser: str = "pulse"
    predictions: Path | None = None
    judged: Path | None = None
    max_new_tokens: int = 1024
    seed: int = 42
    choose_by: str | None = None
    calibration: str = "none"

    def __post_init__(self) -> None:
        if self.choose_by is not None and self.choose_by not in CHOOSE_BY:
            raise EvlecgError(f"unknown way to choose {self.choose_by!r}", where="--choose-by",
                              hint=f"one of {', '.join(CHOOSE_BY)}")  # fmt: skip
        if self.predictions is not None and self.choose_by is not None:
            raise EvlecgError("answers that were made elsewhere are not chosen here", where="--choose-by",
                              hint="leave --predictions or --choose-by out")  # fmt: skip
        if self.calibration != "none" and self.choose_by is None:
            raise EvlecgError("generated answers are not calibrated", where="--calibration",
                              hint="--choose-by letter, or --protocol likelihood")  # fmt: skip
        if self.parser not in PARSERS:
            raise EvlecgError(f"unknown parser {self.parser!r}", where="--parser", hint=nearest(self.parser, PARSERS))
        if self.max_new_tokens < 1:
            raise EvlecgError("an answer has at least one token", where="--max-new-tokens")


@dataclass(frozen=True)
class _Asked:
    """An item, and how it is put to a model."""

    item: Item
    record_index: int
    question: Question
    before: Item | None  # the turn of its dialogue in front of it


def chosen_protocol(protocol: str | None, prepared: Prepared, indices: Sequence[int], text: TextProtocol) -> str:
    """The protocol that was named; else `ecgbench` for given predictions and for data with ECGBench's questions.

    Raises:
        EvlecgError: an unknown protocol, or predictions together with likelihoods.
    """
    if protocol is not None and protocol not in PROTOCOLS:
        raise EvlecgError(f"unknown protocol {protocol!r}", where="--protocol", hint=nearest(protocol, PROTOCOLS))
    if protocol == "likelihood" and (text.predictions or text.judged or text.choose_by):
        raise EvlecgError("predictions, verdicts and options are of answers in words, not of likelihoods",
                          where="--protocol", hint="--protocol ecgbench")  # fmt: skip
    if protocol is not None:
        return protocol
    if text.predictions or text.judged or text.choose_by or not prepared.label_names:
        return "ecgbench"
    has_bench = any(
        question.kind in SUBSETS for index in indices[:1] for question in prepared.questions(int(index))
    )  # a prepared folder is of one dataset
    return "ecgbench" if has_bench else "likelihood"


def evaluate_text(
    model: str,
    prepared: Prepared,
    indices: Sequence[int],
    text: TextProtocol,
    *,
    split: str,
    out: Path,
    page: PageConfig | None,
    batch_size: int,
    dtype: str,
    n_boot: int,
    left_out: Mapping[str, str],
    overwrite: bool,
    progress: Progress,
    gates: Gates | None = None,
    robustness: tuple[str, ...] = (),
    cost: bool = False,
    labels: tuple[str, ...] = (),
) -> Report:
    """Asks a model the folder's own questions (or takes the answers of a file), reads and scores the answers.

    The folder `out` gets the report, predictions.jsonl (every answer, as published scorers read it) and parsed.jsonl
    (what was read off each); under disturbed pages predictions_NAME.jsonl. An interrupted run goes on where it stopped
    when it is started again in the same way.

    Where options are to be chosen among and the folder has labels only, multiple-choice questions are made of them.

    Raises:
        EvlecgError: no questions, predictions that do not fit them, or a gate on a score that is not there.
    """
    gates = gates or Gates()
    older = None if gates.max_drop_vs is None else read_parsed(gates.max_drop_vs, text.parser)
    if text.predictions is not None and (robustness or cost):
        raise EvlecgError("answers made elsewhere have no cost here, and no other pages", where="--predictions",
                          hint="leave --robustness and --cost out")  # fmt: skip
    asked = _asked(prepared, indices)
    left_out = dict(left_out)
    if text.choose_by is not None:
        asked = asked or _asked(prepared, indices, _of_labels(prepared, indices, labels))
        asked = _choosable(asked, text.choose_by, left_out)
    if not asked:
        raise EvlecgError(f"the split {split!r} has no question of the dataset's own", where=prepared.path,
                          hint="--protocol likelihood scores labels")  # fmt: skip
    items = [entry.item for entry in asked]
    if older is not None and gates.max_drop_vs is not None:
        check_questions(older, items, text.parser, where=gates.max_drop_vs)
    verdicts = None
    if text.judged is not None:  # before hours of work that a mistake in the file would lose
        judged = [entry.item for entry in asked if _is_open(entry.item) and not entry.question.history]
        verdicts = read_verdicts(text.judged, judged)
    if text.predictions is not None:
        replies = read_replies(text.predictions)
        joined = join(items, replies)
        if not joined.pairs:
            raise EvlecgError(f"none of {len(replies)} predictions is on one of the {len(items)} questions",
                              where=text.predictions, hint=_example_ids(items, replies))  # fmt: skip
        provenance: dict[str, Any] = {"model": {"predictions": str(text.predictions)}}
        name = model_of(replies, str(text.predictions))
        with new_folder(out, overwrite) as folder:
            return _written(
                name, prepared, split, joined, text, verdicts, folder, n_boot, left_out, provenance, gates, older
            )

    checkpoint = models.inspect(model)
    page = page or trained_with(Path(checkpoint.source)).page
    work = {
        "model": model, "weights": models.weights_hash(checkpoint), "data": prepared.fingerprint,
        "page": repr(page), "dtype": dtype, "max_new_tokens": text.max_new_tokens,
        "choose_by": text.choose_by, "calibration": text.calibration,
        "questions": hashlib.sha256(repr(items).encode()).hexdigest(),
    }  # fmt: skip
    with _resumable(out, overwrite, work, progress) as folder:
        write_text_atomic(folder / WORK, json.dumps(work, indent=2) + "\n")
        loaded = models.load(checkpoint, dtype=dtype)
        answerer = _answerer(loaded, prepared, asked, page, text)
        pages: dict[str, Prepared] = {"": prepared}
        pages |= {name: DisturbedPages(prepared, name, page_style(page), answerer.view) for name in robustness}
        with ExitStack() as stack:
            logs = {name: stack.enter_context(ReplyLog(folder / _file(name))) for name in pages}
            try:
                for name, log in logs.items():
                    answerer.use(pages[name])
                    told = f"answer {model}" + (f" under {name}" if name else "")
                    _answer(answerer, asked, log, batch_size, model, told, progress)
            except EvlecgError as error:
                if not any(log.texts for log in logs.values()):
                    raise
                raise RunFailed(error.what, where=error.where, hint=error.hint) from error  # the answers so far stay
            answerer.use(prepared)
        joined = join(items, read_replies(folder / PREDICTIONS))
        disturbed = {name: join(items, read_replies(folder / _file(name))) for name in robustness}
        measured = None
        if cost:
            first = [entry for entry in asked if entry.before is None][: WARM_UP + TIMED]
            measured = measure_calls(
                loaded, [lambda entry=entry: answerer.answer([(entry, entry.question)]) for entry in first],
                n_questions=1, unit="One answer at a time",
            )  # fmt: skip
        provenance = {
            "model": {"family": checkpoint.model_type, "parameters": loaded.n_parameters,
                      "weights_sha256": work["weights"]},
            **answerer.provenance(),
        }  # fmt: skip
        return _written(
            model, prepared, split, joined, text, verdicts, folder, n_boot, left_out, provenance, gates, older,
            measured, disturbed,
        )  # fmt: skip


def _choosable(asked: Sequence[_Asked], by: str, left_out: dict[str, str]) -> list[_Asked]:
    """The questions whose options can be chosen among in that way; of the others `left_out` says why not."""
    from evlecg.models.score import letter_and_text

    kept: list[_Asked] = []
    passed: Counter[str] = Counter()
    for entry in asked:
        choices = entry.question.choices
        if len(choices) < 2:
            passed["without options"] += 1
        elif by == "letter" and not all(letter_and_text(entry.question, choice)[0] for choice in choices):
            passed["with options that have no letters"] += 1
        else:
            kept.append(entry)
    left_out |= {
        f"{counted(count, 'question')} {what}": f"options are chosen by {by}" for what, count in passed.items()
    }
    return kept


def _file(disturbance: str) -> str:
    return PREDICTIONS.replace(".", f"_{disturbance}.") if disturbance else PREDICTIONS


def _of_labels(prepared: Prepared, indices: Sequence[int], labels: tuple[str, ...]) -> list[tuple[int, int, Question]]:
    """Multiple-choice questions of the records' labels: (record, place, question)."""
    if not prepared.label_names:
        return []
    made = training_samples(prepared, indices, DataConfig(labels=labels, tasks=("multiple_choice",)), seed=0)
    return [(sample.record_index, place, question)
            for sample in made for place, question in enumerate(sample.questions)]  # fmt: skip


def _resumable(out: Path, overwrite: bool, work: Mapping[str, Any], progress: Progress) -> AbstractContextManager[Path]:
    """A folder in which the same work goes on, and other work starts anew."""

    def same(partial: Path) -> bool:
        try:
            found = json.loads((partial / WORK).read_text(encoding="utf-8")) == work
        except (OSError, ValueError):
            return False
        if found:
            progress.info("going on with the answers of an interrupted run")
        return found

    return kept_folder(out, overwrite, keep=same)


def _asked(
    prepared: Prepared, indices: Sequence[int], listed: Sequence[tuple[int, int, Question]] | None = None
) -> list[_Asked]:
    """Every question of the records; the id of one is its dataset's, made unique where that is not.

    Args:
        listed: (record, place, question); None: the dataset's own.
    """
    if listed is None:
        listed = [(int(index), place, question) for index in indices
                  for place, question in enumerate(prepared.questions(int(index)))]  # fmt: skip
    often = Counter((question.kind, question.id) for _, _, question in listed)
    asked: list[_Asked] = []
    turns: dict[tuple[int, str, tuple[tuple[str, str], ...]], Item] = {}
    for index, place, question in listed:
        unique = question.id and often[(question.kind, question.id)] == 1
        item_id = question.id if unique else f"{prepared.record_ids[index]}#{place + 1}"
        item = Item(
            id=item_id, subset=question.kind, record_id=prepared.record_ids[index],
            patient_id=prepared.patient_ids[index], prompt=question.text, answer=question.answer,
            options=question.choices, right_options=split_options(question.answer),
        )  # fmt: skip
        before = turns.get((index, question.history[-1][0], question.history[:-1])) if question.history else None
        turns.setdefault((index, question.text, question.history), item)
        asked.append(_Asked(item, index, question, before))
    return asked


class _Answerer:
    """How answers are made; this one generates them.

    Attributes:
        view: size of the pages.
    """

    def __init__(self, loaded: models.Loaded, prepared: Prepared, asked: Sequence[_Asked], page: PageConfig,
                 text: TextProtocol) -> None:  # fmt: skip
        from evlecg.models.generate import Generator

        self.generator = Generator(loaded, prepared, page_style(page), size_px=page_size(page.student_size),
                                   max_new_tokens=text.max_new_tokens)  # fmt: skip
        self.generator.prove(asked[0].record_index, [_put(entry.question) for entry in asked])
        self.view = self.generator.encoder.size_px

    def use(self, prepared: Prepared) -> None:
        """Other pages of the same records."""
        self.generator.prepared = prepared

    def batches(self, questions: Sequence[Question], batch_size: int) -> Sequence[Sequence[int]]:
        return self.generator.batches([_put(question) for question in questions], batch_size)

    def answer(self, batch: Sequence[tuple[_Asked, Question]]) -> list[tuple[str, dict[str, Any]]]:
        """Text and metadata of every answer."""
        made = self.generator.generate([(entry.record_index, _put(question)) for entry, question in batch])
        return [(answer.text, {"n_tokens": answer.n_tokens, "ended": answer.ended}) for answer in made]

    def provenance(self) -> dict[str, Any]:
        made = self.generator
        batched = "several lengths, padded on the left" if made.padded else f"one length ({made.padding_note})"
        return {"generation": {"temperature": 0, "max_new_tokens": made.max_new_tokens, "batched": batched}}


class _Chooser(_Answerer):
    """Answers with the likeliest option."""

    def __init__(self, loaded: models.Loaded, prepared: Prepared, asked: Sequence[_Asked], page: PageConfig,
                 text: TextProtocol) -> None:  # fmt: skip
        from evlecg.models.score import Answering, Scorer

        answering = Answering(options=text.choose_by or "line", calibration=text.calibration)
        self.scorer = Scorer(
            loaded, prepared, page_style(page), size_px=page_size(page.student_size), answering=answering
        )
        if isinstance(self.scorer.view, tuple):
            self.view = self.scorer.view
        most = max(asked, key=lambda entry: len(entry.question.choices))
        self.scorer.prove(Sample(most.record_index, most.item.record_id, (most.question,)))

    def use(self, prepared: Prepared) -> None:
        self.scorer.prepared = prepared

    def batches(self, questions: Sequence[Question], batch_size: int) -> Sequence[Sequence[int]]:
        places = range(len(questions))
        return [places[start : start + batch_size] for start in range(0, len(places), batch_size)]

    def answer(self, batch: Sequence[tuple[_Asked, Question]]) -> list[tuple[str, dict[str, Any]]]:
        from evlecg.models.score import letter_and_text

        samples = [Sample(entry.record_index, entry.item.record_id, (question,)) for entry, question in batch]
        answers = []
        for chosen in self.scorer.choose(samples):
            said = letter_and_text(chosen.question, chosen.choice)[0] or chosen.choice
            answers.append((said, {"p": dict(zip(chosen.question.choices, chosen.p_C.tolist(), strict=True))}))
        return answers

    def provenance(self) -> dict[str, Any]:
        return {"answers": self.scorer.answering.to_dict(), "questions_read": f"{self.scorer.way} ({self.scorer.note})"}


def _answerer(
    loaded: models.Loaded, prepared: Prepared, asked: Sequence[_Asked], page: PageConfig, text: TextProtocol
) -> _Answerer:
    import torch

    loaded.model.to("cuda" if torch.cuda.is_available() else "cpu")
    kind = _Answerer if text.choose_by is None else _Chooser
    return kind(loaded, prepared, asked, page, text)


def _put(question: Question) -> Turn:
    """A question as a turn whose answer is open."""
    return Turn(question.text, "", ends=False, history=question.history)


def _answer(
    answerer: _Answerer, asked: Sequence[_Asked], log: ReplyLog, batch_size: int, name: str, told: str,
    progress: Progress,
) -> None:  # fmt: skip
    """Answers what the log does not have.

    A dialogue goes on from the model's own answers, as in use and as published, not from the right ones.
    """
    by_item = {(entry.item.subset, entry.item.id): entry for entry in asked}
    open_ = [entry for entry in asked if entry.item not in log]
    with progress.task(told, len(asked)) as advance:
        advance(len(asked) - len(open_))
        while open_:
            ready = [entry for entry in open_ if entry.before is None or entry.before in log]
            questions = [_question(entry, by_item, log) for entry in ready]
            for places in answerer.batches(questions, batch_size):
                batch = [(ready[place], questions[place]) for place in places]
                for (entry, _), (said, metadata) in zip(batch, answerer.answer(batch), strict=True):
                    log.add(entry.item, said, model=name, **metadata)
                advance(len(batch))
            open_ = [entry for entry in open_ if entry.item not in log]


def _question(entry: _Asked, by_item: Mapping[tuple[str, str], _Asked], log: ReplyLog) -> Question:
    """The question with what the model itself said before it."""
    history = list(entry.question.history)
    place, before = len(history) - 1, entry.before
    while before is not None:
        key = (before.subset, before.id)
        history[place] = (history[place][0], log.texts[key])
        place, before = place - 1, by_item[key].before
    return dataclasses.replace(entry.question, history=tuple(history))


def _written(
    name: str, prepared: Prepared, split: str, joined: Joined, text: TextProtocol, verdicts: Verdicts | None,
    folder: Path, n_boot: int, left_out: Mapping[str, str], provenance: Mapping[str, Any], gates: Gates,
    older: Rows | None,
    cost: Cost | None = None, disturbed: Mapping[str, Joined] | None = None,
) -> Report:  # fmt: skip
    """Scores, writes parsed.jsonl, predictions.jsonl where it was made elsewhere, and the report."""
    scores = score(joined, parser=text.parser, verdicts=verdicts, n_boot=n_boot, seed=text.seed)
    drops = None if older is None else drops_since(older, scores, n_boot=n_boot)
    if not (folder / PREDICTIONS).exists():
        with ReplyLog(folder / PREDICTIONS) as log:
            for item, reply in joined.pairs:
                asked = dataclasses.replace(item, prompt=reply.prompt or item.prompt)
                log.add(asked, reply.text, model=reply.model or name, source=reply.where)
    lines = [json.dumps(read.to_dict()) + "\n" for read in scores.reads]
    write_text_atomic(folder / PARSED, "".join(lines))
    report = dataclasses.replace(
        _report(name, prepared, split, scores, text, left_out, provenance), cost=cost,
        gates=check_gates(gates, None, drops, scores.scores()),
        text_robustness=_robustness(scores, disturbed or {}, text, n_boot),
    )  # fmt: skip
    write_report(report, folder)
    return report


def _robustness(
    clean: TextScores, disturbed: Mapping[str, Joined], text: TextProtocol, n_boot: int
) -> dict[str, Robustness]:
    """Title of every subset that has a number -> the same questions under every disturbance."""
    others = {name: score(joined, parser=text.parser, n_boot=0, seed=text.seed) for name, joined in disturbed.items()}
    found = {}
    for name, one in clean.subsets.items() if others else ():
        metric = {LABELS: AUC_HARD, OPEN: None}.get(one.subset.task, ACCURACY)
        if metric is None or one.scored is None:
            continue
        scored = {"clean": one.scored}
        scored |= {other: read.subsets[name].scored or one.scored for other, read in others.items()}
        compared = compare(metric, scored, baseline="clean", n_boot=n_boot)
        found[one.subset.title] = Robustness(compared, {other: DISTURBANCES[other].told for other in others})
    return found


def _is_open(item: Item) -> bool:
    return SUBSETS[item.subset].task == OPEN if item.subset in SUBSETS else not item.options


def _report(
    name: str, prepared: Prepared, split: str, scores: TextScores, text: TextProtocol,
    left_out: Mapping[str, str], provenance: Mapping[str, Any],
) -> Report:  # fmt: skip
    reads = scores.reads
    return Report(
        model=name,
        dataset=str(prepared.manifest["dataset"]),
        split=split,
        n_records=len({read.item.record_id for read in reads}),
        n_patients=len({read.item.patient_id for read in reads}),
        measured=None,
        left_out=left_out,
        score_source="text",
        text=scores,
        provenance={
            **provenance,
            "protocol": "ecgbench",
            "parser": text.parser,
            "judged": None if text.judged is None else str(text.judged),
            "data_fingerprint": prepared.fingerprint,
            "environment": environment(),
        },
    )


def _example_ids(items: Sequence[Item], replies: Sequence[Reply]) -> str:
    theirs = f"they have ids such as {replies[0].id!r}, " if replies else "the file is empty; "
    return f"{theirs}the data such as {items[0].id!r}"
