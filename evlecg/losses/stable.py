"""What keeps the losses in float32 and their gradients finite.

Shape legend: B batch rows, N and M tokens of two sets, D width.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

P = ParamSpec("P")
R = TypeVar("R")

NARROW = (torch.bfloat16, torch.float16)


def full_precision(function: Callable[P, R]) -> Callable[P, R]:
    """Runs `function` outside autocast, with bfloat16 and float16 tensors widened to float32.

    float64 stays as it is, so that tests can compare with references at full precision. Tensors are looked for among
    the arguments themselves, not inside containers.
    """

    def widened(value: Any) -> Any:
        return value.float() if isinstance(value, Tensor) and value.dtype in NARROW else value

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        device_type = next(v.device.type for v in (*args, *kwargs.values()) if isinstance(v, Tensor))
        with torch.autocast(device_type, enabled=False):
            wide: Any = functools.partial(function, *(widened(value) for value in args))
            return wide(**{name: widened(value) for name, value in kwargs.items()})

    return run


def zero_where_masked(tokens_BND: Tensor, mask_BN: Tensor) -> Tensor:
    """Tokens with exact zeros where the mask is False.

    Filled, not multiplied: padding may hold NaN (a softmax over nothing), and NaN times zero is NaN, also backwards.
    """
    return tokens_BND.masked_fill(~mask_BN[..., None], 0)


def layer_normalised(tokens_BND: Tensor) -> Tensor:
    """Zero mean and unit variance over the width, without learned gain."""
    return F.layer_norm(tokens_BND, tokens_BND.shape[-1:])


def squared_distance(x_BND: Tensor, y_BMD: Tensor, x_mask_BN: Tensor, y_mask_BM: Tensor) -> Tensor:
    """Squared Euclidean distances [B, N, M] between valid tokens; those of masked tokens are unspecified but finite.

    Both sets are first moved by the mean of the valid `y`: distances do not change, and the cancellation in
    |x|^2 + |y|^2 - 2 x.y no longer grows with a component that all tokens share.
    """
    x_BND, y_BMD = zero_where_masked(x_BND, x_mask_BN), zero_where_masked(y_BMD, y_mask_BM)
    centre_B1D = (y_BMD.sum(1) / y_mask_BM.sum(1, keepdim=True).clamp_min(1))[:, None].detach()
    x_BND, y_BMD = x_BND - centre_B1D, y_BMD - centre_B1D
    norms_BNM = x_BND.square().sum(-1)[:, :, None] + y_BMD.square().sum(-1)[:, None, :]
    return torch.baddbmm(norms_BNM, x_BND, y_BMD.transpose(1, 2), alpha=-2).clamp_min(0)


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of the values under a mask of the same shape; zero, still on the graph, where the mask is empty."""
    return values.masked_fill(~mask, 0).sum() / mask.sum().clamp_min(1)
