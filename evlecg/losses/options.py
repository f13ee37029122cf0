"""Options of the objective that contradict one another, refused before anything is built."""

from __future__ import annotations

from evlecg.errors import EvlecgError
from evlecg.recipe import ObjectiveConfig


def check_options(config: ObjectiveConfig) -> None:
    """What no single key of the recipe shows to be wrong.

    Raises:
        EvlecgError: naming the key, and what would go together.
    """
    if config.alpha > 1:
        raise EvlecgError(f"alpha is a share, not {config.alpha}", where="objective.alpha", hint="0 to 1")
    _transport(config)
    _alignment(config)


def _alignment(config: ObjectiveConfig) -> None:
    """Refuses alignment options that contradict one another."""
    align = config.align
    where, tokens = "objective.align", align.features != "states"
    if tokens and align.scope == "answer":
        raise EvlecgError("visual tokens are no positions of an answer", where=f"{where}.scope",
                          hint="all or visual, or objective.align.features: states")  # fmt: skip
    if align.centred and not tokens and align.scope != "answer":
        raise EvlecgError(
            "records are compared at the same question or the same visual token",
            where=f"{where}.centred",
            hint="set objective.align.scope to answer, or objective.align.features to last or projected",
        )


def _transport(config: ObjectiveConfig) -> None:
    """Refuses transport options that contradict one another."""
    transport = config.transport
    where, uniform = "objective.transport", transport.marginals == "uniform"
    if config.strict and not (transport.solver == "sinkhorn" and transport.relax is None and uniform):
        raise EvlecgError(
            "the published form has balanced, uniform marginals and no structure",
            where=where,
            hint="set objective.strict to false, or leave solver, relax and marginals as they are",
        )
    if transport.solver == "fused_gromov" and transport.relax is not None:
        raise EvlecgError(
            "fused Gromov-Wasserstein is solved with marginals that hold",
            where=f"{where}.relax",
            hint="null, or objective.transport.solver: sinkhorn",
        )
    if transport.structure > 1:
        raise EvlecgError(f"structure is a share, not {transport.structure}", where=f"{where}.structure", hint="0 to 1")
