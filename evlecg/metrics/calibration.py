"""Whether a probability means what it says: reliability, calibration error, Brier score; and mending it on validation.

Binned numbers depend on their bins, so the bins are part of every name and formula. Bins of equal mass are cut at
quantiles of the data themselves and stay where they are in every resample.

Shape legend: N records, K labels, P patients, R resamples, B bins, T trials of the fit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from scipy import optimize, sparse, special

from evlecg.errors import EvlecgError
from evlecg.metrics.decisions import PatientSums
from evlecg.metrics.estimates import MACRO, Metric, bootstrap_text, plain
from evlecg.metrics.resampling import N_BOOT, Statistic, Values, observed, percentile_interval, ratio, resampled
from evlecg.metrics.scored import Scored

Bins = Literal["width", "mass"]
_BINS_TEXT = {"width": "{n} bins of equal width", "mass": "{n} bins of equal mass (cut at quantiles of the scores)"}
_LOGIT_EPS = 1e-12  # scores of exactly 0 and 1 have no logit; small enough to leave the order of others alone


class _Binned:
    """Sums of records, scores and truths in every bin of every label, under counts; `formed` makes [R] of [B, R]s."""

    counts_only = False

    def __init__(self, scored: Scored, n_bins: int, kind: Bins, formed: Callable[..., np.ndarray]) -> None:
        self.n_labels, self.formed = len(scored.labels), formed
        self.labels = {}
        for k in range(self.n_labels):
            assessed_N = scored.assessed_NK[:, k]
            if assessed_N.any():
                score_N, truth_N = scored.value_NK[assessed_N, k], scored.truth_NK[assessed_N, k]
                cells = (_bin_of(score_N, _edges(score_N, n_bins, kind)), scored.patient_N[assessed_N])
                shape = (n_bins, scored.n_patients)
                self.labels[k] = [
                    sparse.csr_matrix((feature_N, cells), shape=shape)
                    for feature_N in (np.ones_like(score_N), score_N, truth_N)
                ]

    def __call__(self, count_PR: np.ndarray) -> Values:
        label_RK = np.full((count_PR.shape[1], self.n_labels), np.nan)
        for k, sums in self.labels.items():
            label_RK[:, k] = self.formed(*(sum_BP @ count_PR for sum_BP in sums))
        return Values(label_RK)


def _edges(score_N: np.ndarray, n_bins: int, kind: Bins) -> np.ndarray:
    """Inner edges [B - 1]; a score on an edge belongs below it, as in scikit-learn's calibration_curve."""
    share = np.linspace(0, 1, n_bins + 1)[1:-1]
    return share if kind == "width" else np.percentile(score_N, 100 * share)


def _bin_of(score_N: np.ndarray, edge: np.ndarray) -> np.ndarray:
    return np.searchsorted(edge, score_N)


def _bind_binned(
    name: str, n_bins: int, kind: Bins, formed: Callable[..., np.ndarray]
) -> Callable[[Scored], Statistic]:
    if n_bins < 1 or kind not in _BINS_TEXT:
        raise ValueError(f"{n_bins} bins of equal {kind!r}")

    def bind(scored: Scored) -> Statistic:
        scored.check_probabilities(name)
        return _Binned(scored, n_bins, kind, formed)

    return bind


def ece(n_bins: int = 15, kind: Bins = "width") -> Metric:
    """Expected calibration error (Naeini 2015), of the probability that the label is present.

    It is above 0 for a perfectly calibrated model too, the more so the fewer the records: read it beside
    `ece_if_calibrated`, which is also the test that an interval near 0 is not.
    """

    def formed(n_BR: np.ndarray, score_BR: np.ndarray, truth_BR: np.ndarray) -> np.ndarray:
        return ratio(np.abs(truth_BR - score_BR).sum(axis=0), n_BR.sum(axis=0))

    return Metric(
        name=f"ece_{kind}_{n_bins}",
        formula="sum over bins of (share of the records) x |share of positives - mean score|; "
        + _BINS_TEXT[kind].format(n=n_bins),
        overall={"macro": MACRO},
        bind=_bind_binned("the calibration error", n_bins, kind, formed),
        higher_is_better=False,
        reflected=True,
    )


@dataclass(frozen=True)
class EceIfCalibrated:
    """What calibration error one label's scores would show if they were exactly right.

    Attributes:
        value: the error seen, as in `ece`; None where the label was not assessed.
        expected, upper95: mean and 95th percentile of the error with truths drawn from the scores.
        p: share of such draws with an error at least as large, (1 + count) / (1 + draws).
    """

    value: float | None
    expected: float | None
    upper95: float | None
    p: float | None
    n: int
    method: str

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values under the attributes' names."""
        return plain(asdict(self))


def ece_if_calibrated(
    scored: Scored, label: str, *, n_bins: int = 15, kind: Bins = "width", n_draws: int = 1000, seed: int = 0
) -> EceIfCalibrated:
    """The level of chance of the calibration error, by consistency resampling (Broecker and Smith 2007).

    Truths are drawn record by record, also where a patient has several.

    Raises:
        EvlecgError: a score is not a probability, or there is no such label.
    """
    scored.check_probabilities("the calibration error")
    assessed_N = scored.assessed_NK[:, scored.column(label)]
    score_N = scored.value_NK[assessed_N, scored.column(label)]
    truth_N = scored.truth_NK[assessed_N, scored.column(label)]
    method = (f"{ece(n_bins, kind).formula}; expected: mean over {n_draws} draws of the truths from the scores "
              f"themselves (seed {seed})")  # fmt: skip
    if not len(score_N):
        return EceIfCalibrated(None, None, None, None, 0, method)
    order = np.argsort(score_N)
    score_N, truth_N = score_N[order], truth_N[order]
    first_B = np.unique(_bin_of(score_N, _edges(score_N, n_bins, kind)), return_index=True)[1]

    def error(truth_N: np.ndarray) -> float:
        return float(np.abs(np.add.reduceat(truth_N - score_N, first_B)).sum() / len(score_N))

    generator = np.random.default_rng(seed)
    drawn = np.array([error(generator.random(len(score_N)) < score_N) for _ in range(n_draws)])
    value = error(truth_N)
    p = (1 + int((drawn >= value).sum())) / (1 + n_draws)
    return EceIfCalibrated(value, float(drawn.mean()), float(np.percentile(drawn, 95)), p, len(score_N), method)


def brier_term(
    term: Literal["reliability", "resolution", "uncertainty", "within_bins"], n_bins: int = 15, kind: Bins = "width"
) -> Metric:
    """A term of Brier = reliability - resolution + uncertainty + within_bins (Murphy 1973; Stephenson 2008).

    `within_bins` is what scores add that differ within a bin: their variance less twice their covariance with truth.
    """
    words = {
        "reliability": "mean over records of (mean score of its bin - share of positives there)²; 0 is perfect",
        "resolution": "mean over records of (share of positives in its bin - share of positives)²; more is better",
        "uncertainty": "share of positives x share of negatives; a property of the data",
        "within_bins": "mean over records of (score - bin's mean)² - 2 (score - bin's mean) (truth - bin's share)",
    }

    def formed(n_BR: np.ndarray, score_BR: np.ndarray, truth_BR: np.ndarray) -> np.ndarray:
        n_R, share_R = n_BR.sum(axis=0), ratio(truth_BR.sum(axis=0), n_BR.sum(axis=0))
        filled_BR = np.where(n_BR > 0, n_BR, 1)
        if term == "reliability":
            return ratio(((score_BR - truth_BR) ** 2 / filled_BR).sum(axis=0), n_R)
        if term == "resolution":
            return ratio((n_BR * (truth_BR / filled_BR - share_R) ** 2).sum(axis=0), n_R)
        return share_R * (1 - share_R)

    def bind(scored: Scored) -> Statistic:
        scored.check_probabilities("the Brier score")
        if term != "within_bins":
            return _Binned(scored, n_bins, kind, formed)
        parts = [BRIER.bind(scored), *(brier_term(other, n_bins, kind).bind(scored)
                                       for other in ("reliability", "resolution", "uncertainty"))]  # fmt: skip
        return _Rest(parts)

    if term not in words or n_bins < 1 or kind not in _BINS_TEXT:
        raise ValueError(f"no term {term!r} with {n_bins} bins of equal {kind!r}")
    return Metric(
        name=f"brier_{term}_{kind}_{n_bins}",
        formula=words[term] + ("" if term == "uncertainty" else f"; {_BINS_TEXT[kind].format(n=n_bins)}"),
        overall={"macro": MACRO},
        bind=bind,
        higher_is_better=term == "resolution",
        reflected=term == "reliability",
    )


class _Rest:
    """Brier - reliability + resolution - uncertainty."""

    counts_only = False

    def __init__(self, parts: list[Statistic]) -> None:
        self.parts = parts

    def __call__(self, count_PR: np.ndarray) -> Values:
        brier, reliability, resolution, uncertainty = (part(count_PR).label_RK for part in self.parts)
        return Values(brier - reliability + resolution - uncertainty)


def _brier(scored: Scored) -> Statistic:
    scored.check_probabilities("the Brier score")
    square_NK = np.where(scored.assessed_NK, (scored.value_NK - scored.truth_NK) ** 2, 0)

    def formed(sum_FR: np.ndarray) -> Values:
        square_KR, n_KR = sum_FR.reshape(2, len(scored.labels), -1)
        return Values(ratio(square_KR, n_KR).T)

    return PatientSums(scored, np.concatenate([square_NK, scored.assessed_NK], axis=1), formed)


BRIER = Metric(
    name="brier", formula="mean over records of (score - truth)²", overall={"macro": MACRO}, bind=_brier,
    higher_is_better=False,
)  # fmt: skip


# -- the curve ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ReliabilityBin:
    """Records whose scores lie in one bin.

    Attributes:
        low, high: edges of the bin; low itself belongs to the bin below (but for the first).
        mean_score: of its records.
        share_pos: positives among them, with its 95% interval by bootstrap over patients.
    """

    low: float
    high: float
    mean_score: float
    share_pos: float
    ci95: tuple[float, float] | None
    n: int
    n_pos: int
    n_patients: int


@dataclass(frozen=True)
class ReliabilityCurve:
    """Share of positives against mean score; bins without records are left out."""

    label: str
    bins: tuple[ReliabilityBin, ...]
    method: str
    interval_method: str

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values under the attributes' names."""
        return plain(asdict(self))


def reliability_curve(
    scored: Scored, label: str, *, n_bins: int = 10, kind: Bins = "width", n_boot: int = N_BOOT, seed: int = 0
) -> ReliabilityCurve:
    """What a calibration plot shows of one label.

    Raises:
        EvlecgError: a score is not a probability, or there is no such label.
    """
    scored.check_probabilities("the reliability curve")
    k = scored.column(label)
    assessed_N = scored.assessed_NK[:, k]
    score_N, truth_N, patient_N = (
        scored.value_NK[assessed_N, k],
        scored.truth_NK[assessed_N, k],
        scored.patient_N[assessed_N],
    )
    method = f"share of positives against mean score; {_BINS_TEXT[kind].format(n=n_bins)}"
    if not len(score_N):
        return ReliabilityCurve(label, (), method, bootstrap_text(n_boot, seed))
    edge = _edges(score_N, n_bins, kind)
    bin_N = _bin_of(score_N, edge)
    in_bin_NB = (bin_N[:, None] == np.arange(n_bins)).astype(np.float64)
    feature_NF = np.zeros((len(assessed_N), 2 * n_bins))
    feature_NF[assessed_N] = np.concatenate([in_bin_NB * truth_N[:, None], in_bin_NB], axis=1)
    statistic = PatientSums(scored, feature_NF, lambda sum_FR: Values(ratio(sum_FR[:n_bins], sum_FR[n_bins:]).T))
    share_B = observed(statistic, scored.n_patients).label_RK[0]
    drawn = None
    if n_boot:
        drawn = resampled({"": statistic}, scored.n_patients, scored.most_records_of_a_patient,
                          n_boot=n_boot, seed=seed)[""].label_RK  # fmt: skip
    low, high = (0.0, 1.0) if kind == "width" else (float(score_N.min()), float(score_N.max()))
    edges = [low, *map(float, edge), high]
    bins = []
    for b in range(n_bins):
        inside = bin_N == b
        if inside.any():
            n_patients = len(np.unique(patient_N[inside]))
            bins.append(ReliabilityBin(
                edges[b], edges[b + 1], float(score_N[inside].mean()), float(share_B[b]),
                percentile_interval(drawn[:, b]) if drawn is not None and n_patients >= 2 else None,
                int(inside.sum()), int(truth_N[inside].sum()), n_patients,
            ))  # fmt: skip
    return ReliabilityCurve(label, tuple(bins), method, bootstrap_text(n_boot, seed))


# -- mending it --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Calibration:
    """sigmoid(slope x logit(score) + bias), fitted on validation.

    Attributes:
        method: for a report.
        slope: label -> slope, 1 / temperature; None where nothing could be fitted.
        bias: label -> bias in logits; 0 for temperature scaling.
        undefined_because: label -> why.
        nll_before, nll_after: label -> mean negative log-likelihood in nats on validation.
        n, n_pos: label -> records and positive ones it was fitted on.
        fitted_on: fingerprint of those data.
    """

    method: str
    slope: Mapping[str, float | None]
    bias: Mapping[str, float | None]
    undefined_because: Mapping[str, str]
    nll_before: Mapping[str, float | None]
    nll_after: Mapping[str, float | None]
    n: Mapping[str, int]
    n_pos: Mapping[str, int]
    fitted_on: str

    @property
    def temperature(self) -> dict[str, float | None]:
        """1 / slope: above 1 the scores were too sure."""
        return {label: None if slope is None else 1 / slope for label, slope in self.slope.items()}

    def apply(self, test: Scored) -> Scored:
        """Calibrated probabilities of other data; a label without a fit is left out with the reason.

        Raises:
            EvlecgError: the calibration was fitted on these very data, or a label is unknown to it.
        """
        if self.fitted_on == test.fingerprint:
            raise EvlecgError("the calibration was fitted on the very data that it would be reported on",
                              where=self.method, hint="fit it on validation, or say apply_in_sample")  # fmt: skip
        return self.apply_in_sample(test)

    def apply_in_sample(self, scored: Scored) -> Scored:
        """The same without that check: for the very data of the fit; the numbers flatter."""
        scored.check_probabilities("calibration")
        unknown = [label for label in scored.labels if label not in self.slope]
        if unknown:
            raise EvlecgError(f"no calibration was fitted for {', '.join(unknown)}", where=self.method,
                              hint="fit it with the same labels")  # fmt: skip
        value_NK = scored.value_NK.copy()
        for k, label in enumerate(scored.labels):
            slope, bias = self.slope[label], self.bias[label]
            if slope is not None and bias is not None:
                value_NK[:, k] = special.expit(slope * _logit(scored.value_NK[:, k]) + bias)
        without = {label: f"no calibration: {self.undefined_because[label]}"
                   for label in scored.labels if self.slope[label] is None}  # fmt: skip
        return scored.replaced(value_NK=value_NK, left_out=without)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values under the attributes' names, and `temperature`."""
        return plain({**asdict(self), "temperature": self.temperature})


def fit_temperature(validation: Scored, *, shared: bool = True) -> Calibration:
    """Temperature scaling (Guo 2017): the one slope of the logits with the highest likelihood.

    Args:
        shared: one temperature for all labels, from all their records; else one a label.

    Raises:
        EvlecgError: a score is not a probability.
    """
    return _fit(validation, "temperature scaling: sigmoid(logit(score) / T)", with_bias=False, shared=shared)


def fit_platt(validation: Scored, *, shared: bool = False) -> Calibration:
    """Platt scaling (Platt 1999) of the logits: slope and bias, with his smoothed targets against certainty.

    Args:
        shared: one pair for all labels; else one a label.

    Raises:
        EvlecgError: a score is not a probability.
    """
    return _fit(validation, "Platt scaling: sigmoid(slope x logit(score) + bias), targets (n_pos + 1) / (n_pos + 2) "
                "and 1 / (n_neg + 2)", with_bias=True, shared=shared)  # fmt: skip


_LOG_SLOPE = (np.log(0.01), np.log(100.0))  # scores that separate the classes would have an endless slope


def _fit(validation: Scored, method: str, *, with_bias: bool, shared: bool) -> Calibration:
    validation.check_probabilities("calibration")
    slope, bias, reasons, before, after, n, n_pos = ({} for _ in range(7))
    everything = _trials(validation, range(len(validation.labels)))
    common = _best(*everything, with_bias) if shared else None
    for k, label in enumerate(validation.labels):
        logit_T, truth_T = _trials(validation, [k])
        n[label], n_pos[label] = len(truth_T), int(truth_T.sum())
        fit = common if shared else _best(logit_T, truth_T, with_bias)
        if not len(truth_T):
            fit = validation.left_out.get(label, "validation has no record in which it was assessed")
        if isinstance(fit, str):
            slope[label] = bias[label] = before[label] = after[label] = None
            reasons[label] = fit
            continue
        assert fit is not None
        slope[label], bias[label] = fit
        before[label], after[label] = _nll(logit_T, truth_T), _nll(fit[0] * logit_T + fit[1], truth_T)
    return Calibration(f"{method}; {'one fit for all labels' if shared else 'one fit a label'}, on validation",
                       slope, bias, reasons, before, after, n, n_pos, validation.fingerprint)  # fmt: skip


def _trials(scored: Scored, columns: Any) -> tuple[np.ndarray, np.ndarray]:
    """Logits and truths of all assessed cells of some columns."""
    assessed_NK = scored.assessed_NK[:, list(columns)]
    return _logit(scored.value_NK[:, list(columns)][assessed_NK]), scored.truth_NK[:, list(columns)][assessed_NK]


def _best(logit_T: np.ndarray, truth_T: np.ndarray, with_bias: bool) -> tuple[float, float] | str:
    """Slope and bias of the highest likelihood, or why there are none."""
    n_pos = int(truth_T.sum())
    n_neg = len(truth_T) - n_pos
    if not n_pos or not n_neg:
        return f"validation has no {'positive' if n_neg else 'negative'} record"
    target_T = np.where(truth_T == 1, (n_pos + 1) / (n_pos + 2), 1 / (n_neg + 2)) if with_bias else truth_T

    def loss(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        slope = np.exp(parameters[0])
        z_T = slope * logit_T + (parameters[1] if with_bias else 0.0)
        residual_T = special.expit(z_T) - target_T
        gradient = [(residual_T * logit_T).mean() * slope, residual_T.mean()]
        return _nll(z_T, target_T), np.array(gradient[: len(parameters)])

    bounds = [_LOG_SLOPE, (-50.0, 50.0)] if with_bias else [_LOG_SLOPE]
    found = optimize.minimize(loss, np.zeros(len(bounds)), jac=True, method="L-BFGS-B", bounds=bounds,
                              options={"ftol": 1e-14, "gtol": 1e-10, "maxiter": 500})  # fmt: skip
    if found.x[0] <= _LOG_SLOPE[0] + 1e-9:
        return "on validation the scores do not rise with the truth"
    if found.x[0] >= _LOG_SLOPE[1] - 1e-9:
        return "on validation the scores separate the classes: any temperature towards 0 is better still"
    return float(np.exp(found.x[0])), float(found.x[1]) if with_bias else 0.0


def _nll(z_T: np.ndarray, target_T: np.ndarray) -> float:
    return float((np.logaddexp(0, z_T) - target_T * z_T).mean())


def _logit(score: np.ndarray) -> np.ndarray:
    return special.logit(np.clip(score, _LOGIT_EPS, 1 - _LOGIT_EPS))
