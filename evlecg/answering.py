"""A prepared folder's own questions -> a model's answers as text (made here, or a file) -> a report of them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evlecg.data.dialogues import split_options
from evlecg.data.store import Prepared
from evlecg.errors import EvlecgError, RunFailed
from evlecg.files import kept_folder, new_folder, write_text_atomic
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
from evlecg.protocol.bench import OPEN
from evlecg.recipe import PageConfig, nearest
from evlecg.report import Report, environment, write_report
from evlecg.schema import Question

PROTOCOLS = ("likelihood", "ecgbench")
PREDICTIONS, PARSED, WORK = "predictions.jsonl", "parsed.jsonl", "work.json"


@dataclass(frozen=True)
class TextProtocol:
    """How answers as text are made and read.

    Attributes:
        parser: `pulse` (as published) or `strict`.
        predictions: file or folder of answers made elsewhere; None: the model answers.
        judged: file or folder of a judge's verdicts on free-text answers.
        max_new_tokens: where an answer is cut off.
        seed: of the random letters of `pulse`.
    """

    parser: str = "pulse"
    predictions: Path | None = None
    judged: Path | None = None
    max_new_tokens: int = 1024
    seed: int = 42

    def __post_init__(self) -> None:
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
    if protocol == "likelihood" and (text.predictions or text.judged):
        raise EvlecgError("predictions and verdicts are of texts, not of likelihoods", where="--protocol",
                          hint="--protocol ecgbench")  # fmt: skip
    if protocol is not None:
        return protocol
    if text.predictions or text.judged or not prepared.label_names:
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
) -> Report:
    """Asks a model the folder's own questions (or takes the answers of a file), reads and scores the answers.

    The folder `out` gets the report, predictions.jsonl (every answer, as published scorers read it) and parsed.jsonl
    (what was read off each). An interrupted run goes on where it stopped when it is started again in the same way.

    Raises:
        EvlecgError: no questions, or predictions that do not fit them.
    """
    asked = _asked(prepared, indices)
    if not asked:
        raise EvlecgError(f"the split {split!r} has no question of the dataset's own", where=prepared.path,
                          hint="--protocol likelihood scores labels")  # fmt: skip
    items = [entry.item for entry in asked]
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
            return _written(name, prepared, split, joined, text, verdicts, folder, n_boot, left_out, provenance)

    checkpoint = models.inspect(model)
    page = page or trained_with(Path(checkpoint.source)).page
    work = {
        "model": model, "weights": models.weights_hash(checkpoint), "data": prepared.fingerprint,
        "page": repr(page), "dtype": dtype, "max_new_tokens": text.max_new_tokens,
        "questions": hashlib.sha256(repr(items).encode()).hexdigest(),
    }  # fmt: skip
    with _resumable(out, overwrite, work, progress) as folder:
        write_text_atomic(folder / WORK, json.dumps(work, indent=2) + "\n")
        loaded = models.load(checkpoint, dtype=dtype)
        with ReplyLog(folder / PREDICTIONS) as log:
            try:
                batching = _answer(loaded, prepared, asked, log, page, batch_size, text.max_new_tokens, model, progress)
            except EvlecgError as error:
                if not log.texts:
                    raise
                raise RunFailed(error.what, where=error.where, hint=error.hint) from error  # the answers so far stay
        joined = join(items, read_replies(folder / PREDICTIONS))
        provenance = {
            "model": {"family": checkpoint.model_type, "parameters": loaded.n_parameters,
                      "weights_sha256": work["weights"]},
            "generation": {"temperature": 0, "max_new_tokens": text.max_new_tokens, "batched": batching},
        }  # fmt: skip
        return _written(model, prepared, split, joined, text, verdicts, folder, n_boot, left_out, provenance)


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


def _asked(prepared: Prepared, indices: Sequence[int]) -> list[_Asked]:
    """Every question of the records; the id of one is its dataset's, made unique where that is not."""
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


def _answer(
    loaded: models.Loaded, prepared: Prepared, asked: Sequence[_Asked], log: ReplyLog, page: PageConfig,
    batch_size: int, max_new_tokens: int, name: str, progress: Progress,
) -> str:  # fmt: skip
    """Answers what the log does not have; returns how prompts were batched.

    A dialogue goes on from the model's own answers, as in use and as published, not from the right ones.
    """
    import torch

    from evlecg.models.generate import Generator

    loaded.model.to("cuda" if torch.cuda.is_available() else "cpu")
    size = page.student_size
    generator = Generator(
        loaded, prepared, page_style(page), size_px=(size[0], size[1]) if size else None, max_new_tokens=max_new_tokens
    )
    generator.prove(asked[0].record_index, [Turn.of(entry.question, "") for entry in asked])
    by_item = {(entry.item.subset, entry.item.id): entry for entry in asked}
    open_ = [entry for entry in asked if entry.item not in log]
    with progress.task(f"answer {name}", len(asked)) as advance:
        advance(len(asked) - len(open_))
        while open_:
            ready = [entry for entry in open_ if entry.before is None or entry.before in log]
            turns = [_turn(entry, by_item, log) for entry in ready]
            for places in generator.batches(turns, batch_size):
                batch = [ready[place] for place in places]
                made = generator.generate([(ready[place].record_index, turns[place]) for place in places])
                for entry, answer in zip(batch, made, strict=True):
                    log.add(entry.item, answer.text, model=name, n_tokens=answer.n_tokens, ended=answer.ended)
                advance(len(batch))
            open_ = [entry for entry in open_ if entry.item not in log]
    return "several lengths, padded on the left" if generator.padded else f"one length ({generator.padding_note})"


def _turn(entry: _Asked, by_item: Mapping[tuple[str, str], _Asked], log: ReplyLog) -> Turn:
    history = list(entry.question.history)
    place, before = len(history) - 1, entry.before
    while before is not None:
        key = (before.subset, before.id)
        history[place] = (history[place][0], log.texts[key])
        place, before = place - 1, by_item[key].before
    return Turn(entry.question.text, "", ends=False, history=tuple(history))


def _written(
    name: str, prepared: Prepared, split: str, joined: Joined, text: TextProtocol, verdicts: Verdicts | None,
    folder: Path, n_boot: int, left_out: Mapping[str, str], provenance: Mapping[str, Any],
) -> Report:  # fmt: skip
    """Scores, writes parsed.jsonl, predictions.jsonl where it was made elsewhere, and the report."""
    scores = score(joined, parser=text.parser, verdicts=verdicts, n_boot=n_boot, seed=text.seed)
    if not (folder / PREDICTIONS).exists():
        with ReplyLog(folder / PREDICTIONS) as log:
            for item, reply in joined.pairs:
                asked = dataclasses.replace(item, prompt=reply.prompt or item.prompt)
                log.add(asked, reply.text, model=reply.model or name, source=reply.where)
    lines = [json.dumps(read.to_dict()) + "\n" for read in scores.reads]
    write_text_atomic(folder / PARSED, "".join(lines))
    report = _report(name, prepared, split, scores, text, left_out, provenance)
    write_report(report, folder)
    return report


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
