"""Scores from the likelihood of the answers: nothing is generated, and a page is read once for all its questions.

Three ways to the same logits, the first that is proven for the checkpoint at hand is taken (`Scorer.prove`):

| way | what is read |
|---|---|
| packed | a page and all its questions in one row, behind a mask of blocks (`models.outputs`) |
| shared | a page once; every question goes on from its key-value cache (`models.prefix`) |
| rows | a page again for every question |

`python -m tests.bench.scoring` measures them beside one another.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from evlecg.data.store import Prepared
from evlecg.errors import EvlecgError
from evlecg.models.batch import draw
from evlecg.models.encode import Turn
from evlecg.models.load import Loaded
from evlecg.models.outputs import can_pack, forward, to_device
from evlecg.models.prefix import can_share, forward_shared
from evlecg.models.views import encoder_for, view_of
from evlecg.page.render import PageStyle, empty_page, page_style
from evlecg.recipe import PageConfig, page_size
from evlecg.schema import Prediction, Question, Sample

PACKED, SHARED, ROWS = "packed", "shared", "rows"
WAYS = (PACKED, SHARED, ROWS)
CALIBRATIONS = ("none", "blank")
OPTIONS = ("line", "letter", "text")
REMEMBERED_PRIORS = 20_000
LETTERED = re.compile(r"^[ \t]*\(?([A-Z])[.):]+[ \t]+(\S.*?)\s*$", re.MULTILINE)


@dataclass(frozen=True)
class Answering:
    """How choices are written as answers, and what their likelihood is set against.

    Attributes:
        wordings: choice -> ways to write it; their probabilities add up. A choice that is not in it is written as it
            is.
        calibration: `none`, or `blank`: the likelihood of an answer on the page is divided by its likelihood on paper
            without a tracing (contextual calibration, Zhao 2021; with the question kept, the domain-conditional PMI of
            Holtzman 2021). It shifts the log odds of each question by a constant: AUROC of a label stays as it is;
            thresholds, calibration error, F1 and what a multiple choice comes to change. It is meant for models that
            were not trained on the question. A trained student denies everything on blank paper, rightly so, and to
            divide by that overcorrects: on the quickstart's student the ECE went from 0.064 to 0.543. Multiple choice,
            which it was not trained on, went from 0.22 to 0.36 of the answers right (four options, by text).
        options: how a lettered choice is answered: by its whole `line`, its `letter`, or the `text` behind the letter.
            Texts differ in length, and tokenizers in how they cut them: their log likelihood is taken a byte.
    """

    wordings: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    calibration: str = "none"
    options: str = "line"

    def __post_init__(self) -> None:
        for name, known in (("calibration", CALIBRATIONS), ("options", OPTIONS)):
            if getattr(self, name) not in known:
                raise EvlecgError(f"unknown {name} {getattr(self, name)!r}", where=name,
                                  hint=f"one of {', '.join(known)}")  # fmt: skip
        for choice, written in self.wordings.items():
            if not written or not all(written):
                raise EvlecgError(f"{choice!r} is written in no way", where="wordings")

    @property
    def plain(self) -> bool:
        """Whether choices are written as they are, and set against nothing."""
        return self == Answering()

    def written(self, question: Question, choice: str) -> tuple[str, ...]:
        """The answers that stand for a choice of a question.

        Raises:
            EvlecgError: it is to be answered by its letter, and has none.
        """
        if choice in self.wordings:
            return self.wordings[choice]
        if self.options == "line":
            return (choice,)
        letter, text = letter_and_text(question, choice)
        if self.options == "text":
            return (text,)
        if not letter:
            raise EvlecgError(f"a choice has no letter: {choice!r}", where=question.id or question.text[:60],
                              hint="options by text")  # fmt: skip
        return (letter,)

    def to_dict(self) -> dict[str, Any]:
        """For provenance."""
        return {"calibration": self.calibration, "options": self.options,
                "wordings": {choice: list(written) for choice, written in self.wordings.items()}}  # fmt: skip


def letter_and_text(question: Question, choice: str) -> tuple[str, str]:
    """(letter, text) of a choice: of `B. flutter`, or of `B` or `flutter` where the question has such a line.

    The letter is empty, and the text the choice, where there is none.
    """
    own = LETTERED.fullmatch(choice)
    if own:
        return own[1], own[2]
    bare = choice.strip(" ().:")
    for letter, text in LETTERED.findall(question.text):
        if bare == letter or choice.strip(" .").casefold() == text.strip(" .").casefold():
            return letter, text
    return "", choice


@dataclass(frozen=True)
class Chosen:
    """What a model makes of one question.

    Attributes:
        p_C: probability of every choice among the choices; calibrated where that was asked for.
    """

    sample: Sample
    question: Question
    p_C: Tensor

    @property
    def choice(self) -> str:
        """The likeliest."""
        return self.question.choices[int(self.p_C.argmax())]


class Scorer:
    """The likelihood of every choice of every question, and what follows from it.

    A choice's likelihood is the product of its tokens' probabilities given page and question, in the checkpoint's own
    chat template, end-of-turn mark excluded. Where every choice is one token, all are read off the same position.

    Args:
        loaded: model and processor, on the device to use.
        prepared: prepared folder that the samples point into.
        style: how pages look.
        size_px: page size; None: what the processor wants.
        answering: how choices are written.

    Attributes:
        way: of `WAYS`, how questions are read.
        note: why not in the ways before it.

    Raises:
        EvlecgError: a classifier is to be calibrated, or to answer in other words than its own.
    """

    def __init__(
        self, loaded: Loaded, prepared: Prepared, style: PageStyle, *, size_px: tuple[int, int] | None = None,
        answering: Answering | None = None,
    ) -> None:  # fmt: skip
        self.loaded = loaded
        self.prepared = prepared
        self.style = style
        self.answering = answering or Answering()
        if loaded.checkpoint.kind != "text" and not self.answering.plain:
            raise EvlecgError("a classifier answers with logits, not in words: nothing is worded or calibrated",
                              where=loaded.checkpoint.name, hint="leave the wording and calibration out")  # fmt: skip
        self.encoder = encoder_for(loaded, size_px=size_px)
        self.view = view_of(self.encoder)
        self.way = ROWS
        self.note = "not tried"
        self._priors: dict[Question, Tensor] = {}

    def prove(self, sample: Sample) -> None:
        """Tries the ways on all questions of one page; the first that gives the logits of single rows is used."""
        page = draw(self.prepared, sample.record_index, self.view, self.style)
        turns = [turn for question in sample.questions for turn in self._turns(question)]
        notes = []
        for self.way, tried in ((PACKED, can_pack), (SHARED, can_share)):
            works, why = tried(self.loaded, self.encoder, page, turns)
            notes.append(f"{self.way}: {why}")
            if works:
                break
        else:
            self.way = ROWS
        self.note = "; ".join(notes)

    def score(self, samples: Sequence[Sample]) -> Iterator[Prediction]:
        """Scores the labels of a few samples (one batch): P(first choice) among the choices of every question."""
        for chosen in self.choose(samples):
            question = chosen.question
            yield Prediction(
                record_id=chosen.sample.record_id,
                patient_id=self.prepared.patient_ids[chosen.sample.record_index],
                label=question.label or question.text,
                score=float(chosen.p_C[0]),
                truth=question.answer == question.choices[0],
            )

    def in_batches(
        self, samples: Sequence[Sample], batch_size: int
    ) -> Iterator[tuple[Sequence[Sample], list[Prediction]]]:
        """Scores any number of samples, `batch_size` records a forward pass: each batch with its predictions."""
        for start in range(0, len(samples), batch_size):
            batch = samples[start : start + batch_size]
            yield batch, list(self.score(batch))

    def answered(self, samples: Sequence[Sample]) -> list[Sample]:
        """The samples (one batch) with the model's likeliest choice as the answer to every question."""
        questions: list[list[Question]] = [[] for _ in samples]
        place = {id(sample): row for row, sample in enumerate(samples)}
        for chosen in self.choose(samples):
            made = dataclasses.replace(chosen.question, answer=chosen.choice)
            questions[place[id(chosen.sample)]].append(made)
        return [dataclasses.replace(sample, questions=tuple(found))
                for sample, found in zip(samples, questions, strict=True)]  # fmt: skip

    @torch.no_grad()
    def choose(self, samples: Sequence[Sample]) -> Iterator[Chosen]:
        """Every question of a few samples (one batch), in order, with the probabilities of its choices, float64."""
        self.loaded.model.eval()
        pages = [draw(self.prepared, sample.record_index, self.view, self.style) for sample in samples]
        asked = [sample.questions for sample in samples]
        if self.answering.calibration == "blank":
            self._learn_priors([question for questions in asked for question in questions])
        for sample, found in zip(samples, self._likelihoods(pages, asked), strict=True):
            for question, logp_C in zip(sample.questions, found, strict=True):
                if self.answering.calibration == "blank":
                    logp_C = logp_C - self._priors[_unanswered(question)]
                yield Chosen(sample, question, logp_C.softmax(0))

    def _learn_priors(self, questions: Sequence[Question]) -> None:
        """Log likelihoods on paper without a tracing, of questions that were not asked of it yet."""
        if len(self._priors) >= REMEMBERED_PRIORS:
            self._priors.clear()
        new = list(dict.fromkeys(_unanswered(question) for question in questions))
        new = [question for question in new if question not in self._priors]
        if new:
            assert isinstance(self.view, tuple)  # classifiers are not calibrated
            page = empty_page(size_px=self.view, style=self.style)
            self._priors.update(zip(new, self._likelihoods([page], [new])[0], strict=True))

    def _likelihoods(self, pages: Sequence[Any], asked: Sequence[Sequence[Question]]) -> list[list[Tensor]]:
        """Log likelihoods [choices] (a byte of them, of texts of options) of every question of every page."""
        turns = [[turn for question in questions for turn in self._turns(question)] for questions in asked]
        logits = dict(self._answer_logits(pages, turns))
        found: list[list[Tensor]] = []
        for row, questions in enumerate(asked):
            found.append([])
            place = 0
            for question in questions:
                n_turns = len(self._turns(question))
                read = [logits[row, place + n] for n in range(n_turns)]
                place += n_turns
                found[-1].append(self._choice_likelihoods(question, read))
        return found

    def _choice_likelihoods(self, question: Question, read: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """Log likelihoods [choices], float64, from the (logits [A,V], ids [A]) of the question's turns."""
        written = [self.answering.written(question, choice) for choice in question.choices]
        single = self._single_tokens(question)
        if single is not None:
            logp_V = read[0][0][0].double().log_softmax(-1).cpu()
            each = [logp_V[torch.tensor(ids)] for ids in single]
        else:
            sums = iter([float(logits_AV.double().log_softmax(-1).gather(1, ids_A[:, None]).sum())
                         for logits_AV, ids_A in read])  # fmt: skip
            each = [torch.tensor([next(sums) for _ in ways], dtype=torch.float64) for ways in written]
        if self.answering.options == "text":
            lengths = [torch.tensor([len(way.encode()) for way in ways], dtype=torch.float64) for ways in written]
            each = [logp_W / length_W for logp_W, length_W in zip(each, lengths, strict=True)]
        return torch.stack([logp_W.logsumexp(0) for logp_W in each])

    def _answer_logits(
        self, pages: Sequence[Any], turns: Sequence[Sequence[Turn]]
    ) -> Iterator[tuple[tuple[int, int], tuple[Tensor, Tensor]]]:
        """(page, turn of the page) -> its answer's logits [A,V] and ids [A].

        A forward pass has no more rows of whole pages than there are pages.
        """
        device = next(self.loaded.model.parameters()).device
        if self.way == ROWS:
            flat = [(row, place, turn) for row, asked in enumerate(turns) for place, turn in enumerate(asked)]
            flat.sort(key=lambda entry: -len(entry[2].question) - len(entry[2].answer))  # like lengths: less padding
            for start in range(0, len(flat), len(pages)):
                part = flat[start : start + len(pages)]
                side = self.encoder.encode([pages[row] for row, *_ in part], [[turn] for *_, turn in part])
                side = to_device(side, device)
                logits_AV = forward(self.loaded, side).answer_logits_AV
                for number, (row, place, _) in enumerate(part):
                    own_A = side.answer_A2[:, 0] == number
                    yield (row, place), (logits_AV[own_A], side.answer_ids_A[own_A])
            return
        side = to_device(self.encoder.encode(pages, turns), device)
        if self.way == SHARED:
            if len(pages) > 1 and len(set((side.block_BS == 0).sum(1).tolist())) > 1:  # padding would be remembered
                for row, page in enumerate(pages):
                    for (_, place), found in self._answer_logits([page], [turns[row]]):
                        yield (row, place), found
                return
            logits_AV = forward_shared(self.loaded, side)
        else:
            logits_AV = forward(self.loaded, side).answer_logits_AV
        block_A = side.block_BS[side.answer_A2[:, 0], side.answer_A2[:, 1]]  # the k-th block of a row is its k-th turn
        tokens: dict[tuple[int, int], list[int]] = {}
        for token, (row, block) in enumerate(zip(side.answer_A2[:, 0].tolist(), block_A.tolist(), strict=True)):
            tokens.setdefault((row, block - 1), []).append(token)
        for key, places in tokens.items():
            yield key, (logits_AV[places], side.answer_ids_A[places])

    def _turns(self, question: Question) -> list[Turn]:
        """The texts to run: one where every answer is a single token, else one for each way to write a choice."""
        turns = [Turn.of(question, way, ends=False)
                 for choice in question.choices for way in self.answering.written(question, choice)]  # fmt: skip
        return turns[:1] if self._single_tokens(question) is not None else turns

    def _single_tokens(self, question: Question) -> list[list[int]] | None:
        """Of every choice the ids of the ways to write it, where each is one token and all differ."""
        written = [self.answering.written(question, choice) for choice in question.choices]
        ids = [[self.encoder.answer_ids(Turn.of(question, way, ends=False)) for way in ways] for ways in written]
        flat = [way for ways in ids for way in ways]
        single = {way[0] for way in flat if len(way) == 1}
        return [[way[0] for way in ways] for ways in ids] if len(single) == len(flat) else None


def _unanswered(question: Question) -> Question:
    """A question as the paper without a tracing is asked it: the same whatever is right."""
    return Question(question.text, "", question.choices, question.label, question.kind, question.history)


def scorer_of(
    loaded: Loaded, prepared: Prepared, page: PageConfig, samples: Sequence[Sample], *,
    answering: Answering | None = None,
) -> Scorer:  # fmt: skip
    """A scorer of pages as `page` says; how it reads questions is tried on the fullest of the first 64 samples."""
    size_px = page_size(page.student_size)
    scorer = Scorer(loaded, prepared, page_style(page), size_px=size_px, answering=answering)
    scorer.prove(max(samples[:64], key=lambda sample: len(sample.questions)))
    return scorer
