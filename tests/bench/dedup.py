"""Duplicates among the paragraphs of 14 novels: ours against the package datasketch.

    python -m tests.bench.dedup

Both sides get the same paragraphs, split on blank lines, and do the same work: fold them, leave out
equal ones, take the shingles of ftcore.data.dedup, MinHash with 128 functions in 16 bands of 8,
verify every candidate by its true Jaccard index, and name a twin for each row to remove. Each turn
is a fresh process on one core; reading the files is not timed. Recall is told of all pairs that
have a Jaccard index of at least 0.8, found without MinHash by a prefix filter (Chaudhuri et al.
2006: two such sets share one of the rarest fifth of their members).

The last line is JSON.
"""

import argparse
import gzip
import json
import math
import os
import re
import resource
import statistics
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any
from ftcore.data.dedup import NEARLY_SHORT, SHINGLE, SHORT, SIMILAR, alike, duplicates, folded

BAR = 5.0
PEAK_MIB = 1024
Pairs = set[tuple[str, str]]

def paragraphs(folder: Path) -> list[str]:
    """Of every book, in its own encoding."""
    found = []
    for path in sorted(folder.glob("*.txt.gz")):
        content = gzip.decompress(path.read_bytes())
        text = content.decode("latin1" if path.name.endswith("-8.txt.gz") else "utf-8-sig")
        found += [part for part in re.split(r"\r?\n\s*\r?\n", text) if part.strip()]
    return found

def shingled(forms: Iterable[str]) -> Iterator[tuple[bool, dict[str, list[str]]]]:
    """Texts that are compared by words, then those by letters, each with its shingles."""
    by_words, by_letters = {}, {}
    for form in forms:
        words = form.split(" ")
        if len(words) >= SHORT:
            runs = range(len(words) - SHINGLE + 1)
            by_words[form] = [" ".join(words[i : i + SHINGLE]) for i in runs]
        if len(words) < NEARLY_SHORT and len(form) >= SHINGLE:
            by_letters[form] = [form[i : i + SHINGLE] for i in range(len(form) - SHINGLE + 1)]
    yield False, by_words
    yield True, by_letters

def verified(pairs: Iterable[tuple[str, str]], shingles: dict[str, Any], letters: bool) -> Pairs:
    """Those that are alike."""
    found = set()
    for pair in pairs:
        a, b = (set(shingles[form]) for form in pair)
        short = min(form.count(" ") + 1 for form in pair) < SHORT
        if short == letters and (shared := len(a & b)) / (len(a) + len(b) - shared) >= SIMILAR:
            found.add(tuple(sorted(pair, key=lambda form: (-len(form), form))))
    return found

def every_pair(forms: Iterable[str]) -> Pairs:
    """All that are alike, by a prefix filter."""
    found: Pairs = set()
    for letters, shingles in shingled(forms):
        sets = {form: set(listed) for form, listed in shingles.items()}
        count = Counter(shingle for members in sets.values() for shingle in members)
        seen, pairs = defaultdict(list), set()
        for form, members in sets.items():
            rare = sorted(members, key=lambda shingle: (count[shingle], shingle))
            for shingle in rare[: len(rare) - math.ceil(SIMILAR * len(rare)) + 1]:
                for other in seen[shingle]:
                    if SIMILAR <= len(members) / len(sets[other]) <= 1 / SIMILAR:
                        pairs.add((form, other))
                seen[shingle].append(form)
        found |= verified(pairs, sets, letters)
    return found

def datasketch_pairs(forms: Iterable[str]) -> Pairs:
    """What the package finds, by its batch interface and its fastest hash functions."""
    from datasketch import MinHash, MinHashLSH

    found: Pairs = set()
    for letters, shingles in shingled(forms):
        encoded = ([shingle.encode() for shingle in listed] for listed in shingles.values())
        sketches = MinHash.bulk(encoded, num_perm=128, seed=1, scheme="affine32")
        index = MinHashLSH(num_perm=128, params=(16, 8))
        with index.insertion_session() as session:
            for form, sketch in zip(shingles, sketches, strict=True):
                session.insert(form, sketch, check_duplication=False)
        pairs = {
            (min(form, other), max(form, other))
            for form, sketch in zip(shingles, sketches, strict=True)
            for other in index.query(sketch)
            if other != form
        }
        found |= verified(pairs, shingles, letters)
    return found

def datasketch_duplicates(texts: Sequence[str]) -> set[str]:
    """Folded texts that have to go, for equal ones or for a star's middle."""
    gone: set[str] = set()
    for kept, other in sorted(datasketch_pairs({folded(text): None for text in texts})):
        if kept not in gone:
            gone.add(other)
    return gone

def our_pairs(forms: Iterable[str]) -> Pairs:
    return {(a, b) for a, b, _ in alike([*forms])}

SIDES = {"ours": (duplicates, our_pairs), "theirs": (datasketch_duplicates, datasketch_pairs)}

def serve(side: str, folder: Path, recall: bool) -> dict[str, float]:
    """Be one side, once."""
    texts = paragraphs(folder)
    remove, pairs = SIDES[side]
    started = time.perf_counter()
    remove(texts)
    seconds = time.perf_counter() - started
    peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    told = {"seconds": seconds, "peak_mib": peak_mib, "rows": len(texts)}
    if recall:
        forms = {folded(text): None for text in texts}
        every, found = every_pair(forms), pairs(forms)
        told |= {"pairs": len(every), "found": len(found & every), "wrong": len(found - every)}
    return told

def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.dedup")
    default = Path(os.environ.get("FTCORE_DATA", "data")) / "gutenberg"
    parser.add_argument("--folder", type=Path, default=default, help="of *.txt.gz")
    parser.add_argument("--repeats", type=int, default=3, help="processes of each side")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--recall", action="store_true", help=argparse.SUPPRESS)
    said = parser.parse_args()
    if said.side:
        print(json.dumps(serve(said.side, said.folder, said.recall)))
        return
    turns: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    for turn in range(said.repeats):
        for side in SIDES:
            words = ["--side", side, "--folder", str(said.folder)]
            words += ["--recall"] if turn == said.repeats - 1 else []
            command = [sys.executable, "-m", "tests.bench.dedup", *words]
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            done = subprocess.run(command, stdout=subprocess.PIPE, env=environment, check=True)
            turns[side].append(json.loads(done.stdout))
    told: dict[str, Any] = {}
    for side, rows in turns.items():
        s = told[side] = rows[-1] | {
            "seconds": statistics.median(row["seconds"] for row in rows),
            "peak_mib": max(row["peak_mib"] for row in rows),
            "recall": rows[-1]["found"] / rows[-1]["pairs"],
        }
        print(
            f"{side:7}{s['seconds']:6.2f} s {s['peak_mib']:5.0f} MiB  found {s['found']} of"
            f" {s['pairs']} pairs, {s['wrong']} wrong, in {s['rows']} paragraphs"
        )
    value = told["theirs"]["seconds"] / told["ours"]["seconds"]
    told["speed"] = {"value": value, "bar": BAR, "met": value >= BAR}
    told["peak"] = {"met": told["ours"]["peak_mib"] <= PEAK_MIB, "bar_mib": PEAK_MIB}
    print(f"ours is {value:.1f} times as fast (bar {BAR})")
    print(json.dumps({"dedup": told}))

if __name__ == "__main__":
    main()
