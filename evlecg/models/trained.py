"""evlecg.json: what a saved student has to be asked, and on what pages, to give what it was trained for.

It travels with the student through export, so that `evlecg eval` (and any other reader) needs no run folder.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path

from evlecg.errors import EvlecgError
from evlecg.files import write_text_atomic
from evlecg.recipe import DataConfig, PageConfig, SignalConfig, section

FILE = "evlecg.json"


@dataclass(frozen=True)
class TrainedWith:
    """The questions and pages of a training run; for any other checkpoint, the defaults.

    Attributes:
        question: wording of the yes/no question, with `{description}`.
        labels: label code -> noun phrase; empty where unknown.
        page: how its pages looked; `student_size` is the size it saw.
        kind: "text", "image" or "signal" (see `models.kinds`).
        signal: how signals entered a model that reads them, all of it said; None for others.
        method, teacher, recipe_fingerprint: how it came about; None where unknown.
    """

    question: str = DataConfig().question
    labels: dict[str, str] = field(default_factory=dict)
    page: PageConfig = field(default_factory=PageConfig)
    kind: str = "text"
    signal: SignalConfig | None = None
    method: str | None = None
    teacher: str | None = None
    recipe_fingerprint: str | None = None

    def write(self, folder: Path) -> None:
        """Writes evlecg.json beside a model."""
        write_text_atomic(folder / FILE, json.dumps(dataclasses.asdict(self), indent=2) + "\n")


def trained_with(folder: Path) -> TrainedWith:
    """Reads evlecg.json; a folder (or hub id) without one gets the defaults.

    Raises:
        EvlecgError: the file is damaged.
    """
    path = folder / FILE
    if not path.is_file():
        return TrainedWith()
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        page = section(PageConfig, tree.pop("page"), where=str(path))
        signal = tree.pop("signal", None)
        form = section(SignalConfig, signal, where=str(path)) if signal is not None else None
        return TrainedWith(page=page, signal=form, **tree)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise EvlecgError("evlecg.json is damaged", where=path, hint="export the student again") from error
