"""One row of a teacher's batch by itself: what its positions mean, and what the teacher gave there.

A row is cut out of the batch that it was computed in and put into another, with other neighbours: padding goes on the
way out and comes back on the way in. Cells are the business of a whole batch, hence a row keeps its page's.

Shape legend: as in schema.py; n rows of one field (positions, visual tokens or answer tokens), D its width.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from evlecg.page.layout import CellLayout, batch_cells
from evlecg.schema import AnswerLogits, Outputs, Side

STATES = ("hidden", "visual", "projected", "query", "key", "value")  # fields of Outputs, [n, D] a row
FIELDS = (*STATES, "answer", "logits")  # states that predict the answer's tokens; the logits themselves


@dataclass(frozen=True)
class Geometry:
    """Where a page's tokens and cells lie; a `CellLayout` without a page. Rows of like pages share one.

    Attributes:
        name, duration_s: of the page's layout; pages with the same have the same cells.
        box_N4: of the visual tokens, on the paper.
        cell_box_C4, lead_C, time_C2: of the cells, on the paper.
    """

    name: str
    duration_s: float
    box_N4: np.ndarray
    cell_box_C4: np.ndarray
    lead_C: np.ndarray
    time_C2: np.ndarray

    @property
    def paper(self) -> Geometry:
        return self

    def cells(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return self.cell_box_C4, self.lead_C, self.time_C2

    def to_bytes(self) -> bytes:
        """All that tells geometries apart."""
        arrays = (self.box_N4, self.cell_box_C4, self.lead_C, self.time_C2)
        return b"|".join([f"{self.name}|{self.duration_s}".encode(), *(array.tobytes() for array in arrays)])


@dataclass(frozen=True)
class RowSide:
    """One row of a `Side`, without padding.

    Attributes:
        ids: of the text's tokens; empty where the text is not the positions'.
        block, byte_end, visual, answer: of the row's S positions.
        answer_ids, answer_label: of its answer tokens; labels are empty for models that answer in words.
        geometry: where its visual tokens lie.
    """

    ids: np.ndarray
    block: np.ndarray
    byte_end: np.ndarray
    visual: np.ndarray
    answer: np.ndarray
    answer_ids: np.ndarray
    answer_label: np.ndarray
    geometry: Geometry

    def to_bytes(self) -> bytes:
        """The arrays, one after another: long stretches repeat themselves, so that little is left of them."""
        lists = (self.ids, self.block, self.byte_end, self.visual, self.answer, self.answer_ids, self.answer_label)
        sizes = np.array([len(part) for part in lists], "<i4")
        return zlib.compress(b"".join([sizes.tobytes(), *(part.astype("<i4").tobytes() for part in lists)]), 6)

    @classmethod
    def from_bytes(cls, data: bytes, geometry: Geometry) -> RowSide:
        """The inverse of `to_bytes`."""
        numbers = np.frombuffer(zlib.decompress(data), "<i4")
        sizes, numbers = numbers[:7], numbers[7:]
        return cls(*np.split(numbers, np.cumsum(sizes)[:-1]), geometry=geometry)


def split_side(side: Side, layouts: Sequence[CellLayout]) -> list[RowSide]:
    """The rows of a half, each without its padding.

    Args:
        side: on the CPU.
        layouts: of its rows' pages or traces.
    """
    answered_BS = torch.zeros_like(side.valid_BS)
    answered_BS[side.answer_A2[:, 0], side.answer_A2[:, 1]] = True
    ids_BS = side.inputs.get("input_ids")
    has_ids = ids_BS is not None and ids_BS.shape == side.valid_BS.shape
    counts = visual_counts(side)
    rows = []
    for row, layout in enumerate(layouts):
        n, own_A = int(side.valid_BS[row].sum()), side.answer_A2[:, 0] == row
        assert bool(side.valid_BS[row, :n].all()), "padding stands on the right"
        paper = layout.paper
        cell_box_C4, lead_C, time_C2 = paper.cells()
        geometry = Geometry(
            paper.name, paper.duration_s, side.visual_box_BN4[row, : counts[row]].numpy(), cell_box_C4, lead_C, time_C2
        )
        label_A = side.answer_label_A[own_A].numpy() if side.answer_label_A is not None else np.zeros(0, np.int64)
        rows.append(RowSide(
            ids=ids_BS[row, :n].numpy() if has_ids and ids_BS is not None else np.zeros(0, np.int64),
            block=side.block_BS[row, :n].numpy(), byte_end=side.byte_end_BS[row, :n].numpy(),
            visual=side.visual_BS[row, :n].numpy(), answer=answered_BS[row, :n].numpy(),
            answer_ids=side.answer_ids_A[own_A].numpy(), answer_label=label_A, geometry=geometry,
        ))  # fmt: skip
    return rows


def join_sides(rows: Sequence[RowSide], keys: Sequence[str], *, frame: str) -> Side:
    """Rows as a half of a batch. Its `inputs` hold the text alone: no model can be run on it.

    Args:
        rows: at least one.
        keys: what they are stored under.
        frame: see `Side`.
    """
    length, most = max(len(row.block) for row in rows), max(len(row.geometry.box_N4) for row in rows)

    def padded(name: str, value: int) -> Tensor:
        parts_BS = np.full((len(rows), length), value, np.int64)
        for place, row in enumerate(rows):
            part = getattr(row, name)
            parts_BS[place, : len(part)] = part
        return torch.from_numpy(parts_BS)

    box_BN4 = np.zeros((len(rows), most, 4), np.float32)
    for place, row in enumerate(rows):
        box_BN4[place, : len(row.geometry.box_N4)] = row.geometry.box_N4
    boxes = torch.from_numpy(box_BN4)
    block_BS = padded("block", -1)
    labels = np.concatenate([row.answer_label for row in rows]).astype(np.int64)
    has_text = all(len(row.ids) for row in rows)
    return Side(
        inputs={"input_ids": padded("ids", 0)} if has_text else {},
        valid_BS=block_BS >= 0,
        block_BS=block_BS,
        byte_end_BS=padded("byte_end", 0),
        answer_A2=padded("answer", 0).nonzero(),
        answer_ids_A=torch.from_numpy(np.concatenate([row.answer_ids for row in rows]).astype(np.int64)),
        visual_BS=padded("visual", 0).bool(),
        visual_box_BN4=boxes,
        visual_mask_BN=(boxes[..., 2] > boxes[..., 0]) & (boxes[..., 3] > boxes[..., 1]),
        cell_box_BC4=torch.from_numpy(batch_cells([row.geometry for row in rows])[0]),
        frame=frame,
        answer_label_A=torch.from_numpy(labels) if len(labels) else None,
        row_keys=tuple(keys),
    )


def split_outputs(outputs: Outputs, fields: Sequence[str]) -> list[dict[str, Tensor]]:
    """What a teacher gave for every row, field by field: [n, D] each, on the CPU."""
    side = outputs.side
    n_valid, n_visual = side.valid_BS.sum(1).tolist(), visual_counts(side)
    row_A = side.answer_A2[:, 0]
    found: list[dict[str, Tensor]] = [{} for _ in n_valid]
    for field in fields:
        if field in ("answer", "logits"):
            values_AD = side.before_answers(outputs.hidden_BSD) if field == "answer" else outputs.answer_logits_AV
            parts = values_AD.split([int((row_A == row).sum()) for row in range(len(found))])
        else:
            counts = n_valid if field == "hidden" else n_visual
            parts = [values_ND[:count] for values_ND, count in zip(_states(outputs, field), counts, strict=True)]
        for row, part in enumerate(parts):
            found[row][field] = part.detach().to("cpu", copy=True).contiguous()  # a view would hold the whole batch
    return found


def join_outputs(values: Mapping[str, tuple[Tensor, Sequence[int]]], side: Side, dtype: torch.dtype) -> Outputs:
    """Outputs of a batch from what its rows hold; fields that nobody stored come back empty.

    Args:
        values: field -> ([n of all rows, D], n of every row); on the device of `side`.
        side: from `join_sides`.
        dtype: of empty fields.
    """
    n_rows, n_positions, n_visual = len(side.valid_BS), side.valid_BS.shape[1], side.visual_box_BN4.shape[1]

    def padded(field: str) -> Tensor:
        length = n_positions if field == "hidden" else n_visual
        if field not in values:
            return torch.zeros(n_rows, length, 0, dtype=dtype, device=side.valid_BS.device)
        flat_nD, counts = values[field]
        if all(count == length for count in counts):
            return flat_nD.view(n_rows, length, -1)
        padded_BLD = flat_nD.new_zeros(n_rows, length, flat_nD.shape[1])
        for row, part in enumerate(flat_nD.split(list(counts))):
            padded_BLD[row, : len(part)] = part
        return padded_BLD

    nothing = torch.zeros(0, 0, dtype=dtype, device=side.valid_BS.device)
    return Outputs(
        hidden_BSD=padded("hidden"), visual_BND=padded("visual"), projected_BND=padded("projected"),
        answer_logits=AnswerLogits(values["logits"][0] if "logits" in values else nothing), side=side,
        attention={name: padded(name) for name in ("query", "key", "value") if name in values},
    )  # fmt: skip


def visual_counts(side: Side) -> list[int]:
    """Visual tokens of every row; where they stand outside of the text, rows are not told apart."""
    counts = side.visual_BS.sum(1).tolist()
    return counts if any(counts) else [side.visual_box_BN4.shape[1]] * len(counts)


def _states(outputs: Outputs, field: str) -> Tensor:
    own = {"hidden": outputs.hidden_BSD, "visual": outputs.visual_BND, "projected": outputs.projected_BND}
    return own[field] if field in own else outputs.attention[field]
