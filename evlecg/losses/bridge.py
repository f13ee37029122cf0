"""Two tokenizers, one answer: where both sides have read the same bytes, and which of their words are the same.

Student and teacher read the same answer cut into different tokens. Wherever both have a boundary at the same byte, what
came before is the same text for both: the tokens between two such bytes form a *group* (one or several tokens on either
side), and the distributions with which both sides *start* a group answer the same question. They can be compared word
by word over the tokens that both vocabularies hold, everything else put into one further class.

Byte-aligned groups are those of TRL's GOLD and of approximate-likelihood matching (Minixhofer et al. 2025, arXiv
2503.20083); comparing distributions at common boundaries only, rather than position by position, is what keeps a longer
cut on one side from shifting everything that follows.

Shape legend: A answer tokens of one side in the batch, G groups, V vocabulary of one side, K shared classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from evlecg.schema import Side

END = b"\x00end of turn"  # the entry, in `ModelFacts.tokens`, of the mark that ends an answer


@dataclass(frozen=True)
class Groups:
    """Byte-aligned groups of answer tokens.

    Attributes:
        student_A, teacher_A: group of every answer token, -1 where the other side has no boundary behind it.
        student_first_G, teacher_first_G: the answer token (row of `Side.answer_A2`) that a group starts with.
        opens_G: bool, the group starts the answer: nothing of it has been read.
    """

    student_A: Tensor
    teacher_A: Tensor
    student_first_G: Tensor
    teacher_first_G: Tensor
    opens_G: Tensor

    def __len__(self) -> int:
        return len(self.opens_G)


def answer_groups(student: Side, teacher: Side) -> Groups:
    """Groups the answer tokens of both sides at the bytes where both have a boundary.

    Rows and blocks of the two sides hold the same questions. Tokens that end at the same byte (parts of one character,
    white space before the answer) stay together, so every group reads at least one byte, or the end of the turn.
    """
    keys, scale = _keys(student, teacher)
    student_key_A, teacher_key_A = keys
    common_G = student_key_A[torch.isin(student_key_A, teacher_key_A) & (student_key_A % scale > 0)].unique()
    groups = [_group_of(key_A, common_G, scale) for key_A in keys]
    firsts = [_first(group_A, len(common_G)) for group_A in groups]
    question_G = common_G // scale
    opens_G = torch.ones_like(question_G, dtype=torch.bool)
    opens_G[1:] = question_G[1:] != question_G[:-1]
    return Groups(groups[0], groups[1], firsts[0], firsts[1], opens_G)


def shared_classes(
    student_tokens: Sequence[bytes | None], teacher_tokens: Sequence[bytes | None], *, opening: bool
) -> tuple[Tensor, Tensor, int]:
    """Which class of answers every token of both vocabularies belongs to.

    Args:
        student_tokens, teacher_tokens: bytes of every token, None where it stands for no text.
        opening: the tokens start an answer: leading spaces, which only say how a template ends, do not count.

    Returns:
        int [V] of the student, int [V] of the teacher, and the number of classes K. Tokens that only one side holds
        belong to class K - 1.
    """

    def spelt(tokens: Sequence[bytes | None]) -> list[bytes | None]:
        if not opening:
            return [token or None for token in tokens]
        return [token.lstrip(b" ") or None if token is not None else None for token in tokens]

    student, teacher = spelt(student_tokens), spelt(teacher_tokens)
    both = sorted({token for token in student if token is not None} & {token for token in teacher if token is not None})
    number = {token: place for place, token in enumerate(both)}
    rest = len(both)
    maps = [torch.tensor([number.get(token, rest) if token is not None else rest for token in side])
            for side in (student, teacher)]  # fmt: skip
    return maps[0], maps[1], rest + 1


def class_log_probabilities(logp_GV: Tensor, class_V: Tensor, n_classes: int) -> Tensor:
    """Log probability of every class: log of the sum over its tokens, [G, K]; classes without tokens get -inf.

    Stable: sums are taken relative to the largest token of the class.
    """
    class_GV = class_V.expand(len(logp_GV), -1)
    floor = torch.finfo(logp_GV.dtype).min
    most_GK = logp_GV.new_full((len(logp_GV), n_classes), floor).scatter_reduce(
        1, class_GV, logp_GV.detach(), "amax", include_self=True
    )
    scaled_GV = (logp_GV - most_GK.gather(1, class_GV)).exp()
    sum_GK = logp_GV.new_zeros(most_GK.shape).scatter_add(1, class_GV, scaled_GV)
    return torch.where(sum_GK > 0, sum_GK.clamp_min(torch.finfo(logp_GV.dtype).tiny).log() + most_GK, -torch.inf)


def _keys(student: Side, teacher: Side) -> tuple[tuple[Tensor, Tensor], int]:
    """Every answer token as one number: question (row and block), then the byte that it ends at."""
    parts = []
    for side in (student, teacher):
        row_A, place_A = side.answer_A2.unbind(1)
        parts.append((row_A, side.block_BS[row_A, place_A], side.byte_end_BS[row_A, place_A]))
    scale = 1 + max((int(end_A.max()) for *_, end_A in parts if len(end_A)), default=0)
    blocks = 1 + max((int(block_A.max()) for _, block_A, _ in parts if len(block_A)), default=0)
    first, second = ((row_A * blocks + block_A) * scale + end_A for row_A, block_A, end_A in parts)
    return (first, second), scale


def _group_of(key_A: Tensor, common_G: Tensor, scale: int) -> Tensor:
    if not len(common_G):
        return torch.full_like(key_A, -1)
    group_A = torch.searchsorted(common_G, key_A)
    inside_A = group_A < len(common_G)
    same_A = common_G[group_A.clamp_max(len(common_G) - 1)] // scale == key_A // scale
    return torch.where(inside_A & same_A, group_A, -1)


def _first(group_A: Tensor, n_groups: int) -> Tensor:
    place_A = torch.arange(len(group_A), device=group_A.device)
    held_A = group_A >= 0
    first_G = torch.full((n_groups,), len(group_A), device=group_A.device)
    return first_G.scatter_reduce(0, group_A[held_A], place_A[held_A], "amin", include_self=True)
