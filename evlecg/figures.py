"""What a run leaves to look at: transport plan (the paper's Figure 2), singular values (Figure 3) and curves.

Arrays in, PNG and the same numbers as data out: every figure NAME.png has a NAME.npz or NAME.json beside it.

Shape legend: N teacher's and M student's visual tokens, K singular values.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from evlecg.files import write_text_atomic
from evlecg.schema import LEADS

TEACHER, STUDENT, BEFORE = "#20639b", "#d1495b", "#b7b7b7"
OTHERS = ("#3c8d8a", "#e0a030", "#6a4c93", "#7a9e3e", "#8a5a44", "#444444", "#c08bc0", "#5aa9e6")


@dataclass(frozen=True)
class TokenPlaces:
    """Where one side's visual tokens look.

    Attributes:
        lead_N: index into `LEADS`, -1 where a token sees none.
        time_s_N: seconds from the start of the page to the middle of what it sees, NaN where unknown.
        box_N4: x0, y0, x1, y1 in [0, 1] of the page.
    """

    lead_N: np.ndarray
    time_s_N: np.ndarray
    box_N4: np.ndarray

    def order(self) -> np.ndarray:
        """Tokens lead by lead and in time; those without a lead come last."""
        lead_N = np.where(self.lead_N < 0, len(LEADS), self.lead_N)
        return np.lexsort((np.nan_to_num(self.time_s_N, nan=np.inf), lead_N))


def transport_figure(
    folder: Path, *, plan_NM: np.ndarray, cost_NM: np.ndarray, teacher: TokenPlaces, student: TokenPlaces,
    page_HW3: np.ndarray, record: str,
) -> Path:  # fmt: skip
    """transport.png and transport.npz: cost and plan, lead and time on both axes, and the heaviest pairs on the page.

    Args:
        folder: where to write.
        plan_NM: transported mass between teacher's and student's valid tokens; sums to 1.
        cost_NM: the cost that it was solved for.
        teacher, student: where the tokens look.
        page_HW3: uint8, the page as the student sees it.
        record: what the title names.
    """
    plt = _pyplot()
    orders = teacher.order(), student.order()
    figure, axes = plt.subplots(1, 3, figsize=(17, 5.2), width_ratios=(1, 1, 1.25), layout="constrained")
    for axis, values_NM, title, colours in (
        (axes[0], cost_NM, "cost, in mean costs", "viridis_r"),
        (axes[1], plan_NM * plan_NM.size, "plan, in units of the uniform plan", "magma_r"),
    ):
        shown = axis.imshow(values_NM[np.ix_(*orders)], aspect="auto", cmap=colours, interpolation="nearest")
        figure.colorbar(shown, ax=axis, shrink=0.8)
        axis.set_title(title)
        _lead_ticks(axis.yaxis, teacher.lead_N[orders[0]], axis.axhline)
        _lead_ticks(axis.xaxis, student.lead_N[orders[1]], axis.axvline)
        axis.set_ylabel("teacher's tokens (lead, then time)")
        axis.set_xlabel("student's tokens (lead, then time)")
    height, width = page_HW3.shape[:2]
    axes[2].imshow(page_HW3, extent=(0, 1, 1, 0), aspect=height / width, alpha=0.6)
    middles = [np.stack([places.box_N4[:, [0, 2]].mean(1), places.box_N4[:, [1, 3]].mean(1)], 1)
               for places in (teacher, student)]  # fmt: skip
    heaviest = plan_NM.argmax(0)
    share_M = plan_NM.max(0) / np.maximum(plan_NM.sum(0), 1e-12)
    for token, source in enumerate(heaviest):
        x, y = zip(middles[0][source], middles[1][token], strict=True)
        axes[2].plot(x, y, color=TEACHER, alpha=float(np.clip(share_M[token], 0.1, 1)), lw=1)
    axes[2].plot(*middles[1].T, "s", color=STUDENT, ms=3, label="student's token")
    axes[2].plot(*middles[0][np.unique(heaviest)].T, "o", color=TEACHER, ms=3, label="its heaviest source")
    axes[2].legend(loc="upper center", bbox_to_anchor=(0.5, -0.02), ncols=2, frameon=False)
    axes[2].set_title("every student token and its heaviest source")
    axes[2].set_xticks([])
    axes[2].set_yticks([])
    figure.suptitle(f"optimal transport of visual tokens, record {record}")
    path = _save(figure, folder / "transport.png")
    np.savez_compressed(
        folder / "transport.npz", plan_NM=plan_NM, cost_NM=cost_NM,
        **{f"{role}_{name}": getattr(places, name) for role, places in (("teacher", teacher), ("student", student))
           for name in ("lead_N", "time_s_N", "box_N4")},
    )  # fmt: skip
    return path


def singular_values(tokens_ND: np.ndarray) -> np.ndarray:
    """Singular values of centred features, descending, divided by their sum: [K], K = min(N, D).

    A spectrum that falls fast means that the features fill few directions.
    """
    values_K = np.linalg.svd(tokens_ND - tokens_ND.mean(0), compute_uv=False)
    return values_K / max(values_K.sum(), np.finfo(values_K.dtype).tiny)


def effective_rank(values_K: np.ndarray) -> float:
    """exp of the entropy of normalised singular values (Roy and Vetterli 2007)."""
    p_K = values_K[values_K > 0]
    return float(np.exp(-(p_K * np.log(p_K)).sum()))


def spectrum_figure(folder: Path, spectra: Mapping[str, np.ndarray]) -> Path:
    """spectra.png and spectra.json: normalised singular values of the visual tokens.

    Args:
        folder: where to write.
        spectra: name (`teacher`, `student before`, `student after`) -> values from `singular_values`.
    """
    plt = _pyplot()
    figure, axis = plt.subplots(figsize=(6.4, 4.4), layout="constrained")
    colours = {"teacher": TEACHER, "student before": BEFORE, "student after": STUDENT}
    for name, values_K in spectra.items():
        label = f"{name} (effective rank {effective_rank(values_K):.1f})"
        axis.semilogy(np.arange(1, len(values_K) + 1), np.maximum(values_K, 1e-8), color=colours.get(name), label=label)
    axis.set_xlabel("singular value")
    axis.set_ylabel("share of the sum")
    axis.set_title("singular values of visual tokens, last layer")
    axis.legend(frameon=False)
    told = {name: {"values": values_K.tolist(), "effective_rank": effective_rank(values_K)}
            for name, values_K in spectra.items()}  # fmt: skip
    write_text_atomic(folder / "spectra.json", json.dumps(told, indent=1) + "\n")
    return _save(figure, folder / "spectra.png")


def curves_figure(folder: Path, rows: Sequence[Mapping[str, Any]]) -> Path | None:
    """curves.png and curves.json: loss, weighted terms, gradient norms and validation AUC over the steps.

    Args:
        folder: where to write.
        rows: what metrics.jsonl holds.

    Returns:
        The picture; None where nothing was logged.
    """
    rows = [row for row in rows if "step" in row]
    if not rows:
        return None
    plt = _pyplot()
    series = {
        "loss": {name: _series(rows, "weighted", name) for name in _names(rows, "weighted")}
        | {"total": [(row["step"], row["loss"]) for row in rows if "loss" in row]},
        "gradient norm on the student": {name: _series(rows, "gradients", name) for name in _names(rows, "gradients")},
        "validation AUC": {"macro": [(row["step"], row["val_auc"]) for row in rows if row.get("val_auc") is not None]},
    }
    shown = {title: {name: points for name, points in lines.items() if points} for title, lines in series.items()}
    shown = {title: lines for title, lines in shown.items() if lines}
    figure, axes = plt.subplots(1, len(shown), figsize=(5.6 * len(shown), 4.2), layout="constrained", squeeze=False)
    for axis, (title, lines) in zip(axes[0], shown.items(), strict=True):
        for name, points in lines.items():
            axis.plot(*zip(*points, strict=True), label=name, lw=2 if name == "total" else 1.2,
                      color="black" if name == "total" else None, marker="o" if len(points) < 3 else None)  # fmt: skip
        axis.set_title(title)
        axis.set_xlabel("step")
        if title.startswith("gradient"):
            axis.set_yscale("log")
        axis.legend(frameon=False)
    write_text_atomic(folder / "curves.json", json.dumps(shown) + "\n")
    return _save(figure, folder / "curves.png")


def seeds_figure(
    folder: Path,
    panels: Mapping[str, tuple[Mapping[str, Sequence[float]], float | None]],
    *,
    reference: str,
    leader: str,
) -> Path:
    """seeds.png and seeds.json: one panel a comparison, one line a method, one dot a seed, a bar at the mean.

    Args:
        folder: where to write.
        panels: title -> (method -> its scores over seeds, the teacher's score or None).
        reference: the method whose mean is drawn through all lines.
        leader: the method that is set off.
    """
    plt = _pyplot()
    longest = max(len(scores) for scores, _ in panels.values())
    figure, axes = plt.subplots(1, len(panels), figsize=(6.4 * len(panels), 1.2 + 0.32 * longest), squeeze=False,
                                sharex=True, layout="constrained")  # fmt: skip
    for axis, (title, (scores, teacher)) in zip(axes[0], panels.items(), strict=True):
        order = sorted(scores, key=lambda name: float(np.mean(scores[name])))
        for place, name in enumerate(order):
            colour = STUDENT if name == leader else "black"
            axis.plot(scores[name], [place] * len(scores[name]), "o", ms=4, alpha=0.5, color=colour)
            axis.plot([float(np.mean(scores[name]))], [place], "|", ms=14, mew=2, color=colour)
        axis.set_yticks(range(len(order)), order, fontsize=8)
        axis.set_ylim(-0.5, len(order) - 0.5)
        if reference in scores:
            axis.axvline(float(np.mean(scores[reference])), color=BEFORE, lw=1, ls="--", label=reference)
        if teacher is not None:
            axis.axvline(teacher, color=TEACHER, lw=1, label="teacher")
        axis.set_title(title)
        axis.set_xlabel("macro AUC on test records")
        axis.legend(frameon=False, loc="upper left")  # the best rows are at the top, far to the right
    data = {title: {"scores": {k: list(v) for k, v in scores.items()}, "teacher": teacher}
            for title, (scores, teacher) in panels.items()}  # fmt: skip
    write_text_atomic(folder / "seeds.json", json.dumps(data, indent=1) + "\n")
    return _save(figure, folder / "seeds.png")


def across_figure(
    folder: Path,
    panels: Mapping[str, tuple[Sequence[str], Mapping[str, Sequence[Sequence[float]]], Sequence[float | None]]],
    *,
    leader: str,
) -> Path:
    """across.png and across.json: how methods fare from place to place, mean and standard deviation over seeds.

    Args:
        folder: where to write.
        panels: title -> (places in order, method -> its scores over seeds at each, the teacher's at each or None).
            Numbers of records are spaced by their logarithm.
        leader: the method that is set off.
    """
    plt = _pyplot()
    figure, axes = plt.subplots(1, len(panels), figsize=(6.4 * len(panels), 4.2), squeeze=False, sharey=True,
                                layout="constrained")  # fmt: skip
    for axis, (title, (places, methods, teacher)) in zip(axes[0], panels.items(), strict=True):
        counts = all(name.isdigit() for name in places)
        at = [float(name) for name in places] if counts else list(map(float, range(len(places))))
        axis.set_prop_cycle(color=OTHERS)
        if counts:
            axis.set_xscale("log")
        for name, scores in methods.items():
            done = [(x, np.mean(seeds), np.std(seeds, ddof=1) if len(seeds) > 1 else 0.0)
                    for x, seeds in zip(at, scores, strict=True) if len(seeds)]  # fmt: skip
            if done:
                x, mean, spread = zip(*done, strict=True)
                axis.errorbar(x, mean, spread, marker="o", ms=4, capsize=3, lw=2 if name == leader else 1,
                              color=STUDENT if name == leader else None, label=name)  # fmt: skip
        taught = [(x, score) for x, score in zip(at, teacher, strict=True) if score is not None]
        if taught:
            axis.plot(*zip(*taught, strict=True), color=TEACHER, lw=1, ls="--", label="teacher")
        axis.set_xticks(at, places)
        axis.minorticks_off()
        axis.set_title(title)
        axis.set_xlabel("training records" if counts else "pair of models")
        axis.set_ylabel("macro AUC on test records")
        axis.legend(frameon=False, fontsize=8)
    data = {title: {"places": list(places), "scores": {k: list(map(list, v)) for k, v in methods.items()},
                    "teacher": list(teacher)} for title, (places, methods, teacher) in panels.items()}  # fmt: skip
    write_text_atomic(folder / "across.json", json.dumps(data, indent=1) + "\n")
    return _save(figure, folder / "across.png")


def _names(rows: Sequence[Mapping[str, Any]], field: str) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row.get(field, {})))


def _series(rows: Sequence[Mapping[str, Any]], field: str, name: str) -> list[tuple[int, float]]:
    return [(row["step"], row[field][name]) for row in rows if name in row.get(field, {})]


def _lead_ticks(axis: Any, lead_N: np.ndarray, line: Any) -> None:
    """One tick a lead, at the middle of its tokens, and a line where the next one starts."""
    places, names = [], []
    for lead in dict.fromkeys(lead_N.tolist()):
        tokens = np.flatnonzero(lead_N == lead)
        places.append(tokens.mean())
        names.append(LEADS[lead] if lead >= 0 else "none")
        if tokens[0] > 0:
            line(tokens[0] - 0.5, color="white", lw=0.6)
    axis.set_ticks(places, names, fontsize=7)


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")  # pictures are written, never shown
    import matplotlib.pyplot as plt

    return plt


def _save(figure: Any, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, metadata={"Software": None})
    _pyplot().close(figure)
    return path
