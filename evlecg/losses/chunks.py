"""Losses over answer tokens, a few at a time, so that logits over the whole vocabulary are never held at once.

A chunk's logits are read off its states, reduced to a number, and dropped; the backward pass reads them again
(activation checkpointing, Chen et al. 2016). That costs the output head once more, at the answers alone. What Liger's
fused linear cross-entropy does for one loss in one kernel, this does for every loss here, in plain torch.

Shape legend: A answer tokens of one side, R tokens of a chunk, V vocabulary.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from evlecg.schema import AnswerLogits

CHUNK_BYTES = 1 << 28  # of float32 logits: a chunk of all sides together
FEW_ROWS = 64  # are taken at once, whatever the vocabulary: 40 MB over 150,000 tokens


def summed(
    term: Callable[..., Tensor],
    logits: Sequence[AnswerLogits],
    rows: Sequence[Tensor],
    *per_row: Tensor,
    starts: Tensor | None = None,
) -> Tensor:
    """Sum of a term over rows of logits, `CHUNK_BYTES` of them at a time, though never less than what stays together.

    Args:
        term: (logits [R, V] of every side..., slices of `per_row`...) -> a tensor that adds up over chunks.
        logits: of one side or of several.
        rows: for each of them, which tokens [R]; one for one.
        per_row: further tensors whose first axis goes along.
        starts: bool [R], rows before which a chunk may begin; None: anywhere.

    Returns:
        The term over all rows, equal to `term` on all of them at once up to the order of summation. Where one chunk
        holds everything, it is exactly that, and nothing is computed twice.
    """
    n_rows = len(rows[0])

    def part(first: int, last: int) -> Tensor:
        chosen = [side.rows(index[first:last]) for side, index in zip(logits, rows, strict=True)]
        return term(*chosen, *(values[first:last] for values in per_row))

    if n_rows <= FEW_ROWS:
        return part(0, n_rows)
    with torch.no_grad():  # how wide they are, only reading one tells
        width = sum(side.rows(index[:1]).shape[-1] for side, index in zip(logits, rows, strict=True))
    bounds = _bounds(n_rows, max(1, CHUNK_BYTES // (4 * width)), starts)
    if len(bounds) == 2:
        return part(*bounds)
    parts = [checkpoint(part, first, last, use_reentrant=False, preserve_rng_state=False)
             for first, last in itertools.pairwise(bounds)]  # fmt: skip
    return torch.stack(parts).sum(0)


def _bounds(n_rows: int, most: int, starts: Tensor | None) -> list[int]:
    """Edges of chunks of at most `most` rows, moved back to the nearest row where one may begin."""
    if n_rows <= most:
        return [0, n_rows]
    allowed = list(range(n_rows)) if starts is None else starts.nonzero()[:, 0].tolist()
    bounds = [0]
    for place, start in enumerate(allowed):
        following = allowed[place + 1] if place + 1 < len(allowed) else n_rows
        if start > bounds[-1] and following - bounds[-1] > most:
            bounds.append(start)
    return [*bounds, n_rows]
