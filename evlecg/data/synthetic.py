"""Labelled 12-lead ECGs from a moving dipole: no download, no licence, the truth known.

The heart is one dipole whose three coordinates are sums of Gaussians in time (the waves P, Q, R, S, T), as in
    P. E. McSharry et al., "A dynamical model for generating synthetic electrocardiogram signals", IEEE TBME 50, 2003;
    R. Sameni et al., "Multichannel ECG and noise modeling", EURASIP J. Adv. Signal Process., 2007.
It is seen by the eight independent leads through the matrix of
    G. E. Dower et al., "On deriving the electrocardiogram from vectorcardiographic leads", Clin. Cardiol. 3, 1980,
and III, aVR, aVL and aVF follow from I and II by Einthoven's and Goldberger's equations, noise included.

Disease changes the dipole, not the leads: an infarct takes away the forces towards its territory, a bundle branch
block sends the last forces there late, hypertrophy makes them large. Severity is graded, and healthy hearts vary in
axis, voltage and T waves, so that some cases are hard for anybody.

Frank's axes throughout: x to the left, y to the feet, z to the back; millivolt and seconds.
Shape legend: W waves, 3 axes, B samples of one beat, T samples of the record, E 8 independent leads, L 12 leads.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from evlecg.errors import EvlecgError
from evlecg.recipe import nearest
from evlecg.schema import SPLITS, Record

SUPERCLASSES: tuple[str, ...] = ("NORM", "MI", "STTC", "CD", "HYP")
RHYTHMS: tuple[str, ...] = ("AFIB", "SBRAD", "STACH")
LABELS: tuple[str, ...] = SUPERCLASSES + RHYTHMS

# Dower 1980: I, II, V1 to V6 from Frank's x, y, z.
DOWER_E3 = np.array(
    [
        [0.632, -0.235, 0.059],
        [0.235, 1.066, -0.132],
        [-0.515, 0.157, -0.917],
        [0.044, 0.164, -1.387],
        [0.882, 0.098, -1.277],
        [1.213, 0.127, -0.601],
        [1.125, 0.127, -0.086],
        [0.831, 0.076, 0.230],
    ]
)
# I, II, III, aVR, aVL, aVF from I and II.
LIMB_62 = np.array([[1, 0], [0, 1], [-1, 1], [-0.5, -0.5], [1, -0.5], [-0.5, 1]], np.float32)

NORM_SHARE, AFIB_ALONE_SHARE = 0.41, 0.025
DISEASE_SHARE = {"MI": 0.35, "STTC": 0.27, "CD": 0.34, "HYP": 0.31}  # before "at least one" is asked for
FS_HZ, DURATION_S = 250.0, 10.0
SECOND_RECORD_SHARE = 0.06  # of the neighbouring pairs of records: one patient for both
BEAT_S = (-0.40, 0.75)  # one beat's waves, around its R wave
MAINS_HZ = 50.0

# The healthy beat: centre (s), width (s), x, y, z (mV). T and P are pairs, which makes them lopsided. Waves that only
# disease draws are there with no amplitude.
_HEALTHY: dict[str, tuple[float, float, float, float, float]] = {
    "P1": (-0.165, 0.016, 0.050, 0.080, -0.040),
    "P2": (-0.140, 0.017, 0.060, 0.060, 0.035),
    "Q": (-0.026, 0.0070, -0.14, 0.02, -0.24),
    "R": (0.000, 0.0110, 0.95, 0.72, -0.10),
    "R2": (0.018, 0.0100, 0.35, 0.25, 0.62),
    "S": (0.038, 0.0090, -0.16, -0.10, 0.26),
    "late": (0.060, 0.0150, 0.0, 0.0, 0.0),
    "loss": (-0.018, 0.0120, 0.0, 0.0, 0.0),
    "ST": (0.125, 0.0350, 0.0, 0.0, 0.0),
    "T1": (0.235, 0.048, 0.120, 0.085, -0.110),
    "T2": (0.285, 0.030, 0.170, 0.120, -0.130),
}
WAVES: tuple[str, ...] = tuple(_HEALTHY)
_P, _QRS, _T = ("P1", "P2"), ("Q", "R", "R2", "S"), ("T1", "T2")
# Where an infarct or ischaemia lies, as the direction its forces would have had, and what the report calls it.
TERRITORIES: Mapping[str, tuple[float, float, float]] = {
    "anteroseptal": (-0.05, 0.0, -1.0),
    "anterior": (0.50, 0.05, -0.85),
    "lateral": (0.97, -0.20, 0.05),
    "inferior": (-0.05, 1.0, 0.05),
    "inferolateral": (0.60, 0.80, 0.10),
}


@dataclass(frozen=True)
class Patient:
    """What stays the same between two recordings of one person.

    Attributes:
        age: years.
        sex: "F" or "M".
        labels: code -> present, of `LABELS` without SBRAD and STACH, which belong to a recording.
        waves_W5: centre (s), width (s), x, y, z (mV) of every Gaussian.
        lead_gain_E: how well each independent lead sees the dipole (build, electrode placement).
        findings: phrases for the report.
    """

    age: float
    sex: str
    labels: Mapping[str, bool]
    waves_W5: np.ndarray
    lead_gain_E: np.ndarray
    findings: tuple[str, ...]


def generate(
    counts: Mapping[str, int], seed: int = 0, fs_hz: float = FS_HZ, duration_s: float = DURATION_S
) -> Iterator[Record]:
    """Records of a whole data set, split by split.

    Record i of a split depends on (seed, split, i) only: the first thousand of three thousand records are the same
    as a thousand. A few percent of the patients have two records, always in the same split.

    Args:
        counts: split -> how many records.
        seed: another seed is another data set.
        fs_hz: samples a second.
        duration_s: length of every record.

    Raises:
        EvlecgError: unknown split, negative count, negative seed, or a signal too short to hold a beat.
    """
    check_counts(counts, seed)
    if fs_hz < 50 or duration_s < 1:
        raise EvlecgError(f"{duration_s} s at {fs_hz} Hz do not hold a heartbeat", hint="at least 1 s at 50 Hz")
    return (
        numbered(seed, split, i, fs_hz=fs_hz, duration_s=duration_s) for split in counts for i in range(counts[split])
    )


def check_counts(counts: Mapping[str, int], seed: int) -> None:
    """Raises EvlecgError for an unknown split, a negative count or a negative seed."""
    for split, count in counts.items():
        if split not in SPLITS:
            raise EvlecgError(f"unknown split {split!r}", hint=nearest(split, SPLITS))
        if count < 0:
            raise EvlecgError(f"{count} records cannot be made", where=split)
    if seed < 0:
        raise EvlecgError(f"the seed cannot be {seed}", hint="use 0 or more")


def record_id(split: str, i: int) -> str:
    """Id of record i of a split."""
    return f"{split}-{i:06d}"


def numbered(seed: int, split: str, i: int, *, fs_hz: float = FS_HZ, duration_s: float = DURATION_S) -> Record:
    """Record i of a split; arguments as in `generate`."""
    split_number = SPLITS.index(split)
    shared = np.random.default_rng((seed, split_number, i // 2, 0)).random() < SECOND_RECORD_SHARE
    owner = i - i % 2 if shared else i
    patient = draw_patient(np.random.default_rng((seed, split_number, owner, 1)))
    return one_record(
        np.random.default_rng((seed, split_number, i, 2)),
        patient=patient,
        id=record_id(split, i),
        patient_id=f"{split}-p{owner:06d}",
        split=split,
        fs_hz=fs_hz,
        duration_s=duration_s,
    )


def draw_patient(rng: np.random.Generator) -> Patient:
    """A person: healthy anatomy first, then what each disease does to it."""
    present = _draw_diseases(rng)
    age = float(np.clip(rng.normal(50 if present["NORM"] else 66, 14), 18, 90).round())
    waves = _draw_heart(rng)
    findings: list[str] = []
    for label, change in (("HYP", _hypertrophy), ("CD", _conduction), ("MI", _infarct), ("STTC", _repolarisation)):
        if present[label]:
            findings.append(change(rng, waves))
    if present["AFIB"]:
        waves[_at("P1", "P2"), 2:] = 0.0
    return Patient(
        age=age,
        sex="F" if rng.random() < 0.48 else "M",
        labels=present,
        waves_W5=waves,
        lead_gain_E=np.exp(rng.normal(0, 0.07, len(DOWER_E3))),
        findings=tuple(findings) or (("normal ECG",) if present["NORM"] else ()),
    )


def _draw_diseases(rng: np.random.Generator) -> dict[str, bool]:
    kind = rng.random()
    present = dict.fromkeys((*SUPERCLASSES, "AFIB"), False)
    if kind < NORM_SHARE:
        present["NORM"] = True
    elif kind < NORM_SHARE + AFIB_ALONE_SHARE:
        present["AFIB"] = True
    else:
        while not any(present[label] for label in DISEASE_SHARE):
            for label, share in DISEASE_SHARE.items():
                after_infarct = 0.14 if label == "STTC" and present["MI"] else 0.0
                present[label] = bool(rng.random() < share + after_infarct)
        present["AFIB"] = bool(rng.random() < 0.14)
    return present


def _at(*names: str) -> list[int]:
    """Rows of waves."""
    return [WAVES.index(name) for name in names]


def _rotate(
    waves: np.ndarray, names: tuple[str, ...], *, frontal_deg: float = 0.0, transverse_deg: float = 0.0
) -> None:
    """Turns waves: in the frontal plane towards the feet, in the transverse plane towards the back. In place."""
    rows = _at(*names)
    for degrees, (first, second) in ((frontal_deg, (2, 3)), (transverse_deg, (2, 4))):
        cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
        a, b = waves[rows, first], waves[rows, second]
        waves[rows, first], waves[rows, second] = cos * a - sin * b, sin * a + cos * b


def _draw_heart(rng: np.random.Generator) -> np.ndarray:
    """A healthy heart: axis, voltages, widths, intervals, and a T wave of its own."""
    waves = np.array(list(_HEALTHY.values()))
    frontal, transverse = rng.normal(0, 15), rng.normal(0, 12)
    _rotate(waves, _QRS, frontal_deg=frontal, transverse_deg=transverse)
    turn = float(np.clip(rng.normal(0, 12), -25, 25))
    _rotate(waves, _T, frontal_deg=0.5 * frontal + turn, transverse_deg=0.4 * transverse + rng.normal(0, 10))
    _rotate(waves, _P, frontal_deg=rng.normal(0, 10), transverse_deg=rng.normal(0, 8))
    voltage = math.exp(rng.normal(0, 0.20))
    waves[_at(*_QRS), 2:] *= voltage
    waves[_at("Q"), 2:] *= math.exp(rng.normal(0, 0.4))
    waves[_at("S"), 2:] *= math.exp(rng.normal(0, 0.35))
    waves[_at(*_T), 2:] *= voltage**0.5 * math.exp(rng.normal(0, 0.30))
    waves[_at(*_P), 2:] *= math.exp(rng.normal(0, 0.22))
    waves[_at(*_QRS), 1] *= math.exp(rng.normal(0, 0.07))
    waves[_at(*_QRS), 0] *= math.exp(rng.normal(0, 0.07))
    waves[_at(*_T), 1] *= math.exp(rng.normal(0, 0.10))
    waves[_at(*_P), 0] += float(np.clip(rng.normal(0, 0.012), -0.025, 0.025))
    return waves


def _severity(rng: np.random.Generator) -> float:
    """Between barely there and unmistakable."""
    return 0.10 + 0.90 * float(rng.beta(1.4, 1.6))


def _infarct(rng: np.random.Generator, waves: np.ndarray) -> str:
    """Forces towards the scar are lost: Q waves, small R waves, often an inverted T there. In place."""
    name, toward = _territory(rng)
    severity = _severity(rng)
    waves[_at("loss"), 2:] = -(0.06 + 0.50 * severity) * toward
    for row in _at("Q", "R", "R2"):
        force = max(0.0, float(waves[row, 2:] @ toward))
        waves[row, 2:] -= 0.55 * severity * force * toward
    if rng.random() < 0.75:
        _invert_t(waves, toward, severity * rng.uniform(0.3, 1.6))
    if rng.random() < 0.20:
        waves[_at("ST"), 2:] += rng.uniform(0.08, 0.22) * toward
        return f"acute {name} infarction"
    return f"{name} infarction"


def _repolarisation(rng: np.random.Generator, waves: np.ndarray) -> str:
    """ST depression, T inversion or flat T waves without a scar. In place."""
    severity = _severity(rng)
    kind = rng.random()
    if kind < 0.35:
        waves[_at(*_T), 2:] *= 1 - (0.40 + 0.65 * severity)
        return "non-specific T wave flattening"
    name, toward = _territory(rng)
    if kind < 0.70:
        waves[_at("ST"), 2:] -= (0.025 + 0.18 * severity) * toward
        _invert_t(waves, toward, 0.15 + 0.85 * severity)
        return f"ST depression, {name}"
    _invert_t(waves, toward, 0.5 + 1.3 * severity)
    return f"T wave inversion, {name}"


def _conduction(rng: np.random.Generator, waves: np.ndarray) -> str:
    """Left, right or incomplete right bundle branch block, left anterior fascicular block, or a long PR. In place."""
    severity = _severity(rng)
    kind = rng.random()
    force = float(np.linalg.norm(waves[_at("R")[0], 2:]))
    if kind < 0.22:  # the left ventricle is reached late and from the right
        waves[_at("Q"), 2:] *= -0.3
        waves[_at("S"), 2:] = 0.0
        waves[_at("R"), :2] = (0.002, 0.019 + 0.004 * severity)
        waves[_at("R"), 2:] = force * np.array([0.50, 0.30, 0.30])
        waves[_at("R2"), :2] = (0.048 + 0.010 * severity, 0.021 + 0.004 * severity)
        waves[_at("R2"), 2:] = force * np.array([0.75, 0.25, 0.75])
        size = np.linalg.norm(waves[_at(*_T), 2:], axis=1, keepdims=True)
        waves[_at(*_T), 2:] = -size * rng.uniform(0.6, 1.1) * np.array([0.70, 0.15, 0.65])
        waves[_at("ST"), 2:] -= 0.10 * np.array([0.70, 0.15, 0.65])
        waves[_at(*_T), 0] += 0.035
        return "left bundle branch block"
    if kind < 0.47:  # the right ventricle's forces come last, to the right and to the front
        size = force * (0.25 + 0.55 * severity)
        waves[_at("late")] = (0.064 + 0.010 * severity, 0.015 + 0.004 * severity, -0.75 * size, 0.0, -0.70 * size)
        waves[_at("R2"), 4] *= 0.75
        waves[_at(*_T), 4] += 0.10
        waves[_at(*_T), 0] += 0.02
        return "right bundle branch block"
    if kind < 0.60:
        size = force * (0.12 + 0.28 * severity)
        waves[_at("late")] = (0.050, 0.011, -0.70 * size, 0.0, -0.75 * size)
        return "incomplete right bundle branch block"
    if kind < 0.80:  # the left ventricle is reached from below: first forces down, main forces up
        axis_deg = math.degrees(math.atan2(*waves[_at("R")[0], [3, 2]]))
        _rotate(waves, _QRS, frontal_deg=-(32 + 36 * severity) - axis_deg)
        waves[_at("Q"), 2:] += force * np.array([-0.05, 0.22, 0.0])
        return "left anterior fascicular block"
    waves[_at(*_P), 0] -= 0.040 + 0.110 * severity
    return "first degree AV block"


def _hypertrophy(rng: np.random.Generator, waves: np.ndarray) -> str:
    """Large forces of the left ventricle, often with strain, or (one in six) of the right. In place."""
    severity = _severity(rng)
    if rng.random() < 1 / 6:
        _rotate(waves, ("R", "R2"), frontal_deg=45 + 40 * severity)
        waves[_at("R", "R2"), 4] -= 0.35 + 0.45 * severity
        waves[_at("S"), 2] -= 0.30 * severity
        waves[_at(*_T), 4] += 0.08 + 0.12 * severity
        waves[_at(*_P), 3] *= 1.3
        return "right ventricular hypertrophy"
    _rotate(waves, _QRS, frontal_deg=-rng.uniform(5, 30))
    waves[_at(*_QRS), 2:] *= 1.12 + 0.85 * severity
    waves[_at("R2"), 4] += 0.12
    waves[_at("R", "R2"), 1] *= 1.10
    if rng.random() < 0.4:  # a large left atrium: the second half of P is wide and points back
        waves[_at("P2"), 0] += 0.015
        waves[_at("P2"), 4] += 0.06
    if rng.random() < 0.25 + 0.5 * severity:
        toward = np.array([0.93, 0.20, -0.30])
        waves[_at("ST"), 2:] -= (0.04 + 0.10 * severity) * toward
        _invert_t(waves, toward, 0.5 + 0.9 * severity)
        return "left ventricular hypertrophy with strain"
    return "left ventricular hypertrophy"


def _territory(rng: np.random.Generator) -> tuple[str, np.ndarray]:
    """A wall of the left ventricle and the unit vector that points to it."""
    name = list(TERRITORIES)[rng.integers(len(TERRITORIES))]
    toward = np.array(TERRITORIES[name])
    return name, toward / np.linalg.norm(toward)


def _invert_t(waves: np.ndarray, toward: np.ndarray, strength: float) -> None:
    """Turns the T waves away from a direction: 1 removes an average T wave there, more inverts it. In place."""
    for row in _at(*_T):
        force = max(0.6 * float(np.linalg.norm(waves[row, 2:])), float(waves[row, 2:] @ toward))
        waves[row, 2:] -= strength * force * toward


def one_record(
    rng: np.random.Generator,
    *,
    patient: Patient,
    id: str = "synthetic",
    patient_id: str = "synthetic",
    split: str = "train",
    fs_hz: float = 250.0,
    duration_s: float = 10.0,
) -> Record:
    """Records a person: rhythm, breathing and noise are drawn, the heart is given.

    Args:
        rng: draws all that belongs to this recording.
        patient: whose heart it is (`draw_patient`).
        id, patient_id, split: as `Record` has them.
        fs_hz: samples a second.
        duration_s: length.
    """
    n_samples = round(duration_s * fs_hz)
    time_T = np.arange(n_samples) / fs_hz
    breath_hz, breath_phase = rng.uniform(0.15, 0.35), rng.uniform(0, 2 * math.pi)
    breath_T = np.sin(2 * math.pi * breath_hz * time_T + breath_phase).astype(np.float32)
    rhythm, rr_s = _draw_rhythm(rng, patient.labels["AFIB"])
    beats_s = _beats(rng, rr_s, patient.labels["AFIB"], duration_s, breath_hz, breath_phase)
    dipole_3T = _dipole(rng, patient.waves_W5, beats_s, rr_s, n_samples, fs_hz)
    if patient.labels["AFIB"]:
        dipole_3T += _fibrillation(rng, time_T)
    seen_E3 = (DOWER_E3 * patient.lead_gain_E[:, None]).astype(np.float32)
    # Breathing turns the heart a few degrees about the long axis and moves it away from the chest wall.
    sway_E3 = seen_E3 @ np.array([[0, 0, -1], [0, 0, 0], [1, 0, 0]], np.float32) * math.radians(rng.uniform(0, 4))
    leads_ET = seen_E3 @ dipole_3T
    leads_ET += (sway_E3 @ dipole_3T + leads_ET * rng.uniform(0, 0.05)) * breath_T
    leads_ET += _noise(rng, time_T, fs_hz, breath_T)
    signal_mV = np.concatenate([_limb_leads(leads_ET[:2]), leads_ET[2:]])
    labels = {**patient.labels, "SBRAD": rhythm == "sinus bradycardia", "STACH": rhythm == "sinus tachycardia"}
    return Record(
        id=id,
        patient_id=patient_id,
        signal_mV=signal_mV,
        fs_hz=fs_hz,
        labels={label: labels[label] for label in LABELS},
        split=split,
        age=patient.age,
        sex=patient.sex,
        report=", ".join((rhythm, *patient.findings)).replace(rhythm[0], rhythm[0].upper(), 1) + ".",
    )


def _limb_leads(i_ii_2T: np.ndarray) -> np.ndarray:
    """Einthoven and Goldberger: I, II, III, aVR, aVL, aVF [6, T] from I and II."""
    return LIMB_62 @ i_ii_2T


def _draw_rhythm(rng: np.random.Generator, fibrillates: bool) -> tuple[str, float]:
    """Its name and the mean distance of beats in seconds."""
    if fibrillates:
        return "atrial fibrillation", 60 / float(np.clip(rng.normal(92, 20), 50, 150))
    kind = rng.random()
    if kind < 0.11:
        return "sinus bradycardia", 60 / rng.uniform(40, 58)
    if kind < 0.22:
        return "sinus tachycardia", 60 / rng.uniform(103, 145)
    return "sinus rhythm", 60 / float(np.clip(rng.normal(74, 10), 62, 97))


def _beats(
    rng: np.random.Generator, rr_s: float, fibrillates: bool, duration_s: float, breath_hz: float, breath_phase: float
) -> np.ndarray:
    """Times of the R waves, from before the start until after the end."""
    n_beats = math.ceil((duration_s + 2) / rr_s) + 4
    if fibrillates:
        steps_s = rr_s * np.clip(np.exp(rng.normal(-0.02, 0.22, n_beats)), 0.5, 2.0)
        beats_s = np.cumsum(np.maximum(steps_s, 0.30))
    else:
        even_s = rr_s * np.arange(n_beats)
        jitter_s = np.cumsum(rng.normal(0, 0.012, n_beats)) * rr_s
        sway_s = rng.uniform(0, 0.035) * rr_s * np.sin(2 * math.pi * breath_hz * even_s + breath_phase)
        beats_s = even_s + jitter_s + sway_s
    beats_s = beats_s - beats_s[0] - 1.0 + rng.uniform(0, rr_s)
    return beats_s[(beats_s > -BEAT_S[1]) & (beats_s < duration_s - BEAT_S[0])]


def _dipole(
    rng: np.random.Generator, waves_W5: np.ndarray, beats_s: np.ndarray, rr_s: float, n_samples: int, fs_hz: float
) -> np.ndarray:
    """The heart's dipole [3, T]: every beat's Gaussians, each beat a little different."""
    waves_W5 = waves_W5[waves_W5[:, 2:].any(axis=1)]
    centre_W, width_W = waves_W5[:, 0].copy(), waves_W5[:, 1].copy()
    late_W = centre_W > 0.09  # repolarisation shortens with the cycle; what depolarises does not
    stretch = (rr_s / 0.81) ** 0.42
    centre_W[late_W] *= stretch
    width_W[late_W] *= stretch
    first_K = np.round((beats_s + BEAT_S[0]) * fs_hz).astype(int)
    n_beat = math.ceil((BEAT_S[1] - BEAT_S[0]) * fs_hz)
    time_KB = ((first_K[:, None] + np.arange(n_beat)) / fs_hz - beats_s[:, None]).astype(np.float32)
    z_KWB = (time_KB[:, None] - centre_W[:, None].astype(np.float32)) / width_W[:, None].astype(np.float32)
    z_KWB *= z_KWB
    z_KWB *= -0.5
    np.exp(z_KWB, out=z_KWB)
    scale_KW = np.exp(rng.normal(0, 0.025, (len(beats_s), len(centre_W)))).astype(np.float32)
    beat_K3B = (waves_W5[:, 2:].T.astype(np.float32) * scale_KW[:, None]) @ z_KWB
    before = max(0, -int(first_K.min()))
    padded_3T = np.zeros((3, before + n_samples + n_beat + 1), np.float32)
    for first, beat_3B in zip(first_K, beat_K3B, strict=True):
        padded_3T[:, before + first : before + first + n_beat] += beat_3B
    return padded_3T[:, before : before + n_samples]


def _fibrillation(rng: np.random.Generator, time_T: np.ndarray) -> np.ndarray:
    """f waves [3, T]: the atria's fast, unsteady circling, seen best by V1 and II."""
    rate_hz = rng.uniform(4.8, 7.5)
    wander_T = rng.uniform(0.5, 1.5) * np.sin(2 * math.pi * rng.uniform(0.2, 0.8) * time_T + rng.uniform(0, 6.28))
    phase_T = 2 * math.pi * rate_hz * time_T + wander_T
    shape_T = np.sin(phase_T) + 0.35 * np.sin(2 * phase_T + rng.uniform(0, 6.28))
    shape_T *= 0.75 + 0.25 * np.sin(2 * math.pi * rng.uniform(0.2, 0.6) * time_T + rng.uniform(0, 6.28))
    size_mV = 0.022 * math.exp(rng.normal(0, 0.5))
    return (np.array([[-0.3], [0.9], [-1.2]]) * size_mV * shape_T).astype(np.float32)


def _noise(rng: np.random.Generator, time_T: np.ndarray, fs_hz: float, breath_T: np.ndarray) -> np.ndarray:
    """Baseline wander, muscle and mains, as the independent leads [8, T] pick them up."""
    n_leads = len(DOWER_E3)
    wander_mV = 0.030 * math.exp(rng.normal(0, 0.6))
    rates_hz = rng.uniform(0.05, 0.5, 3)
    waves_4T = np.concatenate(
        [np.sin(2 * math.pi * rates_hz[:, None] * time_T + rng.uniform(0, 6.28, (3, 1))), breath_T[None]]
    ).astype(np.float32)
    noise_ET = (rng.normal(0, wander_mV, (n_leads, 4)).astype(np.float32)) @ waves_4T
    muscle_mV = 0.010 * np.exp(rng.normal(0, 0.5) + rng.normal(0, 0.25, (n_leads, 1)))
    white_ET = rng.standard_normal((n_leads, len(time_T) + 1), dtype=np.float32)
    noise_ET += (white_ET[:, 1:] + white_ET[:, :-1]) * (muscle_mV / math.sqrt(2)).astype(np.float32)
    if rng.random() < 0.3 and fs_hz > 2 * MAINS_HZ:
        mains_mV = 0.006 * math.exp(rng.normal(0, 0.6))
        gain_E1 = rng.uniform(0.2, 1.0, (n_leads, 1)).astype(np.float32)
        noise_ET += gain_E1 * (mains_mV * np.sin(2 * math.pi * MAINS_HZ * time_T)).astype(np.float32)
    return noise_ET
