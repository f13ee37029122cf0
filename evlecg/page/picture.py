"""Pages that a dataset brings as pictures: decoded, and fitted into the size that a model wants.

Nobody says which lead lies where on them. Their layout holds no panels, and the place of the picture on the page, so
that what student and teacher see of one picture can still be compared when their pages are of different shapes.
"""

from __future__ import annotations

import io

import cv2
import numpy as np
from PIL import Image, ImageOps

from evlecg.errors import EvlecgError
from evlecg.page.layout import picture_layout
from evlecg.page.render import Page

MOST_PIXELS = 50_000_000  # of an encoded picture; a small file can claim any size
FORMATS = ("PNG", "JPEG")
RIM = 0.02  # share of the picture at each edge that tells its paper's colour


def decode(data: bytes, *, where: str = "") -> np.ndarray:
    """A picture's pixels, uint8 [H, W, 3], RGB, the right way up.

    Raises:
        EvlecgError: neither PNG nor JPEG, damaged, or of more than `MOST_PIXELS` (known before anything is decoded).
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
            if width * height > MOST_PIXELS:
                raise EvlecgError(
                    f"a picture of {width}x{height} pixels is too large", where=where,
                    hint=f"at most {MOST_PIXELS:,} pixels",
                )  # fmt: skip
            upright = ImageOps.exif_transpose(image)
            if upright.mode.startswith("I"):  # 16 bits of grey
                return np.repeat((np.asarray(upright) >> 8).clip(0, 255).astype(np.uint8)[..., None], 3, axis=2)
            if upright.mode in ("RGBA", "LA", "PA") or "transparency" in upright.info:
                clear = upright.convert("RGBA")
                upright = Image.alpha_composite(Image.new("RGBA", clear.size, "white"), clear)
            return np.array(upright.convert("RGB"))
    except EvlecgError:
        raise
    except Image.DecompressionBombError as error:  # beyond Pillow's own limit, which is above ours
        raise EvlecgError("a picture is too large", where=where, hint=f"at most {MOST_PIXELS:,} pixels") from error
    except (OSError, ValueError, SyntaxError, EOFError) as error:  # what Pillow raises on damaged files
        raise EvlecgError("a picture is neither a PNG nor a JPEG that can be read", where=where) from error


def picture_page(data: bytes, *, size_px: tuple[int, int], where: str = "") -> Page:
    """A picture as a page: its aspect is kept, the rest is filled with its paper's colour.

    Args:
        data: an encoded PNG or JPEG.
        size_px: width, height of the page.
        where: what an error names.
    """
    pixels_HW3 = decode(data, where=where)
    height, width = pixels_HW3.shape[:2]
    scale = min(size_px[0] / width, size_px[1] / height)
    inner_px = (max(1, round(width * scale)), max(1, round(height * scale)))
    how = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    page_HW3 = np.empty((size_px[1], size_px[0], 3), np.uint8)
    page_HW3[:] = paper_rgb(pixels_HW3)
    left, top = (size_px[0] - inner_px[0]) // 2, (size_px[1] - inner_px[1]) // 2
    inner = (slice(top, top + inner_px[1]), slice(left, left + inner_px[0]))
    page_HW3[inner] = cv2.resize(pixels_HW3, inner_px, interpolation=how)
    box = (
        left / size_px[0], top / size_px[1], (left + inner_px[0]) / size_px[0], (top + inner_px[1]) / size_px[1],
    )  # fmt: skip
    return Page(page_HW3, picture_layout(size_px, box))


def paper_rgb(pixels_HW3: np.ndarray) -> np.ndarray:
    """The colour that most of a picture's rim has: its median, colour by colour. uint8 [3]."""
    height, width = pixels_HW3.shape[:2]
    y, x = max(1, round(RIM * height)), max(1, round(RIM * width))
    rim = (pixels_HW3[:y], pixels_HW3[-y:], pixels_HW3[:, :x], pixels_HW3[:, -x:])
    return np.median(np.concatenate([part.reshape(-1, 3) for part in rim]), axis=0).astype(np.uint8)
