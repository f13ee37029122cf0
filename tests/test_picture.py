"""Pages that come as pictures: decoded with care, fitted, and compared without knowing their leads."""

from __future__ import annotations

import dataclasses
import io
import zlib
from typing import Any

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from PIL import Image

from evlecg.data.store import Prepared
from evlecg.errors import EvlecgError
from evlecg.losses.relation import pool_to_cells
from evlecg.losses.transport import page_cost, token_lead
from evlecg.models import load as models
from evlecg.models.batch import BatchBuilder
from evlecg.models.encode import Encoder
from evlecg.page.augment import single
from evlecg.page.layout import PICTURE_CELLS
from evlecg.page.picture import MOST_PIXELS, decode, picture_page
from evlecg.page.render import PageStyle
from evlecg.schema import Question, Record, Sample

PAPER = (250, 240, 230)


def _encoded(pixels: np.ndarray | Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def _scan(width: int = 300, height: int = 200) -> np.ndarray:
    pixels = np.empty((height, width, 3), np.uint8)
    pixels[:] = PAPER
    pixels[: height // 4, : width // 4] = (200, 0, 0)  # tells which way is up
    return pixels


def test_decoding_gives_the_pixels_back() -> None:
    assert_array_equal(decode(_encoded(_scan())), _scan())
    assert np.abs(decode(_encoded(_scan(), "JPEG", quality=95)).astype(int) - _scan()).mean() < 2
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    assert_array_equal(decode(_encoded(grey)), np.repeat(grey[..., None], 3, axis=2))
    deep = (grey.astype(np.uint16) << 8) + 7
    assert_array_equal(decode(_encoded(Image.fromarray(deep))), np.repeat(grey[..., None], 3, axis=2))
    palette = Image.fromarray(_scan()).convert("P", palette=Image.Palette.ADAPTIVE, colors=4)
    assert np.abs(decode(_encoded(palette)).astype(int) - _scan()).max() < 8


def test_what_is_transparent_is_white_paper() -> None:
    clear = np.zeros((20, 30, 4), np.uint8)
    clear[5:10, 5:10] = (10, 20, 30, 255)
    pixels = decode(_encoded(clear))
    assert_array_equal(pixels[0, 0], [255, 255, 255])
    assert_array_equal(pixels[7, 7], [10, 20, 30])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_camera_says_which_way_is_up(orientation: int) -> None:
    turns = {  # what a camera held so has stored
        1: lambda p: p, 2: np.fliplr, 3: lambda p: np.rot90(p, 2), 4: np.flipud,
        5: lambda p: np.swapaxes(p, 0, 1), 6: lambda p: np.rot90(p, 1),
        7: lambda p: np.rot90(np.swapaxes(p, 0, 1), 2), 8: lambda p: np.rot90(p, -1),
    }  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = np.ascontiguousarray(turns[orientation](_scan()))
    assert_array_equal(decode(_encoded(stored, exif=exif.tobytes())), _scan())


@pytest.mark.parametrize("size_px", [(168, 168), (640, 200), (100, 400), (1100, 850)])
def test_a_picture_keeps_its_shape_on_paper_of_its_colour(size_px: tuple[int, int]) -> None:
    page = picture_page(_encoded(_scan()), size_px=size_px)
    assert page.pixels.shape == (size_px[1], size_px[0], 3)
    red_HW = page.pixels[..., 1] < 60
    y_N, x_N = np.nonzero(red_HW)
    assert_allclose((np.ptp(x_N) + 1) / (np.ptp(y_N) + 1), 1.5, rtol=0.1)
    assert_allclose(page.pixels[~red_HW].mean(0), PAPER, atol=3)
    assert max(np.ptp(x_N) / size_px[0], np.ptp(y_N) / size_px[1]) > 0.22  # as large as it can be
    corner_N2 = np.array([[x_N.min(), y_N.min(), x_N.max() + 1, y_N.max() + 1]]) / [*size_px, *size_px]
    assert_allclose(page.layout.to_paper(corner_N2), [[0, 0, 0.25, 0.25]], atol=0.02)


def test_pictures_that_cannot_be_read_are_refused() -> None:
    whole = _encoded(_scan())
    for data in (b"", b"GIF89a", whole[:60], whole[: len(whole) // 2], _encoded(_scan(), "BMP")):
        with pytest.raises(EvlecgError, match="neither a PNG nor a JPEG") as caught:
            decode(data, where="rec-1")
        assert caught.value.where == "rec-1"


def _claims(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header claims a size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, 2, 0, 0, 0])
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [(10_000, 5_001), (30_000, 30_000)])
def test_a_small_file_that_claims_a_huge_picture_is_refused_unread(size: tuple[int, int]) -> None:
    assert size[0] * size[1] > MOST_PIXELS
    with pytest.raises(EvlecgError, match="too large"):
        decode(_claims(*size))


class _Folder:
    """Stands for a prepared folder that holds a signal and a picture."""

    def __init__(self, signal: Record) -> None:
        self.records = [
            signal,
            Record("picture", "p", np.zeros((12, 0), np.float32), 0.0, {}, "train", image=_encoded(_scan())),
        ]

    def record(self, index: int) -> Record:
        return self.records[index]


def _builder(checkpoints, synthetic) -> BatchBuilder:
    question = Question("Is it normal?", "yes", ("yes", "no"))
    samples = [Sample(index, name, (question, question)) for index, name in enumerate(("signal", "picture"))]
    student, teacher = (models.inspect(str(checkpoints[name])) for name in ("idefics3", "llava"))
    encoders = [Encoder(one, models.load_processor(one)) for one in (student, teacher)]
    folder: Any = _Folder(Prepared.open(synthetic).record(0))
    return BatchBuilder(folder, samples, PageStyle(), encoders[0], encoders[1], packed=True)


def test_signals_and_pictures_share_a_batch(checkpoints, synthetic) -> None:
    builder = _builder(checkpoints, synthetic)
    alone, mixed = builder([0]), builder([0, 1])
    n_cells = len(alone.cell_lead_C)
    torch.testing.assert_close(mixed.cell_lead_C[:n_cells], alone.cell_lead_C)
    assert mixed.cell_lead_C[n_cells:].tolist() == [-1] * PICTURE_CELLS**2
    for side, before in ((mixed.student, alone.student), (mixed.teacher, alone.teacher)):
        assert side is not None and before is not None
        torch.testing.assert_close(side.visual_box_BN4[0], before.visual_box_BN4[0])
        box, mask, cells = side.visual_box_BN4, side.visual_mask_BN, side.cell_box_BC4
        lead_BN = token_lead(box, mask, cells, mixed.cell_lead_C)
        torch.testing.assert_close(lead_BN[:1], token_lead(box[:1], mask[:1], before.cell_box_BC4, alone.cell_lead_C))
        assert set(lead_BN[1].tolist()) == {-1}
        cost_BNM = page_cost(box, box, lead_BN, lead_BN, position=0.0, lead=1.0)
        assert float(cost_BNM[1].max()) == 0.0 < float(cost_BNM[0].max())
        tokens_BND = torch.randn(*mask.shape, 5)
        pooled_BCD, covered_BC = pool_to_cells(tokens_BND, box, mask, cells)
        assert not covered_BC[0, n_cells:].any() and not covered_BC[1, :n_cells].any()
        assert covered_BC[1, n_cells:].all() and torch.isfinite(pooled_BCD).all()
        expected_BCD, _ = pool_to_cells(tokens_BND[:1], box[:1], mask[:1], before.cell_box_BC4)
        torch.testing.assert_close(pooled_BCD[:1, :n_cells], expected_BCD)


def test_unpacked_rows_keep_their_pages_cells(checkpoints, synthetic) -> None:
    builder = _builder(checkpoints, synthetic)
    packed, single_rows = builder([0, 1]), dataclasses.replace(builder, packed=False)([0, 1])
    torch.testing.assert_close(single_rows.student.cell_box_BC4, packed.student.cell_box_BC4.repeat_interleave(2, 0))


def test_pictures_are_disturbed_as_pages_are(checkpoints, synthetic) -> None:
    page = picture_page(_encoded(_scan()), size_px=(300, 300))
    moved = single("rotate_deg", 8.0).page(page, epoch=0, index=0)
    y_N, x_N = np.nonzero(moved.pixels[..., 1] < 60)
    corners_N4 = np.stack([x_N, y_N, x_N + 1, y_N + 1], axis=1) / 300
    paper_N4 = moved.layout.to_paper(corners_N4)
    on_paper = paper_N4[:, 2] > 0
    inside = paper_N4[on_paper].max(axis=1) < 0.27
    assert on_paper.mean() > 0.8 and inside.mean() > 0.97
    noisy = dataclasses.replace(_builder(checkpoints, synthetic), augment=single("wander_mV", 0.3))
    plain = _builder(checkpoints, synthetic)([1]).student.inputs["pixel_values"]
    torch.testing.assert_close(noisy([1]).student.inputs["pixel_values"], plain)  # a picture has no signal
