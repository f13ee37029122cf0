"""How states are made smaller, and what that costs.

| name | a number takes | what is lost |
|---|---|---|
| none | what the teacher computes in | nothing |
| bf16 | 2 bytes | 8 bits of precision |
| int8 | 1 byte, and 4 a token | rounding to 1/127 of a token's largest number |
| low_rank | less than half a byte | what a token has outside of the leading principal directions, then as int8 |

Principal directions (Pearson 1901) are fitted on the first tokens of a field and divided by their standard deviations,
so that one token's numbers are all of one size when they are rounded. How many are kept follows from the bytes that
they may take; what is lost is measured on every token that is written.

Shape legend: n tokens, D width of a field, R directions kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

COMPRESSIONS = ("none", "bf16", "int8", "low_rank")
STEPS = 127  # of int8, on either side of zero
SCALE_BYTES = 4
TINY_STD = 1e-12  # of tokens that are all the same
LEAST_STD = 1e-6  # relative to the first direction's: what varies less is rounding


@dataclass(frozen=True)
class Plain:
    """Numbers as they are, or as bfloat16."""

    dtype: torch.dtype | None = None

    def encode(self, x_nD: Tensor) -> dict[str, Tensor]:
        """Named tensors with one row a token."""
        return {"data": x_nD if self.dtype is None else x_nD.to(self.dtype)}

    def decode(self, parts: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
        """The tokens, in a dtype."""
        return parts["data"].to(dtype)


@dataclass(frozen=True)
class Int8:
    """Eight bits a number, and one scale a token."""

    def encode(self, x_nD: Tensor) -> dict[str, Tensor]:
        """Named tensors with one row a token."""
        x_nD = x_nD.float()
        scale_n1 = (x_nD.abs().amax(1, keepdim=True) / STEPS).clamp_min(torch.finfo(torch.float32).tiny)
        return {"data": (x_nD / scale_n1).round().to(torch.int8), "scale": scale_n1}

    def decode(self, parts: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
        """The tokens, in a dtype."""
        return (parts["data"].float() * parts["scale"]).to(dtype)


@dataclass(frozen=True)
class LowRank:
    """Coordinates along principal directions, in units of their standard deviations, as int8.

    Attributes:
        mean_D: of the tokens that it was fitted on.
        up_RD: directions times standard deviations; `decode` multiplies by it.
    """

    mean_D: Tensor
    up_RD: Tensor

    @property
    def rank(self) -> int:
        return len(self.up_RD)

    def encode(self, x_nD: Tensor) -> dict[str, Tensor]:
        """Named tensors with one row a token."""
        down_DR = self.up_RD.T / self.up_RD.square().sum(1)  # the rows are orthogonal
        return Int8().encode((x_nD.float() - self.mean_D) @ down_DR)

    def decode(self, parts: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
        """The tokens, in a dtype."""
        coordinates_nR = parts["data"].float() * parts["scale"]
        return torch.addmm(self.mean_D, coordinates_nR, self.up_RD).to(dtype)

    def to(self, device: torch.device | str) -> LowRank:
        """The same on another device."""
        return LowRank(self.mean_D.to(device), self.up_RD.to(device))


Codec = Plain | Int8 | LowRank


def codec_of(compression: str, field: str, fitted: LowRank | None) -> Codec:
    """What a field is stored with.

    Answers' logits and the states that predict them are few, and read to the last digit by the losses that compare
    distributions: they are never projected.
    """
    if compression == "low_rank" and field not in ("answer", "logits"):
        assert fitted is not None
        return fitted
    plain = {"none": Plain(), "bf16": Plain(torch.bfloat16)}
    return plain.get(compression, Int8() if field != "logits" else Plain(torch.bfloat16))


def fit_low_rank(tokens: Sequence[Tensor], rank: int) -> LowRank:
    """Mean and leading principal directions of the tokens, by the eigenvectors of their covariance, in float64.

    Args:
        tokens: [n, D] each.
        rank: directions to keep, as far as the tokens have so many.
    """
    n = sum(map(len, tokens))
    mean_D = torch.stack([part.double().sum(0) for part in tokens]).sum(0) / n
    covariance_DD = torch.zeros(len(mean_D), len(mean_D), dtype=torch.float64)
    for part in tokens:
        centred_nD = part.double() - mean_D
        covariance_DD += centred_nD.T @ centred_nD
    variance_D, direction_DD = torch.linalg.eigh(covariance_DD / n)
    std_R = variance_D.flip(0).clamp_min(0).sqrt()[:rank].clamp_min(TINY_STD)
    kept = int((std_R >= LEAST_STD * std_R[0]).sum())
    up_RD = (direction_DD.flip(1)[:, :kept] * std_R[:kept]).T
    return LowRank(mean_D.float(), up_RD.float().contiguous())


def affordable_rank(width: int, n_tokens: float, other_bytes: float, *, share: float, rows: int) -> int:
    """Directions with which a row's field takes at most a share of its fp16 bytes, at least one.

    Args:
        width: D.
        n_tokens: of an average row.
        other_bytes: that the row takes beside this field's numbers.
        share: of the fp16 bytes.
        rows: that the directions themselves are kept for.
    """
    left = share * 2 * width * n_tokens - other_bytes - SCALE_BYTES * n_tokens
    return max(1, min(width, int(left / (max(n_tokens, 1) + 4 * width / rows))))
