"""What a model sees of a record, whatever its kind: a page at one size, or a signal in one form; and both as a `Side`.

A classifier has no text. Its positions are laid out as if it had: first its visual tokens (block 0), then for each
question one position whose state, the pooled one, predicts, and one where the answer stands. So every loss and score
that reads a language model's positions reads a classifier's.

Where a token lies is known from the way in: on a page from what its image processor does to coordinates drawn as
colours and the grid of the model's tokens; on a signal from the receptive fields of its convolutions or patches. The
transformer behind mixes all of them, in every family.

Shape legend: as in schema.py; H and W pixel rows and columns, T time samples of a series.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from evlecg.errors import EvlecgError
from evlecg.models.classifier import Classifier
from evlecg.models.encode import Encoder, Turn, wanted_page_size
from evlecg.models.kinds import ANSWERS
from evlecg.models.load import Loaded
from evlecg.page.layout import batch_cells
from evlecg.page.render import Page
from evlecg.page.trace import Trace, TraceForm
from evlecg.schema import LEADS, Side

View = tuple[int, int] | TraceForm  # size of a page, or form of a signal
LEAST_PAPER = 0.05  # share of a token's pixels that must lie on the page


def encoder_for(loaded: Loaded, *, size_px: tuple[int, int] | None = None) -> AnyEncoder:
    """The encoder of a model of any kind.

    Args:
        loaded: the checkpoint in memory.
        size_px: page size; None: what its processor wants. Models that read signals have none.
    """
    if loaded.checkpoint.kind == "text":
        return Encoder(loaded.checkpoint, loaded.processor, size_px=size_px)
    return ClassifierEncoder(loaded, size_px=size_px)


def view_of(encoder: AnyEncoder) -> View:
    """What its records have to be drawn as."""
    return encoder.view if isinstance(encoder, ClassifierEncoder) else encoder.size_px


class ClassifierEncoder:
    """Turns pages or signals, and questions about labels, into a classifier's half of a batch.

    Args:
        loaded: a classifier.
        size_px: (width, height) of the pages it will get; None lets the processor decide.

    Attributes:
        view: what records have to be drawn as.
        size_px: of pages; None for signals.
    """

    def __init__(self, loaded: Loaded, *, size_px: tuple[int, int] | None = None) -> None:
        self.name = loaded.checkpoint.name
        self.processor = loaded.processor
        self.rows = dict(loaded.model.rows)
        self.form: TraceForm | None = loaded.form
        classifier: Classifier = loaded.model
        if self.form is None:
            width, height = size_px or wanted_page_size(loaded.processor)
            pixels = self.pixels([np.full((height, width, 3), 255, np.uint8)])
            classifier.measure(pixels)
            # drawn as the processor will show it: it then neither squeezes the page nor cuts anything off
            self.size_px = size_px or (pixels["pixel_values"].shape[3], pixels["pixel_values"].shape[2])
            self.view: View = self.size_px
            self._box_N4 = self._page_boxes(classifier.grid)
        else:
            self.size_px = None
            self.view = self.form
            self.input_name = input_name(classifier.model)
            blank = np.zeros((len(LEADS), self.form.n_samples), np.float32)
            classifier.measure(self.arranged(torch.from_numpy(blank)[None], torch.tensor([self.form.n_samples])))
            self._lead_N, self._samples_N2 = token_spans(classifier, self.form)
        self.n_tokens = classifier.n_tokens

    def answer_ids(self, turn: Turn) -> tuple[int, ...]:
        """0 for yes, 1 for no.

        Raises:
            EvlecgError: not a question about one label.
        """
        if turn.label is None or turn.answer not in ANSWERS:
            raise EvlecgError(
                f"a classifier says yes or no to labels; it cannot answer {turn.question[:60]!r}",
                where=self.name,
                hint="data.tasks=[yes_no]",
            )
        return (ANSWERS[turn.answer],)

    def encode(self, views: Sequence[Page | Trace], turns: Sequence[Sequence[Turn]]) -> Side:
        """Builds the half of a batch.

        Args:
            views: one a row, as `view` says.
            turns: the questions of every row, at least one each.

        Returns:
            A `Side` of B = len(views) rows and S = visual tokens + 2 x most questions of a row.
        """
        pages = [view for view in views if isinstance(view, Page)]
        traces = [view for view in views if isinstance(view, Trace)]
        if self.form is None:
            inputs = self.pixels([page.pixels for page in pages])
            boxes = [page.layout.to_paper(self._box_N4) for page in pages]
        else:
            signal_BLT = torch.from_numpy(np.stack([trace.signal_LT for trace in traces]))
            inputs = self.arranged(signal_BLT, torch.tensor([trace.n_recorded for trace in traces]))
            boxes = [self._trace_boxes(trace) for trace in traces]
        assert len(boxes) == len(views) == len(turns)
        n, most = self.n_tokens, max(len(row) for row in turns)
        block_BS = torch.full((len(views), n + 2 * most), -1)
        byte_end_BS = torch.zeros_like(block_BS)
        answers, ids, labels = [], [], []
        for row, asked in enumerate(turns):
            block_BS[row, :n] = 0
            for number, turn in enumerate(asked):
                place = n + 2 * number
                block_BS[row, place : place + 2] = number + 1
                byte_end_BS[row, place + 1] = len(turn.answer.encode())
                answers.append((row, place + 1))
                ids += self.answer_ids(turn)
                labels.append(self.rows.get(turn.label or "", -1))
        visual_BS = torch.zeros(block_BS.shape, dtype=torch.bool)
        visual_BS[:, :n] = True
        box_BN4 = torch.from_numpy(np.stack(boxes))
        return Side(
            inputs=dict(inputs),
            valid_BS=block_BS >= 0,
            block_BS=block_BS,
            byte_end_BS=byte_end_BS,
            answer_A2=torch.tensor(answers),
            answer_ids_A=torch.tensor(ids),
            visual_BS=visual_BS,
            visual_box_BN4=box_BN4,
            visual_mask_BN=(box_BN4[..., 2] > box_BN4[..., 0]) & (box_BN4[..., 3] > box_BN4[..., 1]),
            cell_box_BC4=torch.from_numpy(batch_cells([view.layout for view in views])[0]),
            frame="page" if self.form is None else "trace",
            answer_label_A=torch.tensor(labels),
        )

    def pixels(self, pages: Sequence[np.ndarray]) -> dict[str, Tensor]:
        """What the image processor makes of pages."""
        from PIL import Image

        found = self.processor(images=[Image.fromarray(page) for page in pages], return_tensors="pt")
        return {"pixel_values": found["pixel_values"]}

    def _page_boxes(self, grid: tuple[int, int]) -> np.ndarray:
        """Page box of every token, float32 [N, 4]; zeros where the processor put padding."""
        width, height = self.size_px or (0, 0)
        ramp_HW3 = np.zeros((height, width, 3), np.uint8)
        ramp_HW3[..., 0] = np.round((np.arange(width) + 0.5) / width * 255)[None]
        ramp_HW3[..., 1] = np.round((np.arange(height) + 0.5) / height * 255)[:, None]
        ramp_HW3[..., 2] = 255  # tells the page from what the processor pads with
        seen, dark, light = (
            self.pixels([page])["pixel_values"][0].double().numpy()
            for page in (ramp_HW3, np.zeros_like(ramp_HW3), np.full_like(ramp_HW3, 255))
        )
        low, high = dark.min((1, 2), keepdims=True), light.max((1, 2), keepdims=True)
        colour_3HW = (seen - low) / (high - low)
        boxes = np.zeros((*grid, 4), np.float32)
        edges_y, edges_x = (
            np.linspace(0, size, count + 1).round().astype(int)
            for size, count in zip(colour_3HW.shape[1:], grid, strict=True)
        )
        for row in range(grid[0]):
            for column in range(grid[1]):
                part = colour_3HW[:, edges_y[row] : edges_y[row + 1], edges_x[column] : edges_x[column + 1]]
                paper = part[2] > 0.5
                if paper.mean() < LEAST_PAPER:
                    continue
                for axis, count in ((0, part.shape[2]), (1, part.shape[1])):
                    value = np.clip(part[axis][paper], 0, 1)
                    half_px = (value.max() - value.min()) / max(count - 1, 1) / 2
                    boxes[row, column, axis] = max(value.min() - half_px, 0)
                    boxes[row, column, axis + 2] = min(value.max() + half_px, 1)
        return boxes.reshape(-1, 4)

    def arranged(self, signal_BLT: Tensor, n_recorded_B: Tensor | None) -> dict[str, Tensor]:
        """Signals in the model's form as its inputs.

        Args:
            signal_BLT: [B, 12, T].
            n_recorded_B: samples before the padding; only the time-series families read it.
        """
        assert self.form is not None
        if self.input_name == "past_values":  # the time-series families: time first, gaps marked
            assert n_recorded_B is not None
            seen_BLT = (torch.arange(self.form.n_samples) < n_recorded_B[:, None])[:, None]
            seen_BLT = seen_BLT.expand_as(signal_BLT)
            if self.form.leads == "apart":
                signal_BLT, seen_BLT = (value.reshape(-1, 1, self.form.n_samples) for value in (signal_BLT, seen_BLT))
            return {"past_values": signal_BLT.transpose(1, 2), "past_observed_mask": seen_BLT.transpose(1, 2)}
        shape = {"flattened": (signal_BLT.shape[0], -1), "apart": (-1, self.form.n_samples)}.get(self.form.leads)
        return {self.input_name: signal_BLT.reshape(shape) if shape else signal_BLT}

    def _trace_boxes(self, trace: Trace) -> np.ndarray:
        """Box of every token on the trace, float32 [N, 4]; zeros where it sees nothing but padding."""
        assert self.form is not None
        time_N2 = self._samples_N2 / self.form.fs_hz
        boxes_N4 = trace.layout.boxes(np.maximum(self._lead_N, 0), time_N2)
        boxes_N4[self._lead_N < 0, 1], boxes_N4[self._lead_N < 0, 3] = 0, 1  # all leads at once
        centre_N = self._samples_N2.mean(1)
        return np.where((centre_N < trace.n_recorded)[:, None], boxes_N4, 0).astype(np.float32)


AnyEncoder = Encoder | ClassifierEncoder


def input_name(model: Any) -> str:
    """Name of the argument that takes the signal."""
    import inspect

    arguments = [name for name in inspect.signature(type(model).forward).parameters if name != "self"]
    wanted = getattr(model, "main_input_name", "")
    known = [name for name in (wanted, "past_values", "input_values") if name in arguments]
    return known[0] if known else arguments[0]


def token_spans(classifier: Classifier, form: TraceForm) -> tuple[np.ndarray, np.ndarray]:
    """Lead (-1: all of them) and first and last sample of what each token sees, int64 [N] and float64 [N, 2].

    Receptive fields of convolutions and patches, where the config holds them and they give the tokens that there are;
    equal shares of time otherwise. A token that sees the end of one lead and the beginning of the next, in a flattened
    series, belongs to the lead that its middle lies in.
    """
    config = classifier.config
    series, each = classifier.grid
    length = form.n_samples * (len(LEADS) if form.leads == "flattened" else 1)
    hop, reach, first = length / each, length / each, 0.0
    if getattr(config, "context_length", None):
        patch, stride = config.patch_length, config.patch_stride
        count = (length - patch) // stride + 1
        hop, reach, first = float(stride), float(patch), float(length - patch - stride * (count - 1))
    elif getattr(config, "conv_kernel", None) and getattr(config, "conv_stride", None):
        field, jump, count = 1, 1, length
        for kernel, stride in zip(config.conv_kernel, config.conv_stride, strict=True):
            field, jump, count = field + (kernel - 1) * jump, jump * stride, (count - kernel) // stride + 1
        if count == each:
            hop, reach = float(jump), float(field)
    start_n = first + hop * np.arange(each)
    span_n2 = np.stack([start_n, np.minimum(start_n + reach, length)], axis=1)
    if form.leads == "flattened":
        lead_n = np.clip(span_n2.mean(1) // form.n_samples, 0, len(LEADS) - 1).astype(np.int64)
        span_n2 = np.clip(span_n2 - lead_n[:, None] * form.n_samples, 0, form.n_samples)
        return lead_n, span_n2
    if series == len(LEADS):
        return np.repeat(np.arange(len(LEADS)), each), np.tile(span_n2, (len(LEADS), 1))
    return np.full(series * each, -1, np.int64), np.tile(span_n2, (series, 1))
