"""Where every visual token looks on the page: measured through the checkpoint's own processor, not derived.

The processor is given pages whose colours are their own coordinates, and what it returns tells which part of the page
every pixel came from, whatever was resized, padded, cropped, split or merged on the way. A *layout* then says which
pixels a token stands for, in the order in which the tokens stand in the text. Most families share one layout (every
tile an equal grid of tokens); `families.py` names the others. `tests.coverage` holds every layout against the model:
it changes a region of the page and looks which tokens move.

Shape legend: N visual tokens of one page; pictures are [tiles, 3, rows, columns]; groups are lists of N arrays
[3, pixels] with the channels x, y and paper (1 on the page, 0 where the processor padded), all in [0, 1].
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import torch

SLIVER = 0.05  # a token of which less is paper sees padding
Groups = list[np.ndarray]


@dataclass(frozen=True)
class Seen:
    """What a processor made of the page whose colours are its coordinates.

    Attributes:
        colour: float64 [tiles, 3, rows, columns]: x, y, paper; flat patches are tiles of one row.
        size_px: width, height of the page.
        config: the model's config.
        inputs: everything else that the processor returned for that page.
        local: as `colour`, tiles beside the whole page where the processor returns them apart from it.
    """

    colour: np.ndarray
    size_px: tuple[int, int]
    config: Any
    inputs: dict[str, Any]
    local: np.ndarray | None = None


def measure_boxes(
    process: Callable[[np.ndarray], dict[str, Any]],
    *,
    size_px: tuple[int, int],
    n_tokens: int,
    layout: str,
    config: Any,
) -> np.ndarray | None:
    """Page box of every visual token.

    Args:
        process: runs the processor on one page, uint8 [height, width, 3].
        size_px: width, height of pages.
        n_tokens: visual tokens of a page.
        layout: key of `LAYOUTS`.
        config: the model's config.

    Returns:
        float32 [n_tokens, 4] as x0 y0 x1 y1 in [0, 1], zeros where a token sees padding or no part of the page; None
        where the layout does not come to `n_tokens`.
    """
    width, height = size_px
    ramp = np.zeros((height, width, 3), np.uint8)
    ramp[..., 0] = np.round((np.arange(width) + 0.5) / width * 255)[None, :]
    ramp[..., 1] = np.round((np.arange(height) + 0.5) / height * 255)[:, None]
    black = np.zeros_like(ramp)
    inputs = process(ramp)  # one page a call: some processors pad the pages of a batch to one another
    on_black, on_white = process(black), process(~black)

    def colour_of(key: str) -> np.ndarray:
        places = _channel_places(lambda page: process(page)[key], black)
        seen, dark, light = (_tiles(each[key], places) for each in (inputs, on_black, on_white))
        low, high = dark.min((0, 2, 3), keepdims=True), light.max((0, 2, 3), keepdims=True)
        colour = (seen - low) / (high - low)  # 0..1: undoes any normalisation
        colour[:, 2] = ((light - dark) / (high - low))[:, 2]  # padding may be as light as paper; no page darkens it
        return colour

    local = colour_of("pixel_values_local") if "pixel_values_local" in inputs else None
    groups = LAYOUTS[layout](Seen(colour_of("pixel_values"), size_px, config, inputs, local), n_tokens)
    if groups is None or len(groups) != n_tokens:
        return None
    return np.stack([_box(group) for group in groups])


def grid(seen: Seen, n_tokens: int) -> Groups | None:
    """Every tile an equal grid of tokens in reading order, behind its class token where that is kept.

    Or flat patches: a token is a run of them (Qwen's merge).
    """
    cells = _even_grid(seen, n_tokens)
    return _behind_heads(seen, n_tokens, 1) if cells is None else cells


def _even_grid(seen: Seen, n_tokens: int) -> Groups | None:
    """An equal grid of tokens on every tile, and nothing else."""
    tiles, _, rows, columns = seen.colour.shape
    if rows == 1:
        if tiles % n_tokens:
            return None
        run = tiles // n_tokens
        return list(seen.colour.reshape(n_tokens, run, 3, columns).swapaxes(1, 2).reshape(n_tokens, 3, -1))
    if n_tokens % tiles:
        return None
    each = n_tokens // tiles
    down = round(math.sqrt(each * rows / columns))
    if down == 0 or each % down:
        return None
    across = each // down
    high, wide = rows // down, columns // across  # a remainder at the edge is not seen by the patches
    return [group for tile in seen.colour for group in _cut(tile[:, : high * down, : wide * across], down, across)]


def anyres(seen: Seen, n_tokens: int) -> Groups | None:
    """LLaVA-NeXT: the whole page, then its tiles put together, padding cut off, a newline token after every row.

    LLaVA-OneVision shrinks the rows and columns of a large page; what is left is an equal grid all the same.
    """
    from transformers.image_processing_utils import select_best_resolution

    side = seen.config.vision_config.image_size // seen.config.vision_config.patch_size
    side = int(side * Fraction(getattr(seen.config, "downsample_rate", None) or 1))
    whole = _cut(seen.colour[0], side, side)
    rest = n_tokens - len(whole)
    if len(seen.colour) == 1:
        return whole + [_NOWHERE] * rest
    width, height = seen.size_px
    tile_px = seen.colour.shape[-1]
    best = select_best_resolution((height, width), seen.config.image_grid_pinpoints)
    down, across = best[0] // tile_px, best[1] // tile_px
    if down * across != len(seen.colour) - 1:
        return None
    page = seen.colour[1:].reshape(down, across, 3, tile_px, tile_px).transpose(2, 0, 3, 1, 4)
    page = page.reshape(3, down * tile_px, across * tile_px)
    rows, columns = down * side, across * side
    patch_px = tile_px // side
    if width / height > columns / rows:
        cut = (rows - int(round(height * columns / width, 7))) // 2
        page, rows = page[:, cut * patch_px : page.shape[1] - cut * patch_px], rows - 2 * cut
    else:
        cut = (columns - int(round(width * rows / height, 7))) // 2
        page, columns = page[:, :, cut * patch_px : page.shape[2] - cut * patch_px], columns - 2 * cut
    fits = [(r, rest // r - 1) for r in range(1, rows + 1) if rest % r == 0 and 0 < rest // r - 1 <= columns]
    if not fits:
        return None
    rows, columns = min(fits, key=lambda fit: abs(math.log(fit[0] / fit[1] * columns / rows)))
    tokens = _cut(page, rows, columns)
    lines = [[*tokens[row * columns : (row + 1) * columns], _NOWHERE] for row in range(rows)]
    return whole + [token for line in lines for token in line]


def blocks(seen: Seen, n_tokens: int) -> Groups | None:
    """Flat patches in reading order, pooled in square blocks; patches of padding at the end."""
    patches = [patch for patch in seen.colour[:, :, 0] if patch[2].mean() > SLIVER]
    if not patches or len(patches) % n_tokens:
        return None
    pool = math.isqrt(len(patches) // n_tokens)
    left = np.array([patch[0].mean() for patch in patches])
    across = next((place for place in range(1, len(left)) if left[place] < left[place - 1]), len(left))
    if pool * pool * n_tokens != len(patches) or len(patches) % across or across % pool:
        return None
    patch_DA3P = np.stack(patches).reshape(-1, across, 3, seen.colour.shape[-1])
    return [
        np.concatenate(list(patch_DA3P[row : row + pool, column : column + pool].reshape(pool * pool, 3, -1)), axis=1)
        for row in range(0, len(patch_DA3P), pool)
        for column in range(0, across, pool)
    ]


def raster(seen: Seen, n_tokens: int) -> Groups | None:
    """Patches in reading order, merged in square blocks inside the model."""
    key = "image_grid_thw" if "image_grid_thw" in seen.inputs else "image_grid_hw"
    down, across = (int(side) for side in seen.inputs[key][0][-2:])
    lines = _merged(seen.colour, down, across, n_tokens)
    return None if lines is None else [token for line in lines for token in line]


def raster_lines(seen: Seen, n_tokens: int) -> Groups | None:
    """`raster` with a newline token behind every line of tokens, and perhaps one before and one behind them all."""
    down, across = (int(side) for side in seen.inputs["image_grid_thw"][0][-2:])
    for merge in range(1, min(down, across) + 1):
        n_lines, n_columns = down // merge, across // merge
        ends = n_tokens - n_lines * (n_columns + 1)
        if ends not in (0, 2):
            continue
        found = _merged(seen.colour, down, across, n_lines * n_columns)
        if found is not None:
            end = [_NOWHERE] * (ends // 2)
            return [*end, *(token for line in found for token in [*line, _NOWHERE]), *end]
    return None


def raster_tiles(seen: Seen, n_tokens: int) -> Groups | None:
    """Tiles of patches in reading order, each of its own shape and padded to one length, merged in square blocks."""
    shapes = [(int(down), int(across)) for down, across in seen.inputs["spatial_shapes"]]
    patches = seen.colour.reshape(len(shapes), -1, *seen.colour.shape[1:])
    return _merged_tiles(
        [tile[: down * across] for (down, across), tile in zip(shapes, patches, strict=True)], shapes, n_tokens
    )


def headed(seen: Seen, n_tokens: int) -> Groups | None:
    """Every tile's tokens begin with some that see all of it (class token, registers, a mean), then an equal grid."""
    each = n_tokens // len(seen.colour)
    found = (_behind_heads(seen, n_tokens, heads) for heads in range(each))
    return next((groups for groups in found if groups is not None), None)


def _behind_heads(seen: Seen, n_tokens: int, heads: int) -> Groups | None:
    """On every tile `heads` tokens that see all of it, then an equal grid whose cells are as square as patches are."""
    tiles, _, rows, columns = seen.colour.shape
    per_tile = n_tokens // tiles - heads
    if n_tokens % tiles or per_tile < 1 or rows == 1:
        return None
    cells = _even_grid(seen, per_tile * tiles)
    down = round(math.sqrt(per_tile * rows / columns))
    if cells is None or abs(rows / down * (per_tile // down) / columns - 1) > 0.2:
        return None
    return [
        group
        for place, tile in enumerate(seen.colour)
        for group in [tile.reshape(3, -1)] * heads + cells[place * per_tile : (place + 1) * per_tile]
    ]


def headed_centred(seen: Seen, n_tokens: int) -> Groups | None:
    """Florence-2: a mean of the page, then a grid whose tokens stand at multiples of their stride, not between them.

    Its strided convolutions are padded on both sides, so that the first token looks at the page's very corner.
    """
    tile = seen.colour[0]
    rows, columns = tile.shape[1:]
    down = round(math.sqrt((n_tokens - 1) * rows / columns))
    if len(seen.colour) != 1 or down == 0 or (n_tokens - 1) % down:
        return None
    across = (n_tokens - 1) // down
    edge_y, edge_x = (
        ((np.arange(count + 1) - 0.5) * size / count).round().astype(int).clip(0, size)
        for count, size in ((down, rows), (across, columns))
    )
    return [tile.reshape(3, -1)] + [
        tile[:, edge_y[row] : edge_y[row + 1], edge_x[column] : edge_x[column + 1]].reshape(3, -1)
        for row in range(down)
        for column in range(across)
    ]


def lines(seen: Seen, n_tokens: int) -> Groups | None:
    """One picture, an equal grid with a newline token behind every line."""
    if len(seen.colour) != 1:
        return None
    rows, columns = seen.colour.shape[2:]
    fits = [(down, n_tokens // down - 1) for down in range(1, n_tokens) if n_tokens % down == 0 and n_tokens > down]
    down, across = min(fits, key=lambda fit: abs(math.log(fit[0] * columns / (fit[1] * rows))))
    return _lined(seen.colour[0], down, across)


def local_grids(seen: Seen, n_tokens: int) -> Groups | None:
    """Step 3.7: an equal grid to every tile, then to the whole page; a token is as many pixels wide in both."""
    pictures = [*(seen.local if seen.local is not None else ()), seen.colour[0]]
    sides = [round(picture.shape[1] / _token_px(pictures, n_tokens)) for picture in pictures]
    return [group for picture, side in zip(pictures, sides, strict=True) for group in _cut(picture, side, side)]


def local_whole(seen: Seen, n_tokens: int) -> Groups | None:
    """DeepSeek-OCR 2: queries to every tile, then to the whole page, without a place of their own; then a separator."""
    pictures = [*(seen.local if seen.local is not None else ()), seen.colour[0]]
    sides = [round(picture.shape[1] / _token_px(pictures, n_tokens - 1)) for picture in pictures]
    groups = [picture.reshape(3, -1) for picture, side in zip(pictures, sides, strict=True) for _ in range(side**2)]
    return [*groups, _NOWHERE]


def local_lines(seen: Seen, n_tokens: int) -> Groups | None:
    """Unlimited-OCR: the tiles put together, a newline token behind every line; the whole page so; then a separator."""
    page_px, whole = seen.colour.shape[-1], seen.colour[0]
    if seen.local is None:
        side = math.isqrt(n_tokens)
        return [*_lined(whole, side, side), _NOWHERE] if side * (side + 1) + 1 == n_tokens else None
    tile_px = seen.local.shape[-1]
    across, down = (int(side) for side in seen.inputs["patches_grid"][0])
    joined = seen.local.reshape(down, across, 3, tile_px, tile_px).transpose(2, 0, 3, 1, 4)
    joined = joined.reshape(3, down * tile_px, across * tile_px)
    for token_px in range(1, tile_px + 1):
        each, side = math.ceil(tile_px / token_px), math.ceil(page_px / token_px)
        if down * each * (across * each + 1) + side * (side + 1) + 1 == n_tokens:
            return [*_lined(joined, down * each, across * each), *_lined(whole, side, side), _NOWHERE]
    return None


def strips(seen: Seen, n_tokens: int) -> Groups | None:
    """MiniCPM-V: patches in reading order side by side in one long strip, the whole page first, then its slices."""
    side = seen.colour.shape[2]
    patches = seen.colour[0].reshape(3, side, -1, side).transpose(2, 0, 1, 3)
    shapes = [(int(down), int(across)) for down, across in seen.inputs["target_sizes"]]
    return _merged_tiles(
        np.split(patches, np.cumsum([down * across for down, across in shapes])[:-1]), shapes, n_tokens
    )


def pooled(seen: Seen, n_tokens: int) -> Groups | None:
    """Molmo 2: the processor lists the patches of every token, -1 for none."""
    patches = seen.colour.reshape(len(seen.colour), 3, -1)
    return [
        np.concatenate([_NOWHERE, *(patches[place] for place in places.tolist() if place >= 0)], axis=1)
        for places in seen.inputs["image_token_pooling"]
    ]


def whole(seen: Seen, n_tokens: int) -> Groups | None:
    """Tokens of a resampler or query transformer have no place of their own: each looks at its whole tile."""
    tiles = len(seen.colour)
    if n_tokens % tiles or seen.colour.shape[2] == 1:
        return None
    return [tile.reshape(3, -1) for tile in seen.colour for _ in range(n_tokens // tiles)]


LAYOUTS: dict[str, Callable[[Seen, int], Groups | None]] = {
    "anyres": anyres,
    "blocks": blocks,
    "grid": grid,
    "raster": raster,
    "raster_lines": raster_lines,
    "raster_tiles": raster_tiles,
    "lines": lines,
    "local_grids": local_grids,
    "local_lines": local_lines,
    "local_whole": local_whole,
    "pooled": pooled,
    "strips": strips,
    "headed": headed,
    "headed_centred": headed_centred,
    "whole": whole,
}

_NOWHERE = np.zeros((3, 0))  # newlines and other separators that the model puts among its visual tokens


def _merged(patches: np.ndarray, down: int, across: int, n_tokens: int) -> list[Groups] | None:
    """Lines of tokens, each a square block of patches [down * across, 3, rows, columns] in reading order."""
    merge = math.isqrt(down * across // n_tokens)
    if down * across != len(patches) or merge * merge * n_tokens != down * across or down % merge or across % merge:
        return None
    grid_DA3P = patches.reshape(down, across, 3, -1)
    return [
        [
            np.concatenate(list(grid_DA3P[row : row + merge, column : column + merge].reshape(merge**2, 3, -1)), axis=1)
            for column in range(0, across, merge)
        ]
        for row in range(0, down, merge)
    ]


def _lined(picture: np.ndarray, down: int, across: int) -> Groups:
    """`_cut` with a newline token behind every line."""
    tokens = _cut(picture, down, across)
    return [token for row in range(down) for token in [*tokens[row * across : (row + 1) * across], _NOWHERE]]


def _token_px(pictures: list[np.ndarray], n_tokens: int) -> float:
    """Side of a token's square of pixels, where all pictures share it."""
    return math.sqrt(sum(picture.shape[1] * picture.shape[2] for picture in pictures) / n_tokens)


def _merged_tiles(tiles: list[np.ndarray], shapes: list[tuple[int, int]], n_tokens: int) -> Groups | None:
    """`_merged` for several tiles of patches, one after another, all merged alike."""
    merge2 = sum(down * across for down, across in shapes) / n_tokens
    tokens: Groups = []
    for (down, across), tile in zip(shapes, tiles, strict=True):
        lines = _merged(tile, down, across, round(down * across / merge2))
        if lines is None:
            return None
        tokens += [token for line in lines for token in line]
    return tokens


def _cut(picture: np.ndarray, down: int, across: int) -> Groups:
    """A picture [3, rows, columns] in `down` x `across` equal parts, in reading order."""
    edge_y = np.linspace(0, picture.shape[1], down + 1).round().astype(int)
    edge_x = np.linspace(0, picture.shape[2], across + 1).round().astype(int)
    return [
        picture[:, edge_y[row] : edge_y[row + 1], edge_x[column] : edge_x[column + 1]].reshape(3, -1)
        for row in range(down)
        for column in range(across)
    ]


def _box(group: np.ndarray) -> np.ndarray:
    """The box of one token's pixels [3, pixels], float32 [4]."""
    paper = group[2] > 0.5
    box = np.zeros(4, np.float32)
    if paper.size == 0 or paper.mean() < SLIVER:
        return box
    for axis in (0, 1):
        coordinate = np.clip(group[axis][paper], 0, 1)
        low, high = coordinate.min(), coordinate.max()
        half_pixel = (high - low) / max(math.sqrt(paper.size) - 1, 1) / 2
        box[axis], box[axis + 2] = max(low - half_pixel, 0), min(high + half_pixel, 1)
    return box


def _channel_places(pixels_of: Callable[[np.ndarray], Any], black: np.ndarray) -> np.ndarray | None:
    """Where flat patches hold their three colours, int [3, values / 3]; told by a red and a green page.

    Patches are channels x frames x side x side (Qwen), frames x channels x side x side (Muse), side x side x channels.
    None for pictures.
    """
    dark = _values(pixels_of(black))
    if _is_picture(dark):
        return None
    places = []
    for channel in (0, 1):
        page = black.copy()
        page[..., channel] = 255
        moved = np.abs(_values(pixels_of(page)) - dark).reshape(-1, dark.shape[-1]).max(0) > 0
        places.append(np.flatnonzero(moved))
    places.append(np.setdiff1d(np.arange(dark.shape[-1]), np.concatenate(places)))
    if len({len(place) for place in places}) != 1:
        return np.arange(dark.shape[-1]).reshape(3, -1)
    return np.stack(places)


def _values(pixels: Any) -> np.ndarray:
    alone = isinstance(pixels, (list, tuple))
    while isinstance(pixels, (list, tuple)):
        pixels = pixels[0]
    values = torch.as_tensor(pixels).double().numpy()
    return values[None] if alone and values.ndim == 3 and len(values) == 3 else values  # one picture of a list


def _is_picture(values: np.ndarray) -> bool:
    return values.ndim >= 4


def _tiles(pixels: Any, places: np.ndarray | None) -> np.ndarray:
    """Pixel values of one page as float64 [tiles, 3, rows, columns]; flat patches are tiles of one row."""
    values = _values(pixels)
    if _is_picture(values):
        if values.shape[-1] == 3 and values.shape[-3] != 3:  # Inkling: colours last, and still pages as two frames
            values = np.moveaxis(values[:, 0] if values.ndim == 5 else values, -1, -3)
        return values.reshape(-1, *values.shape[-3:])
    patches = values.reshape(-1, values.shape[-1])
    assert places is not None
    return patches[:, places][:, :, None]
