"""`evlecg prepare --teacher X`: a teacher cache without a training run, for students that come later."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evlecg.errors import EvlecgError
from evlecg.models import load as models
from evlecg.progress import Progress
from evlecg.recipe import Recipe, page_size


@dataclass(frozen=True)
class CacheResult:
    """A filled cache.

    Attributes:
        cache: the folder.
        contents: as `FolderStore.contents`.
    """

    cache: Path
    contents: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        return {"cache": str(self.cache), **self.contents}


def cache_teacher(recipe: Recipe, *, data: Path, progress: Progress | None = None) -> CacheResult:
    """Fills `recipe.cache.dir` with what the recipe's method reads of its teacher on the training records.

    What is there already is not computed again; an interrupted job goes on where it stopped.

    Args:
        recipe: teacher, questions, pages, method and cache; nothing is asked of its student.
        data: prepared folder.
        progress: who listens.

    Raises:
        EvlecgError: bad input, or a folder that was made with something else.
        RunFailed: the folder cannot be written.
    """
    from accelerate import Accelerator

    from evlecg.models.batch import BatchBuilder
    from evlecg.models.checks import check_labels, check_lengths, check_samples, longest_samples, startup_checks
    from evlecg.models.encode import Encoder
    from evlecg.models.views import encoder_for
    from evlecg.page.render import page_style
    from evlecg.teacher import LiveTeacher
    from evlecg.training.build import load_teacher, opened
    from evlecg.training.cache import cache_of, wants_packing

    progress = progress or Progress()
    if not recipe.needs_teacher or recipe.cache.dir is None:
        raise EvlecgError("a teacher cache needs a teacher, a method that learns from it, and a folder",
                          where="--teacher, --method, --out")  # fmt: skip
    prepared, samples, labels = opened(recipe, data)
    checkpoint = models.inspect(
        recipe.teacher, kind=recipe.teacher_kind, trust_remote_code=recipe.trust_remote_code,
        allow_pickle=recipe.allow_pickle,
    )  # fmt: skip
    check_samples(checkpoint, prepared, samples)
    text = checkpoint.kind == "text"
    processor = models.load_processor(checkpoint) if text else None
    size = page_size(recipe.page.teacher_size)
    size = Encoder(checkpoint, processor, size_px=size).size_px if text else size
    cache = cache_of(recipe, prepared, samples, checkpoint, size, progress)
    if cache is None:
        raise EvlecgError(f"{recipe.effective_method} reads nothing of a teacher that could be kept", where="--method",
                          hint="seqkd asks the teacher for its answers once a run")  # fmt: skip
    packs = wants_packing(recipe, samples) and checkpoint.apart is None
    if not cache.complete(packs):
        cache.await_writer()
    if not cache.complete(packs):
        accelerator = Accelerator()
        teacher = load_teacher(recipe, checkpoint, processor, accelerator.device)
        encoder = encoder_for(teacher, size_px=size)
        builder = BatchBuilder(prepared, samples, page_style(recipe.page), encoder, None, packed=False)
        lengths = check_lengths(builder(longest_samples(samples, 1)), [checkpoint])
        packed, checks = startup_checks(recipe, builder, teacher, None, progress, lengths=lengths, first="teacher")
        check_labels(teacher, labels, cache.needs, progress)
        live = LiveTeacher(teacher, visual_layer=recipe.objective.visual_layer, attention="attention" in cache.needs)
        builder = BatchBuilder(prepared, samples, page_style(recipe.page), encoder, encoder, packed=packed)
        cache.fill(live, teacher, builder, checks["teacher"], accelerator)
    else:
        progress.info(f"teacher cache {recipe.cache.dir}: complete, the teacher was not loaded")
    return CacheResult(Path(recipe.cache.dir), cache.told())
