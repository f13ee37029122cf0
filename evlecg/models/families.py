"""What differs between model families, as data: one row a family; a family without a row takes the generic path.

The generic path: visual tokens stand where `input_ids == config.image_token_id`, the processor's keys all go to the
model, the chat template writes the prompt, and every tile of the processor's pixels is an equal grid of tokens.
A row says where a family departs from that, or why it cannot be a teacher or a student at all: this is known from the
name of the family, hence before any weight is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Family:
    """How one family departs from the generic path.

    Attributes:
        refused: why it can be neither teacher nor student; empty where it can.
        image_token_id: where the config holds the id of the image placeholder; dots lead into sub-configs.
        processor: further keyword arguments of the processor's call.
        layout: how the tokens of a page lie in the processor's pixels; a key of `positions.LAYOUTS`.
        prompt: what is asked where there is no chat template; `{image}` is the processor's placeholder, `{earlier}`
            the turns before.
        nested: the processor takes a list of images for every text; otherwise one image for every text.
        projected_layer: the first hidden layer that holds the projector's output; not 0 where it is added inside the
            decoder.
        answer_type: token type id of answer tokens that must not be seen from before (a prefix language model sees
            all tokens of type 0 from everywhere); None where the processor's ids are right for answers.
        scale: a page is so many times as wide and high as the processor's size, which is that of a tile.
        logits: what the model does to its head's output; a key of `outputs.LOGITS`.
        codes: the page enters in codes of a quantiser, through which no gradient reaches what reads the page.
        two_way: tokens of one image see one another whatever their order.
    """

    refused: str = ""
    image_token_id: str = "image_token_id"
    processor: Mapping[str, Any] = field(default_factory=dict)
    layout: str = "grid"
    prompt: str = "{image}{earlier}{question}\n"
    nested: bool = True
    projected_layer: int = 0
    answer_type: int | None = None
    logits: str = "plain"
    two_way: bool = False
    codes: bool = False
    scale: tuple[int, int] = (1, 1)


GENERIC = Family()

FAMILIES: dict[str, Family] = {
    "aria": Family(layout="whole"),
    "apertus1p5": Family(codes=True),
    "blip": Family(layout="headed"),
    "blip-2": Family(image_token_id="image_token_index", layout="whole"),
    "chameleon": Family(processor={"return_for_text_completion": True}, logits="wordless", codes=True),
    "cohere_compass": Family(logits="scale"),
    "cosmos3_edge": Family(processor={"return_mm_token_type_ids": True}),
    "deepseek_ocr2": Family(layout="local_whole"),
    "diffusion_gemma": Family(refused="writes by block diffusion: there is no next-token answer"),
    "emu3": Family(layout="lines", codes=True),
    "evolla": Family(refused="reads proteins, not images"),
    "florence2": Family(layout="headed_centred"),
    "fuyu": Family(processor={"return_legacy_image_output": False}),
    "gemma3": Family(two_way=True),
    "gemma3n": Family(logits="softcap"),
    "gemma4": Family(layout="blocks", logits="softcap", two_way=True),
    "gemma4_unified": Family(layout="blocks", logits="softcap", two_way=True),
    "git": Family(layout="headed"),
    "got_ocr2": Family(nested=False),
    "granite4_vision": Family(layout="anyres", projected_layer=1, logits="divided"),
    "granite_docling": Family(logits="divided"),
    "hunyuan_vl": Family(layout="raster_lines"),
    "hy_v4_vl": Family(layout="raster_lines"),
    "idefics": Family(layout="whole"),
    "idefics2": Family(layout="whole"),
    "inkling2": Family(logits="softcap", scale=(20, 16)),
    "inkling2_loop": Family(logits="softcap", scale=(20, 16)),
    "inkling_mm_model": Family(logits="inkling", scale=(20, 16)),
    "instructblip": Family(image_token_id="image_token_index", layout="whole"),
    "instructblipvideo": Family(refused="reads videos of four frames: its processor takes no page"),
    "kimi_k25": Family(layout="raster"),
    "kosmos-2": Family(layout="whole"),
    "kosmos-2.5": Family(layout="whole"),
    "lfm2_vl": Family(layout="raster_tiles"),
    "llama4": Family(refused="cannot run in transformers 5.24: its forward reads image outputs that are not there"),
    "llava_next": Family(layout="anyres"),
    "llava_next_video": Family(layout="anyres"),
    "llava_onevision": Family(layout="anyres"),
    "minicpm_ocr": Family(layout="strips"),
    "minicpmv4_6": Family(layout="strips"),
    "minicpmv4_7": Family(layout="strips"),
    "mistral4": Family(refused="is a language model without eyes"),
    "mistral_large4": Family(logits="softcap"),
    "mllama": Family(layout="headed", scale=(2, 2)),
    "molmo2": Family(layout="pooled"),
    "muse_glimmer": Family(layout="raster", logits="muse"),
    "muse_spark": Family(layout="raster", logits="muse"),
    "nemotron_h_omni": Family(layout="raster"),
    "paddleocr_vl": Family(layout="raster"),
    "paligemma": Family(answer_type=1, logits="softcap"),
    "pi0": Family(refused="writes robot actions, not text"),
    "pp_formulanet": Family(refused="reads formulas without any prompt: it cannot be asked a question"),
    "shieldgemma2": Family(refused="judges images by policies of its processor's: it cannot be asked a question"),
    "step3p7": Family(layout="local_grids"),
    "t5gemma2": Family(logits="softcap"),
    "unlimited_ocr": Family(layout="local_lines"),
    "video_llava": Family(processor={"return_legacy_image_output": False}),
    "udop": Family(refused="reads recognised words at their places on the page: a trace has none"),
    "vision-encoder-decoder": Family(layout="headed"),
}  # fmt: skip


def family_of(model_type: str) -> Family:
    """The row of a family, or the generic path."""
    return FAMILIES.get(model_type, GENERIC)
