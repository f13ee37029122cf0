"""An image processor, found out by trying it, makes of pages what the processor itself makes of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from evlecg.errors import EvlecgError
from evlecg.export.pixels import Pixels
from evlecg.models import load as models
from evlecg.models.encode import Encoder


# largest difference in levels of 256: torchvision resizes in integers
@pytest.mark.parametrize(
    ("family", "levels"), [("llava", 0.01), ("idefics3", 0.01), ("qwen2_vl", 1), ("idefics3_tiles", 1)]
)
def test_pages_become_what_the_processor_makes_of_them(checkpoints, family, levels):
    checkpoint = models.inspect(str(checkpoints[family]))
    encoder = Encoder(checkpoint, models.load_processor(checkpoint))
    pixels = Pixels(encoder.pixels, encoder.size_px, where=family)
    width, height = encoder.size_px
    pages = np.random.default_rng(3).integers(0, 256, (2, height, width, 3), dtype=np.uint8)
    wanted = torch.cat([encoder.pixels(page)["pixel_values"] for page in pages])
    found = pixels(torch.from_numpy(pages))
    assert found.shape == wanted.shape
    assert float(((found - wanted).abs() / pixels.factor.max()).max()) <= levels * 1.01


def test_a_processor_that_does_more_is_refused():
    def process(page):
        return {"pixel_values": torch.from_numpy(page).float().permute(2, 0, 1)[None] ** 2}

    with pytest.raises(EvlecgError, match="cannot be written into a graph"):
        Pixels(process, (6, 4), where="squares")


def test_what_stays_the_same_is_a_constant():
    def process(page):
        padded = torch.full((1, 3, 5, 6), -1.0)
        padded[..., :4, :] = torch.from_numpy(page).float().permute(2, 0, 1) / 255
        return {"pixel_values": padded, "mask": torch.tensor([[1, 1, 1, 1, 0]])}

    pixels = Pixels(process, (6, 4), where="padded")
    page = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    torch.testing.assert_close(pixels(torch.from_numpy(page)[None]), process(page)["pixel_values"])
    assert pixels.constants["mask"].tolist() == [[1, 1, 1, 1, 0]]
