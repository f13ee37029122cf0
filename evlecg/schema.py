"""The types that travel through the program.

Data: `Record` -> (prepared folder) -> `Sample` -> `Batch`; model side: `Batch` -> `Outputs` -> `LossTerms`;
evaluation: `Prediction` -> `Report` (report.py). Tensors appear in annotations only, so that importing this
module costs neither torch nor numpy's users anything.

Shape legend: B batch rows, S text-and-image positions of one side, N visual tokens of one side, D width,
A answer tokens in the whole batch, V vocabulary, L leads (always 12), T time samples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from evlecg.errors import EvlecgError

if TYPE_CHECKING:
    from torch import Tensor

LEADS: tuple[str, ...] = ("I", "II", "III", "aVR", "aVL", "aVF", "V1", "V2", "V3", "V4", "V5", "V6")
SPLITS: tuple[str, ...] = ("train", "val", "test")


@dataclass(frozen=True)
class Question:
    """One question about a page, its right answer, and the answers it can have.

    Attributes:
        text: what is asked, without any chat markup or image placeholder.
        answer: the right answer; empty where it is unknown (prediction only).
        choices: answers that likelihoods are compared between; empty for free text.
        label: the label code that the question asks about, or None.
        kind: its task (`yes_no`, `choose_all`, `multiple_choice`, `report`), or the dataset's own name for it.
        history: earlier turns of its dialogue, (question, answer) pairs.
        id: of the dialogue item in its dataset, for joining predictions; empty where it has none.
    """

    text: str
    answer: str
    choices: tuple[str, ...] = ()
    label: str | None = None
    kind: str = "yes_no"
    history: tuple[tuple[str, str], ...] = ()
    id: str = ""


@dataclass(frozen=True)
class Record:
    """One 12-lead ECG: a signal, or the picture of a page where the dataset has nothing else.

    Attributes:
        id: unique within its dataset; letters, digits, `_`, `-`, `.` and `/` only.
        patient_id: records of one patient share it and never cross a split.
        signal_mV: float32 [12, T] in the order of `LEADS`, millivolt, finite; [12, 0] for a picture.
        fs_hz: samples a second; 0 for a picture.
        labels: label code -> present or not; a code that is absent was not assessed.
        split: one of `SPLITS`.
        age: years, None where unknown (PTB-XL's 300 is read as 90).
        sex: "F", "M" or None.
        report: free text of the reader; empty where there is none.
        repairs: what was mended on the way in, one short phrase each.
        device: the recorder's model, "" where unknown.
        image: an encoded PNG or JPEG; empty for a signal.
        questions: a dialogue dataset's own questions about it.
    """

    id: str
    patient_id: str
    signal_mV: np.ndarray
    fs_hz: float
    labels: Mapping[str, bool]
    split: str
    age: float | None = None
    sex: str | None = None
    report: str = ""
    repairs: tuple[str, ...] = ()
    device: str = ""
    image: bytes = b""
    questions: tuple[Question, ...] = ()

    def __post_init__(self) -> None:
        if self.signal_mV.ndim != 2 or self.signal_mV.shape[0] != len(LEADS):
            raise EvlecgError(
                f"a record holds a signal of shape {self.signal_mV.shape}, not [12, samples]", where=self.id
            )
        if self.image and self.signal_mV.size:
            raise EvlecgError("a record holds a signal and a picture", where=self.id)
        if not self.image and not self.fs_hz > 0:
            raise EvlecgError(f"a record has a sampling rate of {self.fs_hz} Hz", where=self.id)
        if self.split not in SPLITS:
            raise EvlecgError(f"a record belongs to the split {self.split!r}", where=self.id)

    @property
    def duration_s(self) -> float:
        """Seconds; 0 for a picture."""
        return self.signal_mV.shape[1] / self.fs_hz if self.fs_hz else 0.0


@dataclass(frozen=True)
class Sample:
    """One row of work: a page and the questions asked about it, each answered without sight of the others."""

    record_index: int
    record_id: str
    questions: tuple[Question, ...]


@dataclass(frozen=True)
class Side:
    """One model's half of a batch.

    `inputs` goes to the model unchanged; the rest says what the positions of `Outputs.hidden_BSD` mean. A row holds one
    page and one or several questions about it (`block` 1, 2, ... after the shared prefix 0), which do not see one
    another. Where a family keeps its image out of the text (cross-attention, encoder and decoder), and where a model
    has no text at all (classifiers), positions are laid out as if it did: visual tokens first, then every question
    (models/apart.py). Visual tokens of another width than the text's are no positions of that tensor: then
    `visual_BS` is False everywhere, while the boxes and `Outputs.visual_BND` describe them all the same.

    Attributes:
        inputs: the model's keyword arguments, whatever the processor returned, padded on the right.
        valid_BS: bool, False on padding.
        block_BS: int, 0 for the shared prefix (system text and image), k for the k-th question, -1 for padding.
        byte_end_BS: int, how many bytes of the answer's text a position has read: 0 before the answer, one more than
            the answer has from the end-of-turn mark on.
        answer_A2: int, (row, position) of every answer token, end-of-turn marks included, in reading order; the state
            one position before it predicts it.
        answer_ids_A: int, the ids of those tokens.
        visual_BS: bool, True where a visual token stands; as many as there are boxes in the row, or none at all.
        visual_box_BN4: box x0, y0, x1, y1 in [0,1] of every visual token (0 0 0 0 where it sees padding), on the
            paper: where a page was turned or shifted, that is undone.
        visual_mask_BN: bool, False for padding and for tokens that see no part of the paper.
        cell_box_BC4: box of every lead x time cell on the paper; the same cell has the same index on both sides, and
            zeros on pages that do not have it. Where one side reads signals, its own cells follow the page's.
        frame: what boxes are shares of: "page", the paper of a drawn page, or "trace", the plane that
            `page/trace.py` lays a signal out on (x is time, y the leads). Places in different frames can be compared
            through the cells only.
        answer_label_A: int, for each answer of a classifier the row of its head that decides it, -1 where it has
            none; None for models that answer in words.
        row_keys: of a half that was read from a teacher cache, what each row is stored under.
    """

    inputs: dict[str, Tensor]
    valid_BS: Tensor
    block_BS: Tensor
    byte_end_BS: Tensor
    answer_A2: Tensor
    answer_ids_A: Tensor
    visual_BS: Tensor
    visual_box_BN4: Tensor
    visual_mask_BN: Tensor
    cell_box_BC4: Tensor
    frame: str = "page"
    answer_label_A: Tensor | None = None
    row_keys: tuple[str, ...] = ()

    def before_answers(self, values_BSX: Tensor) -> Tensor:
        """Of something [B, S, ...] that every position has, what stands one before every answer token: [A, ...].

        Of hidden states, those that predict the answer.
        """
        row_A, place_A = self.answer_A2.unbind(1)
        return values_BSX[row_A, place_A - 1]

    def with_answers(self, rows_R: Tensor | slice) -> Side:
        """The same half with some of its answer tokens only."""
        label_A = self.answer_label_A
        return replace(self, answer_A2=self.answer_A2[rows_R], answer_ids_A=self.answer_ids_A[rows_R],
                       answer_label_A=None if label_A is None else label_A[rows_R])  # fmt: skip


@dataclass(frozen=True)
class Batch:
    """What one step reads: the same records and questions as the student and as the teacher see them.

    `record_B` (int) says which of `sample_ids` a row shows: several rows where questions are not packed.
    `cell_lead_C` (int, index into `LEADS`, -1 where unknown) and `cell_time_C2` (seconds, NaN where unknown) name the
    cells of `Side.cell_box_BC4`.
    `teacher` is None when the run has no teacher.
    `asked_Q` (int) names every question of the batch, row by row and block by block: the same number, the same words,
    in all batches. None where nobody knows.
    `counted` is False where a process has no share of a step and runs along on some record: it weighs nothing.
    """

    sample_ids: tuple[str, ...]
    record_B: Tensor
    student: Side
    teacher: Side | None
    cell_lead_C: Tensor
    cell_time_C2: Tensor
    asked_Q: Tensor | None = None
    counted: bool = True


class AnswerLogits:
    """Logits [A, V] that predict answer tokens, read off their states when they are asked for.

    Over a large vocabulary they are the largest tensor of a step; losses that take them a few rows at a time
    (losses/chunks.py) never hold them whole.

    Args:
        states_AD: what they are read off.
        read: (states [R, D], index of these among the A tokens) -> logits [R, V]; None: the states are the logits.
    """

    def __init__(self, states_AD: Tensor, read: Callable[[Tensor, Tensor | slice], Tensor] | None = None) -> None:
        self.states_AD = states_AD
        self._read = read

    def __len__(self) -> int:
        return len(self.states_AD)

    def rows(self, rows_R: Tensor | slice) -> Tensor:
        """Logits [R, V] of some of the tokens."""
        states_RD = self.states_AD[rows_R]
        return states_RD if self._read is None else self._read(states_RD, rows_R)


@dataclass(frozen=True)
class Outputs:
    """What the losses see of a model: the same for a live teacher and for a cached one.

    Attributes:
        hidden_BSD: last hidden state (after the final norm), every position.
        visual_BND: hidden states of the chosen layer at the visual positions, padded on the right; where a text
            attends to visual tokens from outside of it, what it attends to (the same for every layer).
        projected_BND: the projector's output, that is, what enters the language model at those positions.
        answer_logits: logits that predict the tokens at `Side.answer_A2`.
        side: the half of the batch they were computed from.
        attention: `query`, `key` and `value` [B,N,*] of the last layer at the visual positions, where asked for.
    """

    hidden_BSD: Tensor
    visual_BND: Tensor
    projected_BND: Tensor
    answer_logits: AnswerLogits
    side: Side
    attention: dict[str, Tensor] = field(default_factory=dict)

    @property
    def answer_logits_AV(self) -> Tensor:
        """All of the answers' logits at once."""
        return self.answer_logits.rows(slice(None))


@dataclass(frozen=True)
class ModelFacts:
    """What an objective has to know of a model before it is built.

    Attributes:
        width: of its hidden states.
        vocab_size: answers that its head tells apart (rows of the output head; of a classifier two: yes and no).
        visual_width: of its visual tokens, where they have one of their own (PatchTST's pooled state holds all twelve
            leads, its tokens one); None: `width`.
        tokens: bytes of every row of the output head, None where it stands for no text; empty where nobody asked
            (objectives with `reads_tokens` do).
    """

    width: int
    vocab_size: int
    visual_width: int | None = None
    tokens: tuple[bytes | None, ...] = ()

    @property
    def token_width(self) -> int:
        """Width of visual tokens."""
        return self.width if self.visual_width is None else self.visual_width


@dataclass(frozen=True)
class LossTerms:
    """One step's loss.

    Attributes:
        total: scalar, on the graph.
        values: each term before weighting, on the graph, under the names of METHOD terms (`ce`, `mhca`, ...).
        weights: what each value was multiplied by; `total` is the sum of the products.
        diagnostics: plain floats for the log (plan entropy, variance of the aligned teacher, ...).
    """

    total: Tensor
    values: dict[str, Tensor]
    weights: dict[str, float]
    diagnostics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Prediction:
    """What a model said of one label of one record.

    Attributes:
        record_id: joins with the prepared folder; never by order.
        label: label code.
        score: in [0, 1], higher means present.
        truth: whether the label is present.
        source: "likelihood" (from the answers' probabilities) or "text" (parsed from generated text).
    """

    record_id: str
    patient_id: str
    label: str
    score: float
    truth: bool
    source: str = "likelihood"
