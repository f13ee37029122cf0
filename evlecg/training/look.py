"""RUN/figures: what a run is looked at by, drawn from a few clean training records."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from evlecg.training.step import PROBE_RECORDS, Job


def _probe(job: Job) -> tuple[Any, Any, Any] | None:
    """A few clean training records as both models see them: (batch, student's outputs, teacher's or None)."""
    import torch

    from evlecg.models.outputs import forward, to_device

    main = job.accelerator.is_main_process
    if not job.recipe.log.figures or not (main or job.sharded):
        return None
    builder = dataclasses.replace(job.builder, augment=None)
    if job.signal is None:
        builder = dataclasses.replace(builder, teacher=None)
    places = range(min(PROBE_RECORDS, len(builder.samples)))
    batch = to_device(builder(places), job.accelerator.device)
    training = job.student.model.training
    job.student.model.eval()
    with torch.no_grad():
        outputs = forward(job.student, batch.student, visual_layer=job.recipe.objective.visual_layer)
        taught = job.signal(batch) if job.signal is not None else None
    job.student.model.train(training)
    return (batch, outputs, taught) if main else None


def keep_spectra(job: Job, out: Path, when: str) -> None:
    """Singular values of the probe's visual tokens, kept for the figure of a run that may be resumed in between."""
    import numpy as np

    from evlecg.figures import singular_values

    found = _probe(job)
    if found is None:
        return
    _, student, teacher = found
    sides = {f"student {when}": student} | ({"teacher": teacher} if teacher is not None else {})
    spectra = {
        name: singular_values(outputs.visual_BND[outputs.side.visual_mask_BN].float().cpu().numpy())
        for name, outputs in sides.items()
        if outputs.visual_BND.shape[-1]
    }
    (out / "figures").mkdir(exist_ok=True)
    np.savez(out / "figures" / f"spectra-{when}.npz", **spectra)  # type: ignore[arg-type]


def draw_figures(job: Job, out: Path) -> None:
    """RUN/figures: curves, singular values before and after, and the transport plan of the first record."""
    import numpy as np
    import torch

    from evlecg.figures import TokenPlaces, curves_figure, spectrum_figure, transport_figure
    from evlecg.losses.transport import token_lead
    from evlecg.models.batch import draw
    from evlecg.models.views import view_of

    found = _probe(job)
    if found is None:
        return
    folder = out / "figures"
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    curves_figure(folder, rows)
    spectra: dict[str, Any] = {}
    for when in ("before", "after"):
        path = folder / f"spectra-{when}.npz"
        if path.exists():  # a run from before figures existed, gone on with, has no "before"
            with np.load(path) as held:
                spectra |= {name: held[name] for name in held.files}
            path.unlink()
    spectrum_figure(folder, {name: spectra[name] for name in sorted(spectra, reverse=True)})
    batch, student, teacher = found
    transport = getattr(job.accelerator.unwrap_model(job.objective), "transport", None)
    if teacher is None or transport is None or {student.side.frame, teacher.side.frame} != {"page"}:
        return  # a plan is shown over a page, and both sides have to be on it
    with torch.no_grad():
        solved = transport(student, teacher, batch)
    if solved is None:
        return
    builder = job.builder
    page = draw(builder.prepared, builder.samples[0].record_index, view_of(builder.student), builder.style)
    places, kept = [], []
    for side in (teacher.side, student.side):
        lead_BN = token_lead(side.visual_box_BN4, side.visual_mask_BN, side.cell_box_BC4, batch.cell_lead_C)
        valid_N = side.visual_mask_BN[0].cpu().numpy()
        box_N4 = side.visual_box_BN4[0].cpu().numpy()[valid_N]
        middles_N2 = np.stack([box_N4[:, [0, 2]].mean(1), box_N4[:, [1, 3]].mean(1)], 1)
        _, time_s_N = page.layout.paper.locate(middles_N2)
        places.append(TokenPlaces(lead_BN[0].cpu().numpy()[valid_N], time_s_N, box_N4))
        kept.append(valid_N)
    cost_NM = solved.cost_BNM[0].float().cpu().numpy()[np.ix_(*kept)]
    transport_figure(
        folder, plan_NM=solved.plan_BNM[0].float().cpu().numpy()[np.ix_(*kept)], cost_NM=cost_NM / cost_NM.mean(),
        teacher=places[0], student=places[1], page_HW3=page.pixels, record=batch.sample_ids[0],
    )  # fmt: skip
