"""The same records on disturbed pages, for a report's robustness.

| name | what happens to every page |
|---|---|
| noise | baseline wander, mains hum and muscle noise, as strong as on a moving patient |
| lead-loss | three of the twelve leads read nothing |
| layout | the page is arranged in another way than it was trained on |
| photo | what a hand-held photograph of the paper does to it |

Amounts are drawn for every record by its place in the folder, so that two models, or two runs, see the same pages.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import cv2

from evlecg.data.store import Prepared
from evlecg.errors import EvlecgError
from evlecg.models.batch import draw
from evlecg.models.views import View
from evlecg.page.augment import LEVELS, PAGE, Augmenter
from evlecg.page.render import PageStyle
from evlecg.page.trace import TraceForm
from evlecg.recipe import nearest
from evlecg.schema import Record

LOST_LEADS = 3
SEED = 0
NOISES = ("wander_mV", "mains_mV", "muscle_mV")


@dataclass(frozen=True)
class Disturbance:
    """What is done to pages.

    Attributes:
        told: the same in words, for a report.
        most: of an `Augmenter`; empty where only the style changes.
        exact: always the most.
        style: the page's style -> the disturbed one's.
        of_pictures: whether it can be done to records that were born as pictures.
        of_signals: whether a model that reads signals notices it.
    """

    told: str
    most: dict[str, float]
    exact: bool = False
    style: Callable[[PageStyle], PageStyle] = lambda style: style
    of_pictures: bool = False
    of_signals: bool = False


def _other_layout(style: PageStyle) -> PageStyle:
    return dataclasses.replace(style, layout="3x4" if style.layout == "6x2" else "6x2")


def _told(most: Mapping[str, float]) -> str:
    """`{"wander_mV": 0.3}` -> `wander 0.3 mV`."""
    parts = ((*name.partition("_")[::2], value) for name, value in most.items())
    return ", ".join(f"{name} {value:g} {unit}".strip() for name, unit, value in parts)


_NOISE = {name: LEVELS["photo"][name] for name in NOISES}
_PHOTO = {name: LEVELS["photo"][name] for name in PAGE if name in LEVELS["photo"]}
DISTURBANCES: dict[str, Disturbance] = {
    "noise": Disturbance(
        f"up to {_told(_NOISE)}", _NOISE, of_signals=True
    ),
    "lead-loss": Disturbance(f"{LOST_LEADS} leads read nothing", {"flat_leads": LOST_LEADS}, exact=True,
                             of_signals=True),
    "layout": Disturbance("arranged 6x2 (3x4 where it was 6x2)", {}, style=_other_layout),
    "photo": Disturbance(
        f"up to {_told(_PHOTO)}", _PHOTO,
        of_pictures=True,
    ),
}  # fmt: skip


def chosen_disturbances(names: str) -> tuple[str, ...]:
    """`noise,photo` -> names.

    Raises:
        EvlecgError: one that does not exist.
    """
    chosen = tuple(dict.fromkeys(name.strip() for name in names.split(",") if name.strip()))
    for name in chosen:
        if name not in DISTURBANCES:
            raise EvlecgError(f"unknown disturbance {name!r}", where="--robustness", hint=nearest(name, DISTURBANCES))
    return chosen


def check_disturbances(kind: str, names: tuple[str, ...]) -> None:
    """Refuses disturbances of pages for a model that reads signals.

    Args:
        kind: of the checkpoint.
        names: of `DISTURBANCES`.

    Raises:
        EvlecgError: one of them is of pages.
    """
    of_pages = [name for name in names if kind == "signal" and not DISTURBANCES[name].of_signals]
    if of_pages:
        raise EvlecgError(f"{of_pages[0]} happens to pages, and the model reads signals", where="--robustness",
                          hint="noise or lead-loss")  # fmt: skip


class DisturbedPages(Prepared):
    """A prepared folder whose records are disturbed; ids, patients and labels stay.

    Its records are pictures of the disturbed pages; for a model that reads signals, they are the disturbed signals.

    Args:
        prepared: the folder.
        name: one of `DISTURBANCES`.
        style: how its pages look undisturbed.
        view: size of the page, or form of the signal, that the model wants.
    """

    def __init__(self, prepared: Prepared, name: str, style: PageStyle, view: View) -> None:
        self.__dict__.update(prepared.__dict__)
        self._clean = prepared
        self._disturbance = DISTURBANCES[name]
        self._name = name
        self._style = self._disturbance.style(style)
        self._view = view
        most = self._disturbance.most
        self._augmenter = Augmenter(most, 1.0, SEED, exact=self._disturbance.exact) if most else None

    def record(self, index: int) -> Record:
        """Record `index` disturbed: as the picture of its page, losslessly encoded, or as a signal.

        Raises:
            EvlecgError: it was born as a picture, and the disturbance is one of signals.
        """
        record = self._clean.record(index)
        if record.image and not self._disturbance.of_pictures:
            raise EvlecgError(f"{self._name} cannot be done to a picture", where=record.id,
                              hint="--robustness photo")  # fmt: skip
        if isinstance(self._view, TraceForm):
            assert self._augmenter is not None
            signal_mV_LT, _ = self._augmenter.signal(record.signal_mV, record.fs_hz, epoch=0, index=index)
            return dataclasses.replace(record, signal_mV=signal_mV_LT)
        page = draw(self._clean, index, self._view, self._style, augment=self._augmenter)
        done, data = cv2.imencode(".png", page.pixels[..., ::-1])
        assert done
        return dataclasses.replace(record, signal_mV=record.signal_mV[:, :0], image=data.tobytes())
