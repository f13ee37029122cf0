"""Disturbances for training robustness: of the signal as electrodes pick it up, and of the page as a camera sees it.

Everything is a pure function of (seed, epoch, record): a resumed run, any number of loader processes, student and
teacher all get the same. Each disturbance draws from a stream of its own, so that switching one on leaves the others
as they were. `single` gives one disturbance of one strength on every page, which is what a robustness report needs.

Noise enters at the electrodes and reaches the leads as the ECG does, hence Einthoven's and Goldberger's laws hold for
a disturbed record too, and one loose electrode is seen in all of its leads. What moves the paper on the page is one
homography; it is noted in the page's layout, so that positions stay exact.

Shape legend: L leads (always 12), E electrodes (RA, LA, LL, C1..C6), T time samples, H and W page height and width.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import cv2
import numpy as np
import scipy.fft

from evlecg.errors import EvlecgError
from evlecg.page.render import PAGE_S, Page
from evlecg.recipe import AugmentConfig, nearest
from evlecg.schema import LEADS

SIGNAL = ("swap", "scale", "wander_mV", "mains_mV", "muscle_mV", "flat_leads", "start_s")
PAGE = (
    "creases", "tint", "rotate_deg", "shift", "zoom", "perspective", "shadow", "brightness", "contrast", "blur_mm",
    "noise", "jpeg",
)  # fmt: skip
DISTURBANCES = SIGNAL + PAGE  # the place is the stream's number, the table's behind them

# What the levels mean. Signal: the amplitudes that the MIT-BIH Noise Stress Test Database records on moving subjects
# (Moody, Muldrow, Mark 1984: wander of several tenths of a millivolt, muscle noise of about a tenth) bound the second
# level; the first is a resting ECG that a technician would accept (AHA/ACC recommendations, Kligfield et al. 2007,
# ask for less than 0.1 mV). Page: the first level is a flatbed scan, the second a hand-held photograph.
LEVELS: dict[str, dict[str, float]] = {
    "none": {},
    "light": {
        "wander_mV": 0.1, "mains_mV": 0.02, "muscle_mV": 0.02, "scale": 0.1, "rotate_deg": 1.0, "shift": 0.01,
        "zoom": 0.02, "tint": 0.04, "brightness": 0.04, "contrast": 0.1, "blur_mm": 0.08, "noise": 0.02, "jpeg": 30,
    },
    "photo": {
        "wander_mV": 0.3, "mains_mV": 0.05, "muscle_mV": 0.06, "scale": 0.2, "rotate_deg": 5.0, "shift": 0.03,
        "zoom": 0.05, "perspective": 0.04, "creases": 3, "tint": 0.12, "shadow": 0.4, "brightness": 0.12,
        "contrast": 0.25, "blur_mm": 0.2, "noise": 0.04, "jpeg": 65,
    },
}  # fmt: skip
MOST = {
    "share": 1.0, "scale": 0.9, "flat_leads": 12, "swap": 1.0, "rotate_deg": 30.0, "shift": 0.3, "zoom": 0.5,
    "perspective": 0.2, "creases": 50, "tint": 0.9, "shadow": 0.95, "brightness": 0.9, "contrast": 0.9, "noise": 0.5,
    "jpeg": 99,
}  # fmt: skip

WANDER_HZ = (0.05, 0.5)  # respiration and slow electrode drift (Kligfield et al. 2007: below 0.5 Hz)
MUSCLE_HZ = (15.0, 150.0)  # surface electromyogram within the band of a resting ECG
MAINS_HZ = (50.0, 60.0)
NYQUIST_SHARE = 0.45  # noise above this share of the sampling rate would fold back
SHORT_SHARE = 0.2  # of a record no longer than the page: how late the page may begin, the rest stays blank
FIELD_PX, CREASE_FIELD_PX = 160, 640  # longer side on which light is computed: it holds nothing finer
TABLE_COLOUR = 0.15  # tables are mostly grey
SMALL_PX = 800  # pages below it are turned with a sharper filter: their strokes are a pixel wide
TINTS = ((0.1, 0.3, 1.0), (1.0, 0.5, 0.1), (0.2, 1.0, 0.8), (1.0, 1.0, 1.0))  # light that yellow, blue, pink, grey lack
QUANTILES_256 = np.array([NormalDist().inv_cdf((step + 0.5) / 256) for step in range(256)])
# limb electrodes that get exchanged, and neighbouring chest electrodes
SWAPS = (("RA", "LA"), ("RA", "LL"), ("LA", "LL"), ("V1", "V2"), ("V2", "V3"), ("V3", "V4"), ("V5", "V6"))
ELECTRODES = ("RA", "LA", "LL", "V1", "V2", "V3", "V4", "V5", "V6")


def _lead_matrix() -> np.ndarray:
    """Leads from electrode potentials, float32 [12, 9]: Einthoven, Goldberger, and Wilson's central terminal."""
    ra, la, ll = np.eye(3, 9)
    limb = [la - ra, ll - ra, ll - la, ra - (la + ll) / 2, la - (ra + ll) / 2, ll - (ra + la) / 2]
    return np.array([*limb, *(np.eye(9)[3:] - (ra + la + ll) / 3)], np.float32)


LEADS_FROM_ELECTRODES_LE = _lead_matrix()


@dataclass(frozen=True)
class Augmenter:
    """Disturbs signals and pages.

    Attributes:
        most: disturbance -> the most that happens; absent ones never do.
        share: share of the pages on which each appears.
        seed: of the run.
        exact: always the most (of either sign), not a drawn amount.
        teacher: whether the teacher's pages are disturbed too.
    """

    most: dict[str, float]
    share: float
    seed: int
    exact: bool = False
    teacher: bool = True

    def signal(self, signal_mV_LT: np.ndarray, fs_hz: float, *, epoch: int, index: int) -> tuple[np.ndarray, float]:
        """A disturbed copy of a record's signal, and the second with which its page begins.

        Args:
            signal_mV_LT: [12, T], millivolt.
            fs_hz: samples a second.
            epoch, index: which pass over the data, and which record of the prepared folder.

        Returns:
            float32 [12, T], and the start in seconds.
        """
        signal_mV_LT = np.asarray(signal_mV_LT, np.float32)
        noise_mV_ET = np.zeros((len(ELECTRODES), signal_mV_LT.shape[1]), np.float32)
        start_s, noisy = 0.0, False
        for name in SIGNAL:
            rng = self._rng(name, epoch, index)
            if rng is None:
                continue
            amount = self._amount(name, rng)
            if name == "swap":
                signal_mV_LT = swap_electrodes(signal_mV_LT, *SWAPS[rng.integers(len(SWAPS))])
            elif name == "scale":
                signal_mV_LT = signal_mV_LT * np.float32(1 + amount * rng.choice([-1, 1]))
            elif name == "flat_leads":
                flat = rng.permutation(len(LEADS))[: math.ceil(amount)]
                signal_mV_LT = signal_mV_LT.copy()
                signal_mV_LT[flat] = 0
            elif name == "start_s":
                duration_s = signal_mV_LT.shape[1] / fs_hz
                start_s = min(amount, max(duration_s - PAGE_S, SHORT_SHARE * duration_s))
            else:
                noise_mV_ET += NOISES[name](rng, signal_mV_LT.shape[1], fs_hz, amount)
                noisy = True
        if noisy:
            noise_mV_LT = LEADS_FROM_ELECTRODES_LE @ noise_mV_ET
            silent_L1 = ~signal_mV_LT.any(axis=1, keepdims=True)  # a lead that is not recorded stays flat
            signal_mV_LT = signal_mV_LT + np.where(silent_L1, 0, noise_mV_LT)
        return signal_mV_LT, start_s

    def page(self, page: Page, *, epoch: int, index: int) -> Page:
        """A disturbed copy of a page, whose layout says where everything has gone."""
        layout, pixels_HW3 = page.layout, page.pixels
        drawn: dict[str, tuple[np.random.Generator, float]] = {}
        for name in PAGE:
            rng = self._rng(name, epoch, index)
            if rng is not None:
                drawn[name] = rng, self._amount(name, rng)
        for name in ("creases", "tint"):  # what happens to the paper itself
            if name in drawn:
                pixels_HW3 = SIGHTS[name](pixels_HW3, *drawn[name], layout.px_per_mm)
        moves = {name: drawn[name] for name in MOVES if name in drawn}
        if moves:
            height_px, width_px = pixels_HW3.shape[:2]
            aspect = (width_px / layout.px_per_mm[0]) / (height_px / layout.px_per_mm[1])  # of the paper
            warp_33 = np.eye(3)
            for name, move in MOVES.items():
                if name in moves:
                    warp_33 = move(*moves[name], aspect) @ warp_33
            table_3 = np.random.default_rng([self.seed, epoch, index, len(DISTURBANCES)]).uniform(30, 235, 3)
            pixels_HW3 = _warped(pixels_HW3, warp_33, table_3.mean() + TABLE_COLOUR * (table_3 - table_3.mean()))
            layout = layout.warped(warp_33)
        for name in ("shadow", "brightness", "contrast", "blur_mm", "noise", "jpeg"):
            if name in drawn:
                pixels_HW3 = SIGHTS[name](pixels_HW3, *drawn[name], layout.px_per_mm)
        return Page(pixels_HW3, layout)

    def _rng(self, name: str, epoch: int, index: int) -> np.random.Generator | None:
        """The disturbance's stream for this page, or None where it does not appear."""
        if not self.most.get(name):
            return None
        rng = np.random.default_rng([self.seed, epoch, index, DISTURBANCES.index(name)])
        share = self.most[name] if name == "swap" else self.share
        return rng if rng.random() < share else None

    def _amount(self, name: str, rng: np.random.Generator) -> float:
        return self.most[name] if self.exact else self.most[name] * (1 - rng.random())  # never exactly nothing


def augmenter(config: AugmentConfig, *, seed: int) -> Augmenter | None:
    """What a recipe's `augment` section asks for; None where that is nothing.

    Raises:
        EvlecgError: an amount that leaves nothing of the page, or a later start that only the student would see.
    """
    given = {name: value for name in DISTURBANCES if (value := getattr(config, name)) is not None}
    for name, value in {**given, "share": config.share}.items():
        if value > MOST.get(name, math.inf):
            raise EvlecgError(f"augment.{name} is at most {MOST[name]:g}, not {value:g}", where="augment")
    most = {name: float(value) for name, value in (LEVELS[config.level] | given).items() if value}
    if not most or not config.share:
        return None
    if most.get("start_s") and not config.teacher:
        raise EvlecgError("augment.start_s would show student and teacher different seconds", where="augment",
                          hint="set augment.teacher=true or augment.start_s=0")  # fmt: skip
    return Augmenter(most, config.share, seed, teacher=config.teacher)


def single(name: str, amount: float, *, seed: int = 0) -> Augmenter:
    """One disturbance of one strength on every page.

    Args:
        name: one of `DISTURBANCES`.
        amount: its strength, in the unit of the recipe's key.
        seed: decides phases, directions and places.
    """
    if name not in DISTURBANCES:
        raise EvlecgError(f"unknown disturbance {name!r}", hint=nearest(name, DISTURBANCES))
    config = dataclasses.replace(AugmentConfig(share=1.0), **{name: amount})  # type: ignore[arg-type]
    made = augmenter(config, seed=seed)
    return dataclasses.replace(made, exact=True) if made else Augmenter({}, 1.0, seed, exact=True)


def swap_electrodes(signal_mV_LT: np.ndarray, a: str, b: str) -> np.ndarray:
    """The record that exchanged electrodes would have given.

    The potentials behind the leads are known but for a constant, which no lead can see: Wilson's terminal is set to 0,
    hence RA = 2/3 aVR and so on, and each chest electrode is its lead.
    """
    goldberger = [LEADS.index(name) for name in ("aVR", "aVL", "aVF")]
    potential_mV_ET = np.concatenate([signal_mV_LT[goldberger] * np.float32(2 / 3), signal_mV_LT[6:]])
    order = list(range(len(ELECTRODES)))
    i, j = ELECTRODES.index(a), ELECTRODES.index(b)
    order[i], order[j] = order[j], order[i]
    return LEADS_FROM_ELECTRODES_LE @ potential_mV_ET[order]


def _wander(rng: np.random.Generator, n: int, fs_hz: float, largest_mV: float) -> np.ndarray:
    """Baseline wander: a few slow sines, respiration's alike at all electrodes, each electrode's drift its own."""
    time_T = np.arange(n, dtype=np.float32) / np.float32(fs_hz)
    wave_mV_ET = np.zeros((len(ELECTRODES), n), np.float32)
    for _ in range(4):
        hz = math.exp(rng.uniform(*np.log(WANDER_HZ)))
        own_E1 = rng.normal(0, 1, (len(ELECTRODES), 1)).astype(np.float32)
        wave_mV_ET += own_E1 * np.sin(2 * math.pi * (hz * time_T + rng.random()), dtype=np.float32)
    return _to_leads_level(wave_mV_ET, largest_mV, np.max)


def _mains(rng: np.random.Generator, n: int, fs_hz: float, amplitude_mV: float) -> np.ndarray:
    """Hum and its third harmonic, of one phase, as strong as each electrode's contact is bad."""
    time_T = np.arange(n, dtype=np.float64) / fs_hz
    mains_hz = rng.choice(MAINS_HZ) * (1 + rng.normal(0, 2e-4))  # networks keep within about 0.05 Hz
    wave_T = np.zeros(n)
    for harmonic, share in ((1, 1.0), (3, 0.2)):
        if harmonic * mains_hz < NYQUIST_SHARE * fs_hz:
            wave_T += share * np.sin(2 * math.pi * (harmonic * mains_hz * time_T + rng.random()))
    contact_E1 = rng.normal(0, 1, (len(ELECTRODES), 1))
    return _to_leads_level((contact_E1 * wave_T).astype(np.float32), amplitude_mV, np.max)


def _muscle(rng: np.random.Generator, n: int, fs_hz: float, rms_mV: float) -> np.ndarray:
    """Electromyogram: band-limited noise that swells and ebbs, at every electrode by itself."""
    hz_F = np.fft.rfftfreq(n, 1 / fs_hz)
    high_hz = min(MUSCLE_HZ[1], NYQUIST_SHARE * fs_hz)
    band_F = (hz_F >= MUSCLE_HZ[0]) & (hz_F <= high_hz)
    spectrum_EF = np.zeros((len(ELECTRODES), len(hz_F)), np.complex64)
    parts = rng.standard_normal((len(ELECTRODES), int(band_F.sum()), 2), dtype=np.float32)
    spectrum_EF[:, band_F] = parts.view(np.complex64)[..., 0]
    noise_ET = np.asarray(scipy.fft.irfft(spectrum_EF, n, axis=1))
    time_T = np.arange(n, dtype=np.float32) / np.float32(fs_hz)
    swell_T = 0.6 + 0.4 * np.sin(2 * math.pi * (rng.uniform(0.1, 0.5) * time_T + rng.random()), dtype=np.float32)
    return _to_leads_level(noise_ET * swell_T, rms_mV, lambda x: np.sqrt(np.mean(np.square(x))))


def _to_leads_level(wave_ET: np.ndarray, level_mV: float, measure: Callable[[np.ndarray], Any]) -> np.ndarray:
    """Electrode noise whose size in the leads, measured on absolute values, is `level_mV`."""
    size = float(measure(np.abs(LEADS_FROM_ELECTRODES_LE @ wave_ET)))
    return wave_ET * np.float32(level_mV / size if size > 0 else 0)


NOISES: dict[str, Callable[[np.random.Generator, int, float, float], np.ndarray]] = {
    "wander_mV": _wander, "mains_mV": _mains, "muscle_mV": _muscle,
}  # fmt: skip


def _about_centre(change_33: np.ndarray) -> np.ndarray:
    to_centre_33 = np.array([[1, 0, -0.5], [0, 1, -0.5], [0, 0, 1]])
    return np.linalg.inv(to_centre_33) @ change_33 @ to_centre_33


def _rotate(rng: np.random.Generator, largest_deg: float, aspect: float) -> np.ndarray:
    angle = math.radians(largest_deg) * rng.choice([-1, 1])
    cos, sin = math.cos(angle), math.sin(angle)
    return _about_centre(np.array([[cos, -sin / aspect, 0], [sin * aspect, cos, 0], [0, 0, 1]]))


def _shift(rng: np.random.Generator, distance: float, aspect: float) -> np.ndarray:
    direction = 2 * math.pi * rng.random()
    return np.array([[1, 0, distance * math.cos(direction)], [0, 1, distance * math.sin(direction)], [0, 0, 1]])


def _zoom(rng: np.random.Generator, change: float, aspect: float) -> np.ndarray:
    scale = 1 + change * rng.choice([-1, 1])
    return _about_centre(np.diag([scale, scale, 1.0]))


def _perspective(rng: np.random.Generator, distance: float, aspect: float) -> np.ndarray:
    """A camera that does not look straight down: every corner of the paper moves by itself."""
    corner_42 = np.array([[0, 0], [1, 0], [1, 1], [0, 1]], np.float32)
    moved_42 = corner_42 + distance * rng.uniform(-1, 1, (4, 2))
    return cv2.getPerspectiveTransform(corner_42, moved_42.astype(np.float32))


MOVES: dict[str, Callable[[np.random.Generator, float, float], np.ndarray]] = {
    "rotate_deg": _rotate, "zoom": _zoom, "perspective": _perspective, "shift": _shift,
}  # fmt: skip


def _warped(pixels_HW3: np.ndarray, warp_33: np.ndarray, table_3: np.ndarray) -> np.ndarray:
    """The page after a homography of [0, 1] x [0, 1]; the table it lies on shows where the paper does not."""
    height_px, width_px = pixels_HW3.shape[:2]
    index_33 = np.array([[width_px, 0, -0.5], [0, height_px, -0.5], [0, 0, 1]])  # pixel i has its middle at i + 1/2
    sharp = cv2.INTER_CUBIC if min(height_px, width_px) < SMALL_PX else cv2.INTER_LINEAR
    return cv2.warpPerspective(
        pixels_HW3, index_33 @ warp_33 @ np.linalg.inv(index_33), (width_px, height_px), flags=sharp,
        borderMode=cv2.BORDER_CONSTANT, borderValue=table_3.tolist(),
    )  # fmt: skip


def _crease(pixels_HW3: np.ndarray, rng: np.random.Generator, most: float, px_per_mm: tuple[float, float]) -> Any:
    """Folds: a dark line where the paper breaks, and the slope on one side of it in half-shade."""
    x_mm_W, y_mm_H = _field_axes(pixels_HW3, px_per_mm, CREASE_FIELD_PX)
    light_HW = np.ones((len(y_mm_H), len(x_mm_W)), np.float32)
    for _ in range(math.ceil(most)):
        angle = rng.choice([0.0, 0.5, rng.random()]) * math.pi + rng.normal(0, 0.05)  # mostly along an edge
        at_mm = (rng.uniform(0.1, 0.9, 2) * (x_mm_W[-1], y_mm_H[-1])).astype(np.float32)
        depth, width_mm = rng.uniform(0.15, 0.4), rng.uniform(0.3, 0.7)
        x_off_W, y_off_H = -math.sin(angle) * (x_mm_W - at_mm[0]), math.cos(angle) * (y_mm_H - at_mm[1])
        off_mm_HW = x_off_W[None, :] + y_off_H[:, None]
        dark_HW = np.maximum(
            np.exp(-np.square(off_mm_HW / width_mm)), 0.4 * (off_mm_HW > 0) * np.exp(-np.abs(off_mm_HW) / 5)
        )
        light_HW *= 1 - depth * dark_HW
    return _lit(pixels_HW3, light_HW)


def _tint(pixels_HW3: np.ndarray, rng: np.random.Generator, amount: float, px_per_mm: Any) -> np.ndarray:
    """Old, tinted or badly white-balanced paper: it swallows some colours more than others."""
    missing_3 = np.array(TINTS[rng.integers(len(TINTS))])
    return _curve(pixels_HW3, np.arange(256)[:, None] * (1 - amount * missing_3))


def _shadow(pixels_HW3: np.ndarray, rng: np.random.Generator, amount: float, px_per_mm: tuple[float, float]) -> Any:
    """A lamp to one side, and the soft edge of a hand's or a head's shadow."""
    x_mm_W, y_mm_H = _field_axes(pixels_HW3, px_per_mm, FIELD_PX)
    x_W, y_H = x_mm_W / x_mm_W[-1] - 0.5, y_mm_H / y_mm_H[-1] - 0.5
    lamp, edge = (2 * math.pi * rng.random() for _ in range(2))
    slope_HW = 0.5 + (x_W * math.cos(lamp))[None, :] + (y_H * math.sin(lamp))[:, None]
    off_HW = (x_W * math.cos(edge))[None, :] + (y_H * math.sin(edge))[:, None] - rng.uniform(-0.3, 0.4)
    hand_HW = 1 / (1 + np.exp(-off_HW / rng.uniform(0.01, 0.06)))
    dark_HW = 0.4 * slope_HW.clip(0, 1) + 0.6 * hand_HW
    return _lit(pixels_HW3, 1 - amount * dark_HW / dark_HW.max())


def _brightness(pixels_HW3: np.ndarray, rng: np.random.Generator, amount: float, px_per_mm: Any) -> np.ndarray:
    return _curve(pixels_HW3, np.arange(256)[:, None] + 255 * amount * rng.choice([-1, 1]))


def _contrast(pixels_HW3: np.ndarray, rng: np.random.Generator, amount: float, px_per_mm: Any) -> np.ndarray:
    return _curve(pixels_HW3, 127.5 + (np.arange(256)[:, None] - 127.5) * (1 + amount * rng.choice([-1, 1])))


def _blur(pixels_HW3: np.ndarray, rng: np.random.Generator, sigma_mm: float, px_per_mm: tuple[float, float]) -> Any:
    """An optical blur has a size on the paper, so a small page hardly shows what a large one does."""
    x_px, y_px = (max(sigma_mm * scale, 0.01) for scale in px_per_mm)
    return cv2.GaussianBlur(pixels_HW3, (0, 0), x_px, sigmaY=y_px, borderType=cv2.BORDER_REPLICATE)


def _noise(pixels_HW3: np.ndarray, rng: np.random.Generator, sigma: float, px_per_mm: Any) -> np.ndarray:
    """Normal noise of every pixel and colour, through a table of 256 quantiles: one random byte each."""
    byte_HW3 = np.frombuffer(rng.bytes(pixels_HW3.size), np.uint8).reshape(pixels_HW3.shape)
    levels = 255 * sigma * QUANTILES_256
    brighter, darker = (np.rint(part).clip(0, 255).astype(np.uint8) for part in (levels, -levels))
    return cv2.subtract(cv2.add(pixels_HW3, cv2.LUT(byte_HW3, brighter)), cv2.LUT(byte_HW3, darker))


def _jpeg(pixels_HW3: np.ndarray, rng: np.random.Generator, loss: float, px_per_mm: Any) -> np.ndarray:
    done, data = cv2.imencode(".jpg", pixels_HW3[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 100 - round(loss)])
    assert done
    return np.ascontiguousarray(np.asarray(cv2.imdecode(data, cv2.IMREAD_COLOR))[..., ::-1])


SIGHTS: dict[str, Callable[[np.ndarray, np.random.Generator, float, tuple[float, float]], np.ndarray]] = {
    "creases": _crease, "tint": _tint, "shadow": _shadow, "brightness": _brightness, "contrast": _contrast,
    "blur_mm": _blur, "noise": _noise, "jpeg": _jpeg,
}  # fmt: skip


def _curve(pixels_HW3: np.ndarray, value_256x: np.ndarray) -> np.ndarray:
    """Pixels through one curve, or one a colour."""
    table = np.broadcast_to(np.rint(value_256x).clip(0, 255).astype(np.uint8), (256, 3))
    return cv2.LUT(pixels_HW3, np.ascontiguousarray(table[None]))


def _field_axes(pixels_HW3: np.ndarray, px_per_mm: tuple[float, float], most_px: int) -> list[np.ndarray]:
    """x and y in millimetres of a coarse image of the page."""
    height_px, width_px = pixels_HW3.shape[:2]
    scale = min(1.0, most_px / max(height_px, width_px))
    return [
        ((np.arange(n := max(2, round(size * scale))) + 0.5) * (size / n / per_mm)).astype(np.float32)
        for size, per_mm in ((width_px, px_per_mm[0]), (height_px, px_per_mm[1]))
    ]


def _lit(pixels_HW3: np.ndarray, light_HW: np.ndarray) -> np.ndarray:
    """Pixels times a coarse image of the light, 0..1."""
    height_px, width_px = pixels_HW3.shape[:2]
    light_HW = cv2.resize((255 * light_HW).astype(np.float32), (width_px, height_px), interpolation=cv2.INTER_LINEAR)
    light_HW = np.rint(light_HW, out=light_HW).astype(np.uint8)
    return cv2.multiply(pixels_HW3, cv2.merge([light_HW] * 3), scale=1 / 255)
