"""Whether requests moved: the newest records of serving beside those that training left.

N values of the reference, M of a window; p_k and q_k are the shares of both sides in K bins or
categories, P and Q their distribution functions.

    psi          sum_k (p_k - q_k) ln(p_k / q_k); without a shift (K - 1) (1/N + 1/M) in the mean
    js           sqrt(H((p + q) / 2) - H(p) / 2 - H(q) / 2), H the entropy in bits: 0 ... 1
    chi2         sum over sides and k of (count - expected)^2 / expected, K - 1 degrees of freedom
    ks           D = max |P - Q|; p = 2 sum_j (-1)^(j-1) exp(-2 j^2 u^2), j = 1 ..., where u =
                 D (e + 0.12 + 0.11 / e) and e^2 = N M / (N + M)
    wasserstein  integral of |P - Q|, in standard deviations of the reference
    mmd          mean k(x, x') + mean k(y, y') - 2 mean k(x, y) of different vectors of both sides,
                 k = exp(-|x - y|^2 / their median); p: how often no less, where they are dealt anew
    auroc        how well a logistic regression, fitted to half of both sides, tells the other
                 apart; p: of ranks so uneven, where the sides are alike
    drop         the mean lost: of calibrated confidence the accuracy lost as the model itself sees
                 it, of feedback the `accuracy`
    ece          rise of the calibration error
    wilson       the shares p with |hits / n - p| <= z sqrt(p (1 - p) / n)

A bound is the larger of the effect size that matters (signals.toml) and of what DRAWS comparisons
of sides that are both drawn from the reference exceed once in a hundred; of auroc, equal ranks.

Sources: Lin 1991, IEEE Trans. IT 37, 145-151 (js); Stephens 1970, J. R. Stat. Soc. B 32, 115-122
(ks); Gretton et al. 2012, JMLR 13, 723-773 (mmd); Lopez-Paz and Oquab 2017, arXiv:1610.06545
(auroc); Guillory et al. 2021, arXiv:2107.03315 (drop); Wilson 1927, JASA 22, 209-212."""

import math
import re
import tomllib
from base64 import b64decode
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from statistics import NormalDist
from typing import NamedTuple
import numpy as np
import torch
from ftcore.deploy.answers import Record
from ftcore.evaluate.metrics import calibration_error, ranking
from ftcore.model.heads import SKETCH

Array = np.ndarray
SIGNALS = tomllib.loads(Path(__file__).with_name("signals.toml").read_text("utf-8"))
ALPHA, DRAWS, RECENT = 0.01, 500, 10  # RECENT: windows; older ones have no say but feedback
VECTOR, VECTORS = re.compile("[A-Za-z0-9+/]{86}=="), 2000  # what `sketched` makes; of a side
FEEDBACK, LABELLED = "right", 100  # records whose feedback came: a window of them, at least

def deciles(reference_N: Array) -> Array:
    """Edges of psi's bins, values of the reference that end their bin; equal ones are one. One
    just below the least value, if that is an edge, parts from it what is lower still."""
    edges = np.unique(np.quantile(reference_N, np.arange(1, 10) / 10, method="inverted_cdf"))
    below = np.nextafter(reference_N.min(), -np.inf)
    return np.append(below, edges) if edges[0] == reference_N.min() else edges

def psi(reference_N: Array, window_M: Array) -> float:
    """A bin that one side alone leaves empty counts as half a value there."""
    edges = deciles(reference_N)
    counts_2K = _counts(*(np.searchsorted(edges, side) for side in (reference_N, window_M)))
    p_K, q_K = np.maximum(counts_2K, 0.5) / [[len(reference_N)], [len(window_M)]]
    return float((p_K - q_K) @ np.log(p_K / q_K))

def js(reference_N: Array, window_M: Array) -> float:
    p_2K = (counts_2K := _counts(reference_N, window_M)) / counts_2K.sum(1, keepdims=True)
    bits_2K = p_2K * np.log2(p_2K / p_2K.mean(0), where=p_2K > 0, out=np.zeros_like(p_2K))
    return math.sqrt(max(0.0, float(bits_2K.sum()) / 2))

def chi2(reference_N: Array, window_M: Array) -> tuple[float, float]:
    counts_2K = _counts(reference_N, window_M)
    expected_2K = counts_2K.sum(1, keepdims=True) * counts_2K.sum(0) / counts_2K.sum()
    value = float((np.square(counts_2K - expected_2K) / expected_2K).sum())
    half = torch.tensor([len(counts_2K[0]) - 1, value], dtype=torch.float64) / 2
    return value, float(torch.special.gammaincc(*half)) if half[0] else 1.0

def ks(reference_N: Array, window_M: Array) -> tuple[float, float]:
    D, N, M = float(_gaps(reference_N, window_M)[1].max()), len(reference_N), len(window_M)
    j, e = np.arange(1, 101), math.sqrt(N * M / (N + M))
    u = D * (e + 0.12 + 0.11 / e)
    return D, float(-2 * (-1.0) ** j @ np.exp(-2 * (j * u) ** 2)) if u > 0.2 else 1.0

def wasserstein(reference_N: Array, window_M: Array) -> float:
    """In deviations of both sides together where the reference has none; 0 where nor have they."""
    x_B, gap_B = _gaps(reference_N, window_M)
    return float(gap_B[:-1] @ np.diff(x_B)) / float(reference_N.std() or x_B.std() or 1)

def mmd(reference_NE: Array, window_ME: Array, deals: int = 0) -> tuple[float, float]:
    (z_BE, is_y_B), random = _both(reference_NE, window_ME, most=VECTORS), np.random.default_rng(0)
    y_PB = np.array([is_y_B, *(random.permutation(is_y_B) for _ in range(deals))], np.float32)
    told_P = mmd_of(z_BE, 1 - y_PB, y_PB)
    return float(told_P[0]), float((told_P >= told_P[0]).mean())

def mmd_of(z_BE: Array, x_PB: Array, y_PB: Array) -> Array:
    """mmd_P of sides that hold these rows so often: for many the kernel is made once."""
    apart_BB = torch.cdist(*2 * [torch.from_numpy(z_BE)]).square().numpy()
    k_BB = np.exp(-apart_BB / (np.median(apart_BB[::9]) or 1))  # cost: of every ninth row
    N, M, near_PB, theirs_PB = x_PB[0].sum(), y_PB[0].sum(), x_PB @ k_BB, y_PB @ k_BB
    within_P = ((near_PB * x_PB).sum(1) - N) / max(N * N - N, 1)
    within_P += ((theirs_PB * y_PB).sum(1) - M) / max(M * M - M, 1)
    return within_P - 2 * (near_PB * y_PB).sum(1) / (N * M)

def auroc(reference_NE: Array, window_ME: Array) -> tuple[float, float]:
    z_BE, is_y_B = _both(reference_NE, window_ME, most=VECTORS // 4)
    z_BE = np.insert((z_BE - z_BE.mean(0)) / (z_BE.std(0) + 1e-9), 0, 1, 1)
    fitted_BE, weights_E, ridge_EE = z_BE[::2], 0 * z_BE[0], np.eye(z_BE.shape[1])
    for _ in range(6):  # Newton's steps; numerics: the ridge keeps weights finite
        p_B = 1 / (1 + np.exp(-fitted_BE @ weights_E))
        slope_E = fitted_BE.T @ (p_B - is_y_B[::2]) + weights_E
        curve_EE = (fitted_BE.T * (p_B - p_B**2)) @ fitted_BE + ridge_EE
        weights_E = weights_E - np.linalg.solve(curve_EE, slope_E).astype(np.float32)
    value = ranking(is_y_B[1::2], z_BE[1::2] @ weights_E)["auroc"]
    n, m = np.maximum(1, np.bincount(is_y_B[1::2], minlength=2))
    return value, 1 - equal_ranks(n, m).cdf(value)

def equal_ranks(n: int, m: int) -> NormalDist:
    """How the AUROC of n and m values is spread where all are of one law.
    source: Mann and Whitney 1947, Ann. Math. Stat. 18, 50-60"""
    return NormalDist(0.5, math.sqrt((n + m + 1) / (12 * n * m)))

def _both(*sides: Array, most: int) -> tuple[Array, Array]:
    """z_BE of both sides, so many of each at most, evenly taken; which are of the window."""
    some = [x_E[np.linspace(0, len(x_E) - 1, min(len(x_E), most)).astype(int)] for x_E in sides]
    return np.concatenate(some, dtype=np.float32), np.repeat([False, True], [*map(len, some)])

def drop(reference_N: Array, window_M: Array) -> float:
    return float(reference_N.mean() - window_M.mean())

def wilson(hits: int, n: int, level: float = 0.95) -> tuple[float, float]:
    z2 = NormalDist().inv_cdf((1 + level) / 2) ** 2
    middle, half = hits + z2 / 2, math.sqrt(z2 * (hits * (n - hits) / max(n, 1) + z2 / 4))
    return max(0.0, (middle - half) / (n + z2)), min(1.0, (middle + half) / (n + z2))

def _counts(reference_N: Array, window_M: Array) -> Array:
    """How often each side has each value that either has."""
    x_K, place_B = np.unique(np.append(reference_N, window_M), return_inverse=True)
    sides = place_B[:len(reference_N)], place_B[len(reference_N):]
    return np.stack([np.bincount(side, minlength=len(x_K)) for side in sides])

def _gaps(reference_N: Array, window_M: Array) -> tuple[Array, Array]:
    """All values of both sides, sorted, and |P - Q| at each."""
    x_B, sides = np.sort(np.append(reference_N, window_M)), (reference_N, window_M)
    P_B, Q_B = (np.searchsorted(np.sort(side), x_B, "right") / len(side) for side in sides)
    return x_B, np.abs(P_B - Q_B)

STATISTICS: dict[str, Callable[[Array, Array], float]] = {
    "psi": psi, "js": js, "ks": lambda *sides: ks(*sides)[0], "wasserstein": wasserstein,
    "mmd": lambda *sides: mmd(*sides)[0], "auroc": lambda *sides: auroc(*sides)[0],
    "drop": drop, "accuracy": drop,  # `ece`: of confidences, each with whether it was right
    "ece": lambda one_N2, two_M2: calibration_error(*two_M2.T) - calibration_error(*one_N2.T)}
P_VALUES = {"js": chi2, "ks": ks, "mmd": partial(mmd, deals=100), "auroc": auroc}  # for people
STATES = {None: "insufficient data", 0: "as the reference", 1: "moved", 2: "moved, twice in a row"}

class Finding(NamedTuple):
    """A statistic of the newest window, and its state: 0 quiet, 1 that window alone exceeds its
    bound, 2 so does the one before it, None too few records (`size`)."""
    signal: str
    statistic: str
    size: int
    value: float | None = None
    bound: float | None = None
    state: int | None = None
    p_value: float | None = None

class Watch:
    """Compares records with the reference's, by all of signals.toml that the reference has."""

    def __init__(self, reference: Sequence[Record], *, window: int = 500, seed: int = 0) -> None:
        self.window, self.seed, self.bounds = window, seed, cache(self._drawn)
        self.reference = {s: x for s in SIGNALS if len(x := _values(s, reference)) > 1}

    def look(self, records: Sequence[Record]) -> list[Finding]:
        """Of each signal the newest two windows of the records that have its fields. Feedback is
        rarer: a window of it is half of what two windows hold, in hundreds, one at least."""
        found = []
        for signal, reference in self.reference.items():
            (_, fields, effects), size = SIGNALS[signal], self.window
            values = _values(signal, records[0 if FEEDBACK in fields else -RECENT * size :])
            if FEEDBACK in fields:
                told = len(_values(signal, records[-2 * size :]))
                size = max(LABELLED, min(size, told // 2 // LABELLED * LABELLED))
            if len(values) < size or len(records) < self.window:
                found += [Finding(signal, name, len(values)) for name in effects]
                continue
            newest, older = values[-size:], values[-2 * size:-size]
            told_2S = np.array([[STATISTICS[name](reference, window) for name in effects]
                                for window in (newest, older) if len(window) == size])
            bounds_S = self.bounds(signal, size)
            exceeds_2S = told_2S > bounds_S
            columns = effects, told_2S[0], bounds_S, exceeds_2S[0] * exceeds_2S.sum(0)
            for name, value, bound, state in zip(*columns, strict=True):
                p = P_VALUES[name](reference, newest)[1] if name in P_VALUES else None
                found.append(Finding(signal, name, size, float(value), float(bound), int(state), p))
        return found

    def _drawn(self, signal: str, size: int) -> Array:
        """The bounds of a signal's statistics."""
        effects, values = SIGNALS[signal][2], self.reference[signal]
        if values.dtype.kind == "U":  # cost: numbers are compared faster than texts
            _, values = np.unique(values, return_inverse=True)
        random, told = np.random.default_rng((self.seed, size)), []
        if "mmd" in effects:  # cost: all draws at once; what ranks do by chance is known
            sizes, (z_BE, _) = (len(values), size), _both(values, values[:0], most=VECTORS)
            x_PB, y_PB = (random.multinomial(min(n, VECTORS), [1 / len(z_BE)] * len(z_BE),
                                             DRAWS).astype(np.float32) for n in sizes)
            halves = (max(1, min(each, VECTORS // 4) // 2) for each in sizes)
            chance = equal_ranks(*halves).inv_cdf(1 - ALPHA)
            drawn = np.quantile(mmd_of(z_BE, x_PB, y_PB), 1 - ALPHA), chance
            return np.maximum([*effects.values()], drawn)
        for _ in range(DRAWS):
            sides = [values[random.integers(len(values), size=n)] for n in (len(values), size)]
            told.append([STATISTICS[name](*sides) for name in effects])
        drawn_S = np.quantile(told, 1 - ALPHA, axis=0, method="higher")
        return np.maximum(list(effects.values()), drawn_S)

def _values(signal: str, records: Sequence[Record]) -> Array:
    """The fields of records that have all: numbers; for `js` texts; for `mmd` vectors, but once."""
    _, fields, effects = SIGNALS[signal]
    said = [[record.get(field) for record in records] for field in fields]
    if "js" in effects:
        return np.array([value for value in said[0] if isinstance(value, str)])
    if "mmd" in effects:
        told = [x for x in dict.fromkeys(map(str, said[0])) if VECTOR.fullmatch(x)]
        return np.frombuffer(b"".join(map(b64decode, told)), np.int8).reshape(-1, SKETCH)
    x_FB = np.array([[value if isinstance(value, int | float) else math.nan for value in column]
                     for column in said], float)
    x_BF = x_FB.T[np.isfinite(x_FB).all(0)]
    return x_BF if len(fields) > 1 else x_BF[:, 0]
