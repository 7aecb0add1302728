"""False alarms without a shift, at windows of many sizes, and how small a shift is found.

    python -m tests.bench.drift [--pairs 250] [--reference 2000]
    python -m tests.bench.drift --rival        beside the defaults of Evidently and NannyML, on the
                                               same windows; needs evidently 0.7, nannyml 0.13, and
                                               pandas below 3

A calibrated classifier of four classes is simulated: lengths, unknown tokens, labels, confidence,
entropy, vectors that hold the logits beside noise, and feedback for a tenth. Vectors are compared
with Evidently's classifier and MMD, on fewer windows. A column of each alarms at its own threshold,
and at that which one null window in a hundred exceeds. The last line is JSON."""

import argparse
import json
import os
import time
from base64 import b64decode
import numpy as np
import torch
from ftcore.deploy.answers import Record
from ftcore.model.heads import sketched
from ftcore.monitor.drift import Watch

SIZES = (500, 2_000, 10_000, 50_000)
SHIFTS = {"lengths +20 %": {"longer": 0.2}, "lengths +35 %": {"longer": 0.3},
          "unknown +5 points": {"unknown": 0.05}, "less sure": {"sharpness": 2.0},
          "labels flipped 10 %": {"flipped": 0.1}, "labels flipped 20 %": {"flipped": 0.2},
          "a fifth about other things": {"other": 0.2}}
WIDTH = 32  # of the vectors that the model makes

def records(count: int, random: np.random.Generator, *, longer: float = 0, sharpness: float = 2.5,
            unknown: float = 0, flipped: float = 0, other: float = 0,
            feedback: float = 0.1) -> list[Record]:
    logits_BK = sharpness * random.normal(size=(count, 4))
    p_BK = np.exp(logits_BK - logits_BK.max(1, keepdims=True))
    p_BK /= p_BK.sum(1, keepdims=True)
    right_B = (random.random(count) < p_BK.max(1)) & (random.random(count) >= flipped)
    columns = {"prompt_tokens": random.lognormal(3 + longer, 0.6, count).astype(int).tolist(),
               "unknown": (0.1 * random.beta(1, 9, count) + unknown).tolist(),
               "label": [f"class {k}" for k in p_BK.argmax(1)],
               "confidence": p_BK.max(1).tolist(),
               "entropy": (-(p_BK * np.log(p_BK)).sum(1)).tolist()}
    x_BC = np.concatenate([logits_BK, random.normal(size=(count, WIDTH - 4))], 1)
    x_BC[:, -1] += 5 * (random.random(count) < other)
    columns["embedding"] = sketched(torch.from_numpy(x_BC))
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    for row, is_right, is_told in zip(rows, right_B.tolist(), random.random(count), strict=True):
        row |= {"right": is_right} if is_told < feedback else {}
    return rows

RIVAL_SHIFTS = {"lengths +10 %": {"longer": 0.1}, "lengths +20 %": {"longer": 0.2},
                "unknown +1 point": {"unknown": 0.01}, "logits 2.5 to 2.2": {"sharpness": 2.2},
                "logits 2.5 to 2.0": {"sharpness": 2.0}}
VECTOR_SHIFTS = {"5 % about other things": {"other": 0.05},
                 "10 % about other things": {"other": 0.1}}

REFERENCES, NULLS, SHIFTED = 20, 2000, 400  # of the windows without a shift, and with each

def beside_rivals(size: int = 500, count: int = 2000) -> None:
    """Shares of single windows in which a column alarms: [ours, Evidently's, NannyML's]."""
    os.environ["NML_DISABLE_USAGE_LOGGING"] = "1"  # nannyml would report to its makers
    import pandas
    from evidently.legacy.calculations.stattests import get_stattest
    from evidently.legacy.core import ColumnType
    from nannyml.drift.univariate import UnivariateDriftCalculator

    kinds = dict.fromkeys(("prompt_tokens", "unknown", "entropy", "confidence"),
                          ColumnType.Numerical) | {"label": ColumnType.Categorical}
    random = np.random.default_rng(0)
    references = [records(count, random, feedback=0) for _ in range(REFERENCES)]
    watches = [Watch(reference, window=size) for reference in references]
    frames = [pandas.DataFrame(reference)[[*kinds]] for reference in references]
    calculators = [UnivariateDriftCalculator([*kinds], chunk_size=size).fit(x) for x in frames]

    def ratios(number: int, **shift: float) -> dict[str, list[float]]:
        """How many times its threshold each column's statistic is."""
        rows, place = records(size, random, feedback=0, **shift), number % REFERENCES
        frame = pandas.DataFrame(rows)
        theirs = calculators[place].calculate(frame[[*kinds]]).filter(period="analysis").to_df()
        told: dict[str, list[float]] = {}
        for finding in watches[place].look(rows):
            told.setdefault(finding.signal, []).append(finding.value / finding.bound)
        for field, kind in kinds.items():
            one, two = frames[place][field], frame[field]
            test = get_stattest(one, two, kind, None)
            score, *_ = test.func(one, two, kind, test.default_threshold)
            distance = theirs[field]["jensen_shannon"].iloc[0]
            told[field] = [max(told[field]), float(score) / test.default_threshold,
                           float(distance["value"] / distance["upper_threshold"])]
        return {field: told[field] for field in kinds}

    null = [ratios(number) for number in range(NULLS)]
    levels = {field: np.quantile([each[field] for each in null], 0.99, axis=0) for field in kinds}

    def shares(found: list[dict[str, list[float]]]) -> dict[str, dict[str, list[float]]]:
        rules = {"own threshold": dict.fromkeys(kinds, 1.0), "equal false alarms": levels}
        return {name: {field: np.mean(np.array([each[field] for each in found]) > rule[field],
                                      axis=0).round(3).tolist() for field in kinds}
                for name, rule in rules.items()}

    told = {"no shift": shares(null)}
    for name, shift in RIVAL_SHIFTS.items():
        told[name] = shares([ratios(number, **shift) for number in range(SHIFTED)])
        print(name, told[name], flush=True)
    print(json.dumps(told | {"vectors": vectors_beside_rival(size, count)}))

def vectors_beside_rival(size: int, count: int, nulls: int = 500, shifted: int = 200) -> dict:
    """Shares of windows in which a method alarms: at its own threshold, at equal false alarms."""
    import pandas
    from evidently.legacy.metrics.data_drift import embedding_drift_methods as methods

    random, names = np.random.default_rng(1), ("mmd", "auroc", "their classifier", "their MMD")
    references = [records(count, random, feedback=0) for _ in range(REFERENCES)]
    watches = [Watch(reference, window=size) for reference in references]

    def frame(rows: list[Record]) -> pandas.DataFrame:
        read = (np.frombuffer(b64decode(row["embedding"]), np.int8) for row in rows)
        return pandas.DataFrame(np.stack([*read]))

    frames = [*map(frame, references)]

    def ratios(number: int, **shift: float) -> list[float]:
        rows, place = records(size, random, feedback=0, **shift), number % REFERENCES
        found = [f for f in watches[place].look(rows) if f.signal == "embedding"]
        now, then = frame(rows), frames[place]
        return [*(finding.value / finding.bound for finding in found),
                float(methods.model()(now, then)[0]) / 0.55, methods.mmd()(now, then)[0] / 0.015]

    null = np.array([ratios(number) for number in range(nulls)])
    found = {"no shift": null} | {
        name: np.array([ratios(number, **shift) for number in range(shifted)])
        for name, shift in VECTOR_SHIFTS.items()}
    level = np.quantile(null, 0.99, axis=0)
    return {name: {method: [round(float((x > bound).mean()), 3) for bound in (1, limit)]
                   for method, x, limit in zip(names, each.T, level, strict=True)}
            for name, each in found.items()}

def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rival", action="store_true")
    parser.add_argument("--pairs", type=int, default=250)
    parser.add_argument("--reference", type=int, default=2000)
    asked, started, told = parser.parse_args(), time.perf_counter(), {"false alarms": {}}
    if asked.rival:
        return beside_rivals()
    for size in SIZES:
        counts, pairs = np.zeros(2, int), max(10, asked.pairs * min(1, 10_000 // size))
        watch = None
        for pair in range(pairs):
            random = np.random.default_rng((size, pair))
            if pair % 25 == 0:  # another reference too: what it lacks is no alarm
                watch = Watch(records(asked.reference, random, feedback=1), window=size)
            states = [f.state or 0 for f in watch.look(records(2 * size, random))]
            counts += [max(states) >= 1, max(states) == 2]
        told["false alarms"][size] = {"pairs": pairs, "one": int(counts[0]), "two": int(counts[1])}
        print(size, told["false alarms"][size], flush=True)
    random = np.random.default_rng(1)
    watch = Watch(records(asked.reference, random, feedback=1), window=500)
    for name, shift in SHIFTS.items():
        found = [{f.signal for f in watch.look(records(1000, random, feedback=0.4, **shift))
                  if f.state == 2} for _ in range(30)]
        told[name] = {signal: sum(signal in each for each in found)
                      for signal in sorted(set().union(*found))}
        print(name, told[name], "of 30", flush=True)
    print(json.dumps({**told, "seconds": round(time.perf_counter() - started, 1)}))

if __name__ == "__main__":
    main()
