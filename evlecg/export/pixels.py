"""What an image processor does to pages of one size, found out by trying it, as a module that any exporter can trace.

For pages of one size, a processor's output is a fixed function of their pixels: each number of it is one pixel of the
page, or of the page resized, times a factor, plus a constant. Which pixel is read off pages that carry their pixels'
indices in their colours; what is resized, and how, is heard from torchvision while the processor runs. A graph with
this in front takes pages as they are drawn, so that a device needs no image processor, and none has to be written
again for it. The module is compared with the processor before it is used.

Shape legend: B pages, H and W pixel rows and columns of a page, h and w of a view, E numbers that the processor makes
of one page.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from evlecg.errors import EvlecgError

LEVELS = 256
MOST_LEVELS_OFF = 1.51  # after resizing, which torchvision does in integers
SOME_LEVELS_OFF = 0.02  # without: rounding of the factor and the constant

Processor = Callable[[np.ndarray], dict[str, Tensor]]  # page uint8 [H, W, 3] -> the inputs that depend on it


@dataclass(frozen=True)
class _View:
    """The page, or a resized view: where it comes from, its height and width, and the matrices that make it."""

    source: int
    height: int
    width: int
    rows_hH: Tensor | None = None
    columns_wW: Tensor | None = None


class Pixels(nn.Module):
    """Pages in, a model's `pixel_values` out.

    Args:
        process: the image processor, one page at a time.
        size_px: (width, height) of the pages.
        where: what an error names.

    Attributes:
        constants: what else the processor returns, the same for every page: name -> tensor of one page.

    Raises:
        EvlecgError: what the processor does cannot be told this way.
    """

    def __init__(self, process: Processor, size_px: tuple[int, int], *, where: str) -> None:
        super().__init__()
        self.size_px = size_px
        self._views = _heard_views(process, size_px, where)
        index_E, factor, constant, seen = self._measure(process)
        self.shape = tuple(seen["pixel_values"].shape)
        self.constants = {name: value for name, value in seen.items() if name != "pixel_values"}
        for number, view in enumerate(self._views):
            self.register_buffer(f"rows_{number}", view.rows_hH, persistent=False)
            self.register_buffer(f"columns_{number}", view.columns_wW, persistent=False)
        self._whole = self._whole_view(index_E)
        first, pattern, offset = _factored(index_E if self._whole is None else torch.zeros(1, dtype=torch.int64))
        self.register_buffer("first", first, persistent=False)
        self.register_buffer("pattern", pattern, persistent=False)
        self.register_buffer("offset", offset, persistent=False)
        self.register_buffer("factor", factor, persistent=False)
        self.register_buffer("constant", constant, persistent=False)
        self._prove(process, where)

    def forward(self, page_BHW3: Tensor) -> Tensor:
        """uint8 [B, H, W, 3] -> `pixel_values` of B pages, as the processor would have stacked them."""
        views = [page_BHW3.to(torch.float32)]
        for number, view in enumerate(self._views[1:], start=1):
            seen = views[view.source]
            seen = _levels(torch.matmul(getattr(self, f"columns_{number}"), seen))  # [w, W] @ [B, H, W, 3]
            rows_hH = getattr(self, f"rows_{number}")
            seen = torch.matmul(rows_hH, seen.flatten(2)).unflatten(2, (view.width, 3))
            views.append(_levels(seen))
        if self._whole is not None:  # the usual case, without a table of indices as large as the page
            values = views[self._whole].permute(0, 3, 1, 2).reshape(-1, *self.shape)
            return self._scaled(values)
        flat = torch.cat([view.flatten(1) for view in views], 1) if len(views) > 1 else views[0].flatten(1)
        first, offset, pattern = self.first, self.offset, self.pattern
        assert isinstance(first, Tensor) and isinstance(offset, Tensor) and isinstance(pattern, Tensor)
        index = first[:, None] + offset[pattern]
        return self._scaled(flat[:, index.flatten()].reshape(-1, *self.shape))

    def _scaled(self, values: Tensor) -> Tensor:
        factor, constant = self.factor, self.constant
        assert isinstance(factor, Tensor) and isinstance(constant, Tensor)
        values = values * factor + constant
        return values.squeeze(1) if self.shape[0] == 1 else values.flatten(0, 1)

    def _whole_view(self, index_E: Tensor) -> int | None:
        """The view that is shown as a whole, channels first; None where it is cut, or there are several."""
        start = 0
        for number, view in enumerate(self._views):
            index_hw3 = torch.arange(view.height * view.width * 3).reshape(view.height, view.width, 3) + start
            start += index_hw3.numel()
            if torch.equal(index_hw3.permute(2, 0, 1).flatten(), index_E.flatten()):
                return number
        return None

    def _measure(self, process: Processor) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
        """Index into the views, factor and constant of every number, and all that the processor returned."""
        sizes = [view.height * view.width * 3 for view in self._views]
        index_V = [torch.arange(size) + sum(sizes[:number]) for number, size in enumerate(sizes)]

        def shown(levels: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
            coded = [
                levels(index).to(torch.uint8).reshape(view.height, view.width, 3)
                for index, view in zip(index_V, self._views, strict=True)
            ]
            calls = iter(coded[1:])

            def instead(image: Tensor, real: Callable[..., Tensor], size: Any, **how: Any) -> Tensor:
                return next(calls).permute(2, 0, 1).expand(*image.shape[:-3], -1, -1, -1).to(image.dtype)

            with _hearing(instead):
                return process(coded[0].numpy())

        dark, light = shown(torch.zeros_like), shown(lambda index: torch.full_like(index, LEVELS - 1))
        low, span = dark["pixel_values"].double(), (light["pixel_values"] - dark["pixel_values"]).double()
        factor = span / (LEVELS - 1)
        index_E = torch.zeros(factor.shape, dtype=torch.int64)
        for digit in range(4):
            if LEVELS**digit >= sum(sizes):
                break
            found = shown(lambda index, digit=digit: (index // LEVELS**digit) % LEVELS)["pixel_values"].double()
            level = torch.where(factor != 0, (found - low) / torch.where(factor != 0, factor, 1.0), 0.0)
            index_E += level.round().to(torch.int64) * LEVELS**digit
        index_E = torch.where(factor != 0, index_E, 0).clamp(0, sum(sizes) - 1)
        return index_E, _smallest(factor.float()), _smallest(low.float()), dark

    @torch.no_grad()
    def _prove(self, process: Processor, where: str) -> None:
        """Compares with the processor on noise and on smooth shades."""
        width, height = self.size_px
        noise = np.random.default_rng(0).integers(0, LEVELS, (height, width, 3), dtype=np.uint8)
        ramp = (np.arange(height)[:, None, None] + np.arange(width)[None, :, None]) // np.array([2, 3, 5]) % LEVELS
        allowed = MOST_LEVELS_OFF if len(self._views) > 1 else SOME_LEVELS_OFF
        for page in (noise, ramp.astype(np.uint8)):
            wanted = process(page)["pixel_values"]
            found = self(torch.from_numpy(page)[None])
            factor = self.factor
            assert isinstance(factor, Tensor)
            level = factor.abs().clamp_min(1e-12).expand(self.shape).reshape(found.shape)
            if wanted.shape != found.shape or float(((wanted - found).abs() / level).max()) > allowed:
                raise EvlecgError("what the image processor does to a page cannot be written into a graph", where=where,
                                  hint="it does more than resize, cut, pad and scale; please report it")  # fmt: skip


def _levels(values: Tensor) -> Tensor:
    """As an image of 256 levels holds them: torchvision resizes bytes, one direction after the other."""
    return values.round().clamp(0, LEVELS - 1)


@contextmanager
def _hearing(instead: Callable[..., Tensor]) -> Iterator[None]:
    """`instead(image, real, size, **how)` is called where an image processor resizes a tensor to another size."""
    from torchvision.transforms.v2 import functional

    real = functional.resize

    def heard(image: Any, size: Any, **how: Any) -> Any:
        if not isinstance(image, Tensor) or list(size) == list(image.shape[-2:]):
            return real(image, size, **how)
        return instead(image, real, size, **how)

    functional.resize = heard
    try:
        yield
    finally:
        functional.resize = real


def _heard_views(process: Processor, size_px: tuple[int, int], where: str) -> list[_View]:
    """The page and its resized views, in the order in which the processor asks for them."""
    width, height = size_px
    page = np.random.default_rng(1).integers(0, LEVELS, (height, width, 3), dtype=np.uint8)
    seen = [torch.from_numpy(page).permute(2, 0, 1)]
    views = [_View(0, height, width)]

    def listen(image: Tensor, real: Callable[..., Tensor], size: Any, **how: Any) -> Tensor:
        resized = real(image, size, **how)
        shown = image.reshape(-1, *image.shape[-3:])
        sources = [number for number, known in enumerate(seen)
                   if len(shown) == 1 and known.shape == shown[0].shape and torch.equal(known, shown[0])]  # fmt: skip
        if not sources or image.dtype != torch.uint8:
            raise EvlecgError("the image processor resizes more than the page as a whole", where=where)
        high, wide = resized.shape[-2:]
        views.append(_View(sources[0], high, wide, _matrix(real, image.shape[-2], high, how),
                           _matrix(real, image.shape[-1], wide, how)))  # fmt: skip
        seen.append(resized.reshape(-1, *resized.shape[-3:])[0])
        return resized

    with _hearing(listen):
        process(page)
    return views


def _matrix(real: Callable[..., Tensor], n_from: int, n_to: int, how: dict[str, Any]) -> Tensor:
    """Float weights [n_to, n_from] of a resize along one axis: what it makes of the unit vectors."""
    unit = torch.eye(n_from)[:, None, :, None].expand(-1, 1, -1, 2)  # one image a vector, two columns wide
    return real(unit, [n_to, 2], **how)[:, 0, :, 0].T.contiguous()


def _smallest(values: Tensor) -> Tensor:
    """The same values with every axis along which they do not change cut to one."""
    for axis in range(values.ndim):
        one = values.narrow(axis, 0, 1)
        if torch.equal(values, one.expand_as(values)):
            values = one.contiguous()
    return values


def _factored(index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """An index tensor as `first[:, None] + offset[pattern]`, in the split of its axes that takes the least room."""
    best: tuple[Tensor, Tensor, Tensor] | None = None
    for axis in range(1, index.ndim + 1):
        rows = index.flatten(0, axis - 1).flatten(1) if axis < index.ndim else index.reshape(-1, 1)
        first = rows[:, 0].contiguous()
        offset, pattern = torch.unique(rows - first[:, None], dim=0, return_inverse=True)
        size = len(first) * 2 + offset.numel()
        if best is None or size < best[0].numel() * 2 + best[2].numel():
            best = first, pattern.contiguous(), offset.contiguous()
    assert best is not None
    return best
