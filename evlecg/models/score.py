"""Label scores from the likelihood of the answers: one pass over the answer position, nothing generated."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import torch

from evlecg.data.store import Prepared
from evlecg.models.batch import draw
from evlecg.models.encode import Turn
from evlecg.models.load import Loaded
from evlecg.models.outputs import can_pack, forward, to_device
from evlecg.models.views import encoder_for, view_of
from evlecg.page.render import PageStyle, page_style
from evlecg.recipe import PageConfig
from evlecg.schema import Prediction, Question, Sample


def scorer_of(loaded: Loaded, prepared: Prepared, page: PageConfig, samples: Sequence[Sample]) -> Scorer:
    """A scorer of pages as `page` says; packing is tried on the one of the first 64 samples with the most questions."""
    size = page.student_size
    scorer = Scorer(loaded, prepared, page_style(page), size_px=(size[0], size[1]) if size else None)
    scorer.prove_packing(max(samples[:64], key=lambda sample: len(sample.questions)))
    return scorer


class Scorer:
    """P(first choice) among the choices of every question.

    A choice's likelihood is the product of its tokens' probabilities given page and question, in the checkpoint's own
    chat template, end-of-turn mark excluded. Where every choice is one token, all are read off the same position.

    Args:
        loaded: model and processor, on the device to use.
        prepared: prepared folder that the samples point into.
        style: how pages look.
        size_px: page size; None: what the processor wants.
    """

    def __init__(
        self, loaded: Loaded, prepared: Prepared, style: PageStyle, *, size_px: tuple[int, int] | None = None
    ) -> None:
        self.loaded = loaded
        self.prepared = prepared
        self.style = style
        self.encoder = encoder_for(loaded, size_px=size_px)
        self.view = view_of(self.encoder)
        self.packed = False
        self.packing_note = "not tried"

    def prove_packing(self, sample: Sample) -> None:
        """Tries all questions of one page in one row; used from then on if the logits are the same."""
        page = draw(self.prepared, sample.record_index, self.view, self.style)
        turns = [turn for question in sample.questions for turn in self._turns(question)]
        self.packed, self.packing_note = can_pack(self.loaded, self.encoder, page, turns)

    def score(self, samples: Sequence[Sample]) -> Iterator[Prediction]:
        """Scores the labels of a few samples (one batch)."""
        for sample, question, logp in self._choices(samples):
            yield Prediction(
                record_id=sample.record_id,
                patient_id=self.prepared.patient_ids[sample.record_index],
                label=question.label or question.text,
                score=float(logp.softmax(0)[0]),
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
        answers: dict[tuple[str, str], str] = {}
        for sample, question, logp in self._choices(samples):
            answers[(sample.record_id, question.text)] = question.choices[int(logp.argmax())]
        return [
            dataclasses.replace(sample, questions=tuple(
                dataclasses.replace(question, answer=answers[(sample.record_id, question.text)])
                for question in sample.questions
            ))
            for sample in samples
        ]  # fmt: skip

    @torch.no_grad()
    def _choices(self, samples: Sequence[Sample]) -> Iterator[tuple[Sample, Question, torch.Tensor]]:
        """Every question of a few samples with the log likelihoods of its choices, float64."""
        model = self.loaded.model.eval()
        pages = [draw(self.prepared, sample.record_index, self.view, self.style) for sample in samples]
        asked = [
            (row, question, choice, turn)
            for row, sample in enumerate(samples)
            for question in sample.questions
            for choice, turn in enumerate(self._turns(question))
        ]
        if self.packed:
            turns = [[turn for row, _, _, turn in asked if row == place] for place in range(len(samples))]
            side = self.encoder.encode(pages, turns)
            # the k-th block of a row is its k-th turn
            starts = [0]
            for row_turns in turns:
                starts.append(starts[-1] + len(row_turns))
            owner_A = [starts[row] + int(side.block_BS[row, place]) - 1 for row, place in side.answer_A2.tolist()]
        else:
            side = self.encoder.encode([pages[row] for row, *_ in asked], [[turn] for *_, turn in asked])
            owner_A = side.answer_A2[:, 0].tolist()
        side = to_device(side, model.device)
        outputs = forward(self.loaded, side)
        logp_AV = outputs.answer_logits_AV.float().log_softmax(-1)
        logp_A = logp_AV.gather(1, side.answer_ids_A[:, None])[:, 0]
        by_turn: list[list[int]] = [[] for _ in asked]
        for token, owner in enumerate(owner_A):
            by_turn[owner].append(token)

        likelihoods: dict[tuple[int, str], dict[int, float]] = {}
        for (row, question, choice, _), tokens in zip(asked, by_turn, strict=True):
            found = likelihoods.setdefault((row, question.text), {})
            ids = self._single_tokens(question)
            if ids is None:
                found[choice] = float(logp_A[tokens].sum())
            else:
                found.update({place: float(logp_AV[tokens[0], token]) for place, token in enumerate(ids)})
        for row, sample in enumerate(samples):
            for question in sample.questions:
                found = likelihoods[(row, question.text)]
                values = torch.tensor([found[place] for place in range(len(question.choices))], dtype=torch.float64)
                yield sample, question, values

    def _turns(self, question: Question) -> list[Turn]:
        """The texts to run: one where every choice is a single token, else one a choice."""
        turns = [Turn.of(question, choice, ends=False) for choice in question.choices]
        return turns[:1] if self._single_tokens(question) is not None else turns

    def _single_tokens(self, question: Question) -> list[int] | None:
        """The choices' ids where each is one token and all differ."""
        ids = [self.encoder.answer_ids(Turn.of(question, choice, ends=False)) for choice in question.choices]
        single = [tokens[0] for tokens in ids if len(tokens) == 1]
        return single if len(single) == len(ids) == len(set(single)) else None
