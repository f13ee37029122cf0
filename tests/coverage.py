"""Which model families work, measured: every image-text-to-text family of the installed transformers, both ways.

    python -m tests.coverage [FAMILY ...] [--out FILE] [--log FILE]

prints a Markdown table. For every family a tiny checkpoint is built with the family's own config and processor, and
goes through evlecg's own `inspect`, `load`, `Encoder`, `distill`. As **teacher** it works where a tiny Idefics3 student
trains with all terms of the objective against it, as **student** where it trains so against a tiny LLaVA; both need
what `examine` asserts: config-only inspection, as many placeholders as features, an answer that changes when the page
is blanked, visual tokens that move where the page changes, a head that gives the model's own logits. A student must
also reload through plain transformers with equal logits.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import logging
import math
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file
from sklearn.metrics import roc_auc_score

from evlecg.distill import distill
from evlecg.errors import EvlecgError
from evlecg.models import load as models
from evlecg.models.encode import Encoder, Turn
from evlecg.models.families import FAMILIES
from evlecg.models.outputs import AnswerHead, can_pack, count_features, forward, image_matters
from evlecg.page.layout import page_layout
from evlecg.page.render import Page
from evlecg.recipe import load_recipe
from tests import tiny
from tests.families import BUILDERS, VARIANTS

TURNS = [
    Turn("Does this ECG show hypertrophy?", "yes"),
    Turn("Does this ECG show myocardial infarction?", "no"),
    Turn("Does this ECG show a normal tracing?", "no"),
]
REGIONS = ((0.02, 0.02, 0.48, 0.48), (0.52, 0.02, 0.98, 0.48), (0.02, 0.52, 0.48, 0.98), (0.52, 0.52, 0.98, 0.98))
TERMS = ("ce", "mhca", "rel", "ot")
WEIGHTS = {"objective.lambda_m": 0.3, "objective.lambda_r": 1.0, "objective.lambda_ot": 0.5}


@dataclass(frozen=True)
class Verdict:
    """One row of the table: empty reasons mean that it works."""

    family: str
    teacher: str
    student: str
    visual_tokens: int = 0
    place: str = ""
    packing: str = ""
    seconds: float = 0.0

    @property
    def works(self) -> bool:
        return not self.teacher and not self.student


@dataclass(frozen=True)
class Partners:
    """What every family is paired with."""

    teacher: Path
    student: Path
    data: Path

    @classmethod
    def make(cls, folder: Path) -> Partners:
        from evlecg.prepare import prepare

        data = folder / "synthetic"
        prepare("synthetic", source=None, out=data, counts={"train": 24, "val": 8, "test": 16}, seed=3)
        return cls(tiny.llava(folder / "teacher", seed=7), tiny.idefics3(folder / "student", seed=7), data)


def families() -> list[str]:
    """Every image-text-to-text family of the installed transformers, and ours beyond them."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    return sorted(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)


def opened(folder: Path) -> tuple[models.Loaded, Encoder]:
    """A checkpoint in eval mode, and its encoder."""
    loaded = models.load(models.inspect(str(folder)))
    loaded.model.eval()
    return loaded, Encoder(loaded.checkpoint, loaded.processor)


def page(encoder: Encoder, pixels: np.ndarray) -> Page:
    """A page of given pixels."""
    return Page(pixels, page_layout("3x4+1", size_px=encoder.size_px))


def noise(encoder: Encoder, seed: int = 0) -> Page:
    """A page of noise."""
    width, height = encoder.size_px
    return page(encoder, np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8))


@torch.no_grad()
def examine(loaded: models.Loaded, encoder: Encoder) -> tuple[int, str, str]:
    """What must hold of any model on its own; returns visual tokens, what is known of their place, and packing.

    Raises:
        AssertionError: something does not hold.
    """
    side = encoder.encode([noise(encoder), noise(encoder, 1)], [TURNS[:1], TURNS[1:2]])
    counts = side.visual_BS.sum(1).tolist()
    if not any(counts):  # visual tokens of another width than the text's are no positions
        counts = [side.visual_box_BN4.shape[1]] * len(counts)
    assert min(counts) > 0, "no visual token"
    features = count_features(loaded, side)
    assert features == sum(counts), f"{sum(counts)} image tokens, {features} image features"
    text = encoder.tokenizer.decode(side.answer_ids_A[side.answer_A2[:, 0] == 0]).strip()
    assert text.startswith(TURNS[0].answer), f"the answer reads {text!r}"

    outputs = forward(loaded, side)
    assert bool(torch.isfinite(outputs.answer_logits_AV).all()), "logits are not finite"
    rows_A, places_A = side.answer_A2.T
    read_AV = AnswerHead(loaded)(outputs.hidden_BSD[rows_A, places_A - 1], side)
    torch.testing.assert_close(read_AV, outputs.answer_logits_AV, atol=1e-4, rtol=1e-4,
                               msg=lambda text: f"the head does not give the model's logits: {text}")  # fmt: skip
    swapped = encoder.encode([noise(encoder)], [[dataclasses.replace(TURNS[0], answer="no")]])
    first = forward(loaded, encoder.encode([noise(encoder)], [TURNS[:1]])).answer_logits_AV[0]
    torch.testing.assert_close(forward(loaded, swapped).answer_logits_AV[0], first, atol=1e-5, rtol=1e-4,
                               msg=lambda text: f"the answer is seen before it is given: {text}")  # fmt: skip
    if loaded.checkpoint.apart is None and loaded.checkpoint.family.answer_type is None:
        ours_AV = forward(loaded, encoder.encode([noise(encoder)], [TURNS[:1]])).answer_logits_AV
        torch.testing.assert_close(ours_AV, plain_logits(loaded, encoder), atol=1e-4, rtol=1e-4,
                                   msg=lambda text: f"plain transformers gives other logits: {text}")  # fmt: skip
    effect = image_matters(loaded, side)
    assert effect > 1e-5, "blanking the page changes nothing"
    place = _place(loaded, encoder)
    able, _ = can_pack(loaded, encoder, noise(encoder), TURNS)
    return counts[0], place, "proven" if able else "one row a question"


def plain_logits(loaded: models.Loaded, encoder: Encoder) -> torch.Tensor:
    """Answer logits the plain way: the whole text through processor and model, nothing taken apart."""
    image = Image.fromarray(noise(encoder).pixels)
    prompt, full = encoder.text(TURNS[0])
    bos = encoder.tokenizer.bos_token
    adds = bos is None or not full.startswith(bos)
    inputs = dict(
        encoder.processor(
            images=[[image]] if encoder.family.nested else [image], text=[full], return_tensors="pt",
            add_special_tokens=adds, **encoder.family.processor,
        )
    )  # fmt: skip
    inputs.pop("labels", None)
    offsets = encoder.tokenizer(full, add_special_tokens=adds, return_offsets_mapping=True)["offset_mapping"]
    n_answer = sum(end > len(prompt) for _, end in offsets)
    return loaded.model(**inputs).logits[0, -n_answer - 1 : -1]


def _place(loaded: models.Loaded, encoder: Encoder) -> str:
    """Changes one region of the page after another: are the tokens that move most the ones said to lie there?"""
    width, height = encoder.size_px
    random = np.random.default_rng(0)
    # a quantiser's norms see the whole page: a region of another tone would change all codes, other noise does not
    spans = ((20, 240), (20, 240)) if loaded.checkpoint.family.codes else ((180, 240), (20, 80))
    light, dark = (random.integers(low, high, (height, width, 3), dtype=np.uint8) for low, high in spans)
    pages = [page(encoder, light)]
    for x0, y0, x1, y1 in REGIONS:
        changed = light.copy()
        region = (slice(int(y0 * height), int(y1 * height)), slice(int(x0 * width), int(x1 * width)))
        changed[region] = dark[region]
        pages.append(page(encoder, changed))
    sides = [encoder.encode([item], [TURNS[:1]]) for item in pages]
    tokens = [forward(loaded, side).projected_BND[0] for side in sides]
    box_N4, known_N = sides[0].visual_box_BN4[0], sides[0].visual_mask_BN[0]
    assert bool(known_N.any()), "no visual token has a place"
    found = []
    for region, moved in zip(REGIONS, tokens[1:], strict=True):
        moved_N = (moved - tokens[0]).norm(dim=-1)
        share_N = _overlap(box_N4, region)
        inside_N, outside_N = known_N & (share_N > 0.5), known_N & (share_N == 0)
        if not (bool(inside_N.any()) and bool(outside_N.any())):
            return "whole page"
        judged_N = inside_N | outside_N
        found.append(float(roc_auc_score(inside_N[judged_N].numpy(), moved_N[judged_N].numpy())))
        if not bool(known_N.all()):
            stray, rightly = float(moved_N[~known_N].mean()), float(moved_N[inside_N].mean())
            assert stray < rightly / 2, "tokens without a place move with the page"
    # a code either flips or stays: even a perfect order has ties, some inside the region stay, some outside it flip
    each, mean = (0.6, 0.7) if loaded.checkpoint.family.codes else (0.75, 0.9)
    assert min(found) > each and np.mean(found) > mean, f"tokens move elsewhere than the page does: AUC {found}"
    return f"{np.mean(found):.2f}" + (" (codes)" if loaded.checkpoint.family.codes else "")


def _overlap(box_N4: torch.Tensor, region: tuple[float, float, float, float]) -> torch.Tensor:
    """Share of every box that lies in a region."""
    x0, y0, x1, y1 = region
    wide_N = (box_N4[:, 2].clamp(max=x1) - box_N4[:, 0].clamp(min=x0)).clamp(min=0)
    high_N = (box_N4[:, 3].clamp(max=y1) - box_N4[:, 1].clamp(min=y0)).clamp(min=0)
    area_N = (box_N4[:, 2] - box_N4[:, 0]) * (box_N4[:, 3] - box_N4[:, 1])
    return wide_N * high_N / area_N.clamp_min(1e-9)


def train(teacher: Path, student: Path, data: Path, out: Path) -> None:
    """Three steps of the real job with every term; the student's language model and vision tower both move."""
    chosen = load_recipe(
        None,
        {
            "teacher": str(teacher), "student": str(student), "data.labels": ["NORM", "MI"], "data.max_train": 6,
            "train.batch_size": 2, "train.epochs": 1, "train.max_steps": 3, "train.lr": 1e-3,
            "train.weight_decay": 0.0, "log.every": 3, "log.gradients_every": 3, "threads": 1, **WEIGHTS,
        },
    )  # fmt: skip
    result = distill(chosen, data=data, out=out)
    assert result.steps == 3
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 3]
    for row in rows:
        for name in TERMS:
            assert math.isfinite(row["terms"][name]), f"{name} is {row['terms'][name]}"
    for name in TERMS:
        assert rows[0]["gradients"][name] > 0, f"{name} has no gradient"
    before, after = (_weights(folder) for folder in (student, out / "student"))
    assert set(after) == set(before), "the student's file does not hold the student alone"
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    vision = {name for name in after if any(word in name for word in ("vision", "visual", "image", "vit", "patch"))}
    if not models.inspect(str(student)).family.codes:
        assert moved & vision, "no gradient reaches the vision tower"
    assert moved - vision, "no gradient reaches the language model"


@torch.no_grad()
def reload(loaded: models.Loaded, encoder: Encoder, folder: Path) -> None:
    """Weights that are in memory only come back through plain transformers with the same logits."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    generator = torch.Generator().manual_seed(0)
    for parameter in loaded.model.parameters():
        parameter.mul_(1 + 0.1 * torch.rand(parameter.shape, generator=generator))
    side = encoder.encode([noise(encoder)], [TURNS[:1]])
    expected = forward(loaded, side).answer_logits_AV
    loaded.model.save_pretrained(folder)
    loaded.processor.save_pretrained(folder)
    with models.quiet():
        model = AutoModelForImageTextToText.from_pretrained(folder).eval()
        processor = AutoProcessor.from_pretrained(folder)
    again = Encoder(loaded.checkpoint, processor).encode([noise(encoder)], [TURNS[:1]])
    found = forward(dataclasses.replace(loaded, model=model), again).answer_logits_AV
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


def check(family: str, partners: Partners, folder: Path) -> Verdict:
    """The row of one family, or of a variant."""
    start = time.monotonic()
    builder = BUILDERS.get(family) or VARIANTS.get(family)
    if family in FAMILIES and FAMILIES[family].refused:
        reason = refusal(family, folder / family)
        return Verdict(family, reason, reason)
    if builder is None:
        return Verdict(family, "not tried: no tiny checkpoint", "not tried: no tiny checkpoint")
    try:
        built = builder(folder / family)
        loaded, encoder = opened(built)
        assert family in VARIANTS or loaded.checkpoint.model_type == family, (
            f"the tiny checkpoint is of {loaded.checkpoint.model_type!r}"
        )
        tokens, place, packing = examine(loaded, encoder)
    except Exception as error:
        return Verdict(family, _said(error), _said(error), seconds=time.monotonic() - start)
    reasons = {"teacher": "", "student": ""}
    try:
        train(built, partners.student, partners.data, folder / f"{family}-teaches")
    except Exception as error:
        reasons["teacher"] = _said(error)
    try:
        train(partners.teacher, built, partners.data, folder / f"{family}-learns")
        reload(loaded, encoder, folder / f"{family}-reloads")
    except Exception as error:
        reasons["student"] = _said(error)
    return Verdict(family, **reasons, visual_tokens=tokens, place=place, packing=packing,
                   seconds=time.monotonic() - start)  # fmt: skip


def refusal(family: str, folder: Path) -> str:
    """The reason that a user reads who names a refused family; there are no weights to read it from."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": family}))
    try:
        models.inspect(str(folder))
    except EvlecgError as error:
        assert FAMILIES[family].refused in str(error), f"refused for another reason: {error}"
        return FAMILIES[family].refused
    raise AssertionError("a refused family was let in")


def _said(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, EvlecgError) and error.hint:
        text += f" ({error.hint})"
    return (text if isinstance(error, (AssertionError, EvlecgError)) else f"{type(error).__name__}: {text}")[:300]


def table(verdicts: list[Verdict]) -> str:
    """The Markdown table."""
    tried = [verdict for verdict in verdicts if verdict.family not in VARIANTS]
    both = sum(verdict.works for verdict in tried)
    teachers, students = (sum(not getattr(v, role) for v in tried) for role in ("teacher", "student"))
    lines = [
        "# Model families",
        "",
        f"Made by `python -m tests.coverage` with transformers {transformers.__version__}: of {len(tried)} "
        f"image-text-to-text families {teachers} work as teacher, {students} as student, {both} as both.",
        "*Place*: area under the ROC curve of \"this token moved\" against \"this token lies where the page changed\"; "
        "at least .9 on average, .7 where a quantiser's codes stand for the page (no gradient reaches what reads it). "
        "*Packing*: several questions in one row give the same logits.",
        "",
        *_rows(tried),
    ]  # fmt: skip
    others = [verdict for verdict in verdicts if verdict.family in VARIANTS]
    if others:
        lines += ["", "Other forms in which checkpoints of these families come:", "", *_rows(others)]
    return "\n".join([*lines, ""])


def _rows(verdicts: list[Verdict]) -> list[str]:
    lines = [
        "| family | teacher | student | visual tokens (tiny) | place | packing |",
        "|---|---|---|---|---|---|",
    ]  # fmt: skip
    for v in verdicts:
        teacher, student = (reason.replace("|", "/") or "works" for reason in (v.teacher, v.student))
        if v.teacher and v.teacher == v.student:
            student = "as teacher"
        lines.append(f"| {v.family} | {teacher} | {student} | {v.visual_tokens or ''} | {v.place} | {v.packing} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("family", nargs="*", help="default: all")
    parser.add_argument("--out", type=Path, help="write the table to a file, too")
    parser.add_argument("--log", type=Path, help="keep verdicts in a file, and go on from there where it exists")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    known = {}
    if arguments.log and arguments.log.exists():
        kept = [Verdict(**json.loads(line)) for line in arguments.log.read_text().splitlines()]
        known = {verdict.family: verdict for verdict in kept}
    verdicts = []
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root)
        partners = Partners.make(folder)
        for family in arguments.family or [*families(), *sorted(VARIANTS)]:
            if family in known:
                verdicts.append(known[family])
                continue
            with contextlib.redirect_stdout(sys.stderr):
                verdict = check(family, partners, folder)
            verdicts.append(verdict)
            if arguments.log:
                with arguments.log.open("a", encoding="utf-8") as stream:
                    stream.write(json.dumps(dataclasses.asdict(verdict)) + "\n")
            said = "works" if verdict.works else f"teacher: {verdict.teacher}; student: {verdict.student}"
            print(f"{family} ({verdict.seconds:.0f} s): {said}", file=sys.stderr, flush=True)
    text = table(verdicts)
    print(text)
    if arguments.out:
        arguments.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
