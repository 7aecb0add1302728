"""How much of a reference text a generated one repeats: F1 of tokens, ROUGE-L, BLEU and chrF.

token_f1 and rouge_l are figures of one row, 0 ... 1; that of a corpus is their mean. BLEU and chrF,
0 ... 100, are figures of a corpus: the S counts of its rows, int64, are added and the figure read
from the sum, so any split into batches or ranks gives the same, and a resample is a sum too.

Of the n-grams of order n, m_n match (each as often as it stands in both texts), p_n are in the
predicted text and t_n in the target:

    BLEU = 100 min(1, exp(1 - t_1 / p_1)) (product over n = 1 ... 4 of m_n / p_n)^(1/4)    words
    chrF = 100 * 5 P R / (4 P + R), P and R the means of m_n / p_n and m_n / t_n    characters
"""

import math
import re
import string
from collections import Counter
from collections.abc import Sequence

import numpy as np

from ftcore.errors import DataError
from ftcore.evaluate.significance import Figures
from ftcore.evaluate.text import exact_match, parse_object

BLEU_SIGNATURE = "nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:ftcore-0.1.0"
CHRF_SIGNATURE = "nrefs:1|case:mixed|eff:yes|nc:6|nw:0|space:no|version:ftcore-0.1.0"
PUNCTUATION = str.maketrans("", "", string.punctuation)
# NIST's mteval-v13a.pl, applied in this order. A match takes its neighbour along, so that
# the second dot of "a..5" stays with the 5.
RULES_13A = {
    "<skipped>": "", "-\n": "", "\n": " ", "&quot;": '"', "&amp;": "&", "&lt;": "<", "&gt;": ">",
    r"([!-&(-+/:-@[-`{-~])": r" \1 ",  # ASCII punctuation but ' , - .
    r"([^0-9])([.,])": r"\1 \2 ", r"([.,])([^0-9])": r" \1 \2",  # 3.5 and 1,000 stay whole
    r"([0-9])-": r"\1 - ",
}  # fmt: skip

def token_f1(target: str, predicted: str) -> float:
    """2 common / (sum of both lengths) of tokens: lower case, ASCII punctuation and the articles
    a, an, the dropped, split at white space. 1 where both texts have none, 0 where one has.
    source: Rajpurkar et al. 2016, arXiv:1606.05250; 2018, arXiv:1806.03822 (no tokens left)"""
    bare = (text.lower().translate(PUNCTUATION) for text in (target, predicted))
    wanted, given = (Counter(re.sub(r"\b(a|an|the)\b", " ", text).split()) for text in bare)
    length = wanted.total() + given.total()
    return 2 * (wanted & given).total() / length if length else 1.0

def rouge_l(target: str, predicted: str) -> float:
    """2 L / (sum of both lengths), L that of the longest common subsequence of tokens: runs of a-z
    and 0-9 in the lower-cased text, not stemmed. 0 where either text has none.
    source: Lin 2004, ACL W04-1013. cost: p_1 operations on t_1 bits
    source: Hyyro 2004, Bit-parallel LCS-length computation revisited (L)"""
    wanted, given = (re.findall("[a-z0-9]+", text.lower()) for text in (target, predicted))
    places = dict.fromkeys(wanted, 0)
    for i, token in enumerate(wanted):
        places[token] |= 1 << i
    all_bits = free = (1 << len(wanted)) - 1
    for token in given:  # L of wanted[:i] and the tokens so far: zeros in the low i bits of free
        hits = free & places.get(token, 0)
        free = (free + hits | free - hits) & all_bits
    return 2 * (all_bits ^ free).bit_count() / max(len(wanted) + len(given), 1)

def bleu_counts(target: str, predicted: str) -> np.ndarray:
    """m_1 ... m_4, p_1 ... p_4, and the lengths p_1 and t_1: S = 10."""
    counts_34 = _ngram_counts(_words(target), _words(predicted), 4)
    return np.concatenate([counts_34[:2].reshape(-1), counts_34[1:, 0]])

def bleu(counts_S: np.ndarray) -> float:
    """BLEU of a sum of `bleu_counts`. The i-th order without a match counts as 2^-i of one; 0 where
    no word matches, or no predicted text has four words.
    source: Papineni et al. 2002, ACL P02-1040; Chen and Cherry 2014, ACL W14-3346, method 3"""
    matches_4, predicted_4, (length, target_length) = _parts(counts_S, 4, 4, 2)
    if not matches_4[0] or not predicted_4[3]:
        return 0.0
    missed_4 = matches_4 == 0
    precision_4 = np.where(missed_4, 0.5 ** missed_4.cumsum(), matches_4) / predicted_4
    return 100 * math.exp(min(0, 1 - target_length / length) + np.log(precision_4).mean())

def chrf_counts(target: str, predicted: str) -> np.ndarray:
    """m_1 ... m_6, p_1 ... p_6, t_1 ... t_6 of characters, white space left out: S = 18. p_n is 0
    in a row whose t_n is."""
    counts_36 = _ngram_counts("".join(target.split()), "".join(predicted.split()), 6)
    counts_36[1] *= counts_36[2] > 0
    return counts_36.reshape(-1)

def chrf(counts_S: np.ndarray) -> float:
    """chrF of a sum of `chrf_counts`: beta 2, means over the n with p_n and t_n above 0; 0 where
    nothing matches. source: Popovic 2015, ACL W15-3049"""
    matches_6, predicted_6, target_6 = _parts(counts_S, 6, 6, 6)
    both_6 = (predicted_6 > 0) & (target_6 > 0)
    p, r = (float((matches_6[both_6] / x_6[both_6]).sum()) for x_6 in (predicted_6, target_6))
    return 100 * 5 * p * r / (4 * p + r) / both_6.sum() if p else 0.0

def _words(text: str) -> tuple[str, ...]:
    text = f" {text.rstrip()} "
    for pattern, new in RULES_13A.items():
        text = re.sub(pattern, new, text)
    return tuple(text.split())

def _ngram_counts(target: Sequence[str], predicted: Sequence[str], order: int) -> np.ndarray:
    """int64 (3, order): m_n, p_n and t_n."""
    counts, texts = [], (predicted, target)
    for n in range(1, order + 1):
        given, wanted = (Counter(x[i : i + n] for i in range(len(x) - n + 1)) for x in texts)
        counts.append([(given & wanted).total(), given.total(), wanted.total()])
    return np.array(counts, dtype=np.int64).T

def _parts(counts_S: np.ndarray, *sizes: int) -> list[np.ndarray]:
    if counts_S.shape != (sum(sizes),):
        what = f"counts of shape {counts_S.shape}: must be ({sum(sizes)},)"
        raise DataError(f"{what}, the counts of the rows added up")
    return np.split(counts_S, np.cumsum(sizes)[:-1])

def text_figures(targets: Sequence[str], predicted: Sequence[str]) -> Figures:
    """Of free text: means of exact_match, json_valid, token_f1 and rouge_l; bleu and chrf."""
    pairs = list(zip(targets, predicted, strict=True))
    each = (exact_match, lambda _, said: parse_object(said) is not None, token_f1, rouge_l)
    means_BS = np.array([[float(measure(*pair)) for measure in each] for pair in pairs])
    counts = ([count(*pair) for pair in pairs] for count in (bleu_counts, chrf_counts))
    bleu_BS, chrf_BS = map(np.stack, counts)

    def figures(rows_M: np.ndarray) -> dict[str, float]:
        names = ("exact_match", "json_valid", "token_f1", "rouge_l")
        found = dict(zip(names, means_BS[rows_M].mean(0).tolist(), strict=True))
        sums = bleu(bleu_BS[rows_M].sum(0)), chrf(chrf_BS[rows_M].sum(0))
        return found | {"bleu": sums[0], "chrf": sums[1]}

    return figures
