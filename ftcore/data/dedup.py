"""Rows that say the same twice, and rows of training that give away a held-out one.

Letters: N shingles of texts laid end to end, B texts, P pairs of them, H hash functions.
Texts are compared folded: lower case, every run of white space one blank, digits kept. Two texts
are alike where the Jaccard index J = |a & b| / |a | b| of their sets of shingles is at least 0.8.
A shingle is a run of 5 words; or of 5 letters where one text has fewer than 20 words, and then the
other must have fewer than 25. Candidates come from MinHash, and all are verified:

    signature   the least value that each of 128 hash functions takes on a text's shingles
    candidates  pairs with the same 8 values in a band, and 0.71 of all values equal; a signature
                is cut into 16 bands of neighbours, and again into 16 of every 16th value
    found       more than 0.99 of the pairs at J = 0.8, none below

Texts that share a band meet the first of them, and `WINDOW` neighbours in the order of another
band, so time is linear. cost: 0.4 us a word of prose; 768 bytes a text, all else in cached chunks.
source: Broder 1997, "On the resemblance and containment of documents"; Bawa, Condie and Ganesan
2005, "LSH Forest" (neighbours); Brown et al. 2020, arXiv:2005.14165, appendix C (13 words)."""

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
import numpy as np
from ftcore.errors import DataError

SIMILAR, LIKELY = 0.8, 0.71  # Jaccard index; its estimate, 2.5 standard errors lower
SHINGLE = 5  # words or letters
SHORT, NEARLY_SHORT = 20, 25  # words
BANDS, ROWS = 16, 8
WINDOW = 16  # texts
RUN = 13  # words
SMALL, COMMON = 20, 0.01  # texts, share of all: what more than both have, a template says
CHUNK = 1 << 16  # letters, or values of signatures

def folded(text: str) -> str:
    return " ".join(text.lower().split())

def duplicates(texts: Sequence[str], *, max_share: float = COMMON) -> list[tuple[int, int, float]]:
    """Rows to remove, in order, so that what is left is said once: (row, the one that stays for it,
    their J). Of equal texts the first row stays; of those alike each, as `ranked`, that is still
    there removes all that are like it: no row goes for one that goes. DataError: more than
    `max_share` of the different texts, and more than 20, would go for one."""
    forms = [folded(text) for text in texts]
    rows = _first_rows(forms)
    stays: dict[str, tuple[str, float]] = {}  # of each removed text: what stays for it, J
    for a, b, jaccard in alike(rows):
        if a not in stays and b not in stays:
            stays[b] = a, jaccard
    for kept, count in Counter(kept for kept, _ in stays.values()).most_common(1):
        if count > max(SMALL, max_share * len(rows)):
            like = [repr(form[:80]) for form in stays if stays[form][0] == kept][:2]
            what = f"row {rows[kept]} (from 0) is like {count} other texts, above {max_share:.1%}"
            mend = "stop for review: if only equal texts shall go, say data.duplicates exact"
            raise DataError(f"{what}: {', '.join([repr(kept[:80]), *like])}; {mend}")
    told = ((row, *stays.get(form, (form, 1.0))) for row, form in enumerate(forms))
    return [(row, rows[kept], jaccard) for row, kept, jaccard in told if rows[kept] != row]

def leaks(train: Sequence[str], held: Sequence[str]) -> dict[int, tuple[int, str, str]]:
    """Rows of training that give away a held-out one, in order: (this, "exact", "near" or "13
    words", by what). Each is told once, by the strongest. Of equal texts the first is named."""
    forms = [folded(text) for text in train]
    rows = _first_rows([folded(text) for text in held])
    rows.pop("", None)  # who says nothing gives nothing away
    found = {form: (row, "exact", "Jaccard 1.000") for form, row in rows.items()}
    for a, b, jaccard in sorted(alike({*forms, *rows}, rows), key=lambda pair: -pair[2]):
        shown, form = (a, b) if a in rows else (b, a)
        found.setdefault(form, (rows[shown], "near", f"Jaccard {jaccard:.3f}"))
    for form, shown, words in _runs(ranked({*forms} - found.keys()), ranked(rows)):
        found[form] = rows[shown], "13 words", words
    return {row: found[form] for row, form in enumerate(forms) if form in found}

def alike(forms: Collection[str],
          held: Collection[str] | None = None) -> list[tuple[str, str, float]]:
    """Pairs (a, b, J) of texts (folded, different) that are alike, in the order of `ranked`, as a
    and b are. held: only pairs of which one is among these, the other not."""
    named = [form for form in ranked(forms) if len(form) >= SHINGLE]  # shorter ones have none
    words_B = np.array([form.count(" ") + 1 for form in named], dtype=np.int64)
    side_B = np.array([row if held is None else form in held for row, form in enumerate(named)])
    found = []
    for letters in (False, True):
        rows_B = np.flatnonzero(words_B < NEARLY_SHORT if letters else words_B >= SHORT)
        some = [named[row] for row in rows_B]
        pairs_2P = _candidates(_signatures(some, letters), side_B[rows_B])
        pairs_2P = pairs_2P[:, (words_B[rows_B[pairs_2P]].min(0) < SHORT) == letters]
        told = zip(*rows_B[pairs_2P].tolist(), _jaccard(some, pairs_2P, letters), strict=True)
        found += [pair for pair in told if pair[2] >= SIMILAR]
    return [(named[a], named[b], jaccard) for a, b, jaccard in sorted(found)]

def _first_rows(forms: Sequence[str]) -> dict[str, int]:
    return {form: row for row, form in reversed(list(enumerate(forms)))}

def ranked(forms: Collection[str]) -> list[str]:
    """Longest first: an order that is not the rows'."""
    return sorted(forms, key=lambda form: (-len(form), form))

def _signatures(texts: Sequence[str], letters: bool) -> np.ndarray:
    factors_H = _odd(BANDS * ROWS).astype(np.uint32)
    signature_BH = np.empty((len(texts), len(factors_H)), dtype=np.uint32)
    for part in _chunks([len(text) for text in texts]):
        grams_N, counts_B = _grams(texts[part], SHINGLE, letters)
        grams_N, starts_B = (grams_N >> np.uint64(32)).astype(np.uint32), _starts(counts_B)
        for h, factor in enumerate(factors_H):
            signature_BH[part, h] = np.minimum.reduceat(grams_N * factor, starts_B)
    return signature_BH

def _candidates(signature_BH: np.ndarray, side_B: np.ndarray) -> np.ndarray:
    """Pairs (2, P) of different sides in one bucket, whose estimated J is not far under 0.8."""
    B, H = signature_BH.shape
    bands = [slice(first, first + ROWS) for first in range(0, H, ROWS)]
    bands += [slice(first, None, BANDS) for first in range(BANDS)]
    keys_AB = [(signature_BH[:, band] * _odd(ROWS)).sum(1) for band in bands]
    found_P = np.empty(0, dtype=np.int64)  # a B + b

    def likely(a_P: np.ndarray, b_P: np.ndarray) -> Iterator[np.ndarray]:
        for part in _chunks(np.full(len(a_P), H)):
            a, b = np.minimum(a_P[part], b_P[part]), np.maximum(a_P[part], b_P[part])
            kept = (signature_BH[a] == signature_BH[b]).sum(1) >= LIKELY * H
            kept &= side_B[a] != side_B[b]
            yield a[kept] * B + b[kept]

    for band, key_B in enumerate(keys_AB):
        _, first, bucket_B, count = np.unique(key_B, True, True, True)
        shared = np.flatnonzero(count[bucket_B] > 1)
        pairs = [found_P, *likely(first[bucket_B[shared]], shared)]
        order = shared[np.lexsort((keys_AB[band - 1][shared], key_B[shared]))]
        key = key_B[order]
        for gap in range(1, WINDOW + 1):
            is_same = key[:-gap] == key[gap:]
            pairs += likely(order[:-gap][is_same], order[gap:][is_same])
        found_P = np.sort(np.concatenate(pairs))  # cost: np.unique would hash them, slower by far
        found_P = found_P[np.diff(found_P, prepend=-1) > 0]
    return np.stack(np.divmod(found_P, max(B, 1)))

def _jaccard(texts: Sequence[str], pairs_2P: np.ndarray, letters: bool) -> list[float]:
    length_B, jaccard = np.array([len(text) for text in texts], dtype=np.int64), []
    for part in _chunks(length_B[pairs_2P].sum(0)):
        rows, index_2P = np.unique(pairs_2P[:, part], return_inverse=True)
        grams_N, counts_B = _grams([texts[row] for row in rows], SHINGLE, letters)
        sets = [{*grams.tolist()} for grams in np.split(grams_N, _starts(counts_B)[1:])]
        for a, b in index_2P.T.tolist():
            shared = len(sets[a] & sets[b])
            jaccard.append(shared / (len(sets[a]) + len(sets[b]) - shared))
    return jaccard

def _runs(train: Sequence[str], held: Sequence[str]) -> Iterator[tuple[str, str, str]]:
    """Texts of `train`, the first of `held` that has their first common run of words, the run; not
    runs of a template, which more than SMALL texts and a share of COMMON of them have."""
    train, held = ([form for form in some if form.count(" ") >= RUN - 1] for some in (train, held))
    if not train or not held:
        return
    parts = [_grams(held[part], RUN, False) for part in _chunks([len(form) for form in held])]
    known_N, first_N = np.unique(np.concatenate([grams for grams, _ in parts]), return_index=True)
    starts_B = _starts(np.concatenate([counts for _, counts in parts]))
    found: list[np.ndarray] = []  # text, the run: (2, hits)
    for part in _chunks([len(form) for form in train]):
        grams_N, counts_B = _grams(train[part], RUN, False)
        known_at_N = np.minimum(np.searchsorted(known_N, grams_N), len(known_N) - 1)
        text_N = np.repeat(np.arange(part.start, part.stop), counts_B)
        found.append(np.stack([text_N, known_at_N])[:, known_N[known_at_N] == grams_N])
    found_2M = np.concatenate(found, axis=1)
    num_texts_N = np.bincount(np.unique(found_2M, axis=1)[1], minlength=len(known_N))
    text_M, run_M = found_2M[:, (num_texts_N <= max(SMALL, COMMON * len(train)))[found_2M[1]]]
    texts, firsts = np.unique(text_M, return_index=True)
    for text, first in zip(texts, first_N[run_M[firsts]], strict=True):
        twin = np.searchsorted(starts_B, first, "right") - 1
        words = held[twin].split(" ")[first - starts_B[twin] :][:RUN]
        yield train[text], held[twin], " ".join(words)

def _grams(texts: Sequence[str], size: int, letters: bool) -> tuple[np.ndarray, np.ndarray]:
    """Hashes (N, uint64) of runs of `size` letters or words, and how many (B) each text has."""
    joined = "".join(texts) if letters else " ".join([*texts, ""])  # every word ends in a blank
    codes_N = np.frombuffer(joined.encode("utf-32-le", "surrogatepass"), "<u4").astype(np.uint64)
    if letters:
        units_N, counts_B = _mixed(codes_N), list(map(len, texts))
    else:
        sizes = np.diff(np.flatnonzero(codes_N == ord(" ")), prepend=-1)
        place_N = np.arange(len(codes_N)) - np.repeat(_starts(sizes), sizes)
        codes_N |= place_N.astype(np.uint64) << np.uint64(32)
        units_N = np.add.reduceat(_mixed(codes_N), _starts(sizes))
        counts_B = [text.count(" ") + 1 for text in texts]
    num_runs = len(units_N) - size + 1
    grams_N = sum(units_N[i : i + num_runs] * factor for i, factor in enumerate(_odd(size)))
    text_N = np.repeat(np.arange(len(texts)), counts_B)
    return grams_N[text_N[:num_runs] == text_N[size - 1 :]], np.array(counts_B) - size + 1

def _mixed(x_N: np.ndarray) -> np.ndarray:
    """A permutation of uint64 that looks random. source: splitmix64, Steele et al. 2014."""
    x_N = (x_N ^ (x_N >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x_N = (x_N ^ (x_N >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x_N ^ (x_N >> np.uint64(31))

def _odd(count: int) -> np.ndarray:
    return _mixed(np.arange(1, count + 1, dtype=np.uint64)) | np.uint64(1)

def _starts(counts: np.ndarray) -> np.ndarray:
    return np.cumsum(counts) - counts

def _chunks(sizes: Sequence[int] | np.ndarray) -> Iterator[slice]:
    """Slices of items that begin within CHUNK of each other, laid end to end."""
    starts = _starts(np.asarray(sizes, dtype=np.int64))
    firsts = np.flatnonzero(np.diff(starts // CHUNK, prepend=-1))
    yield from map(slice, firsts, [*firsts[1:], len(starts)])
