"""Tagged sentences to `Encoded` documents: the first token of each word is supervised.

Letters: W words of a sentence, T tokens of its document.
"""

from bisect import bisect_right
from collections.abc import Sequence
from functools import partial

import numpy as np

from ftcore.config import OverLength
from ftcore.data.columns import Labels, Tagged, indices, left_out, require_some
from ftcore.data.encode import Sentence, Split, admit, pieces
from ftcore.data.pack import Encoded
from ftcore.data.supervise import IGNORED
from ftcore.data.tokenizer import Encoding, Tokenizer


def encode_tagged(
    sentences: Sequence[Tagged], tokenizer: Tokenizer, labels: Labels, *,
    max_length: int | None = None, over_length: OverLength = "error",
) -> Split:  # fmt: skip
    """Sentences, the first token of each word supervised: labels[t] is the tag of token t itself.

    The words are joined by blanks and read like any text. A word without a token of its own, or
    that is cut off, stays in its sentence, where it counts as predicted "O". See `admit` for
    `over_length`; the documents of a sentence that is split have its row id.
    """
    split = Split()
    encodings = tokenizer.encode_batch([" ".join(source.words) for source in sentences])
    for source, encoding in zip(sentences, encodings, strict=True):
        places_W = first_tokens(source.words, encoding)
        for word in np.array(source.words, dtype=object)[places_W < 0]:
            split.untold.append(left_out(source, f"the word {word!r} gives no token"))
        told_W = np.flatnonzero(places_W >= 0)
        labels_T = np.full(len(encoding), IGNORED, dtype=np.int32)
        labels_T[places_W[told_W]] = np.array(indices(labels, source))[told_W]
        weights_T = (labels_T != IGNORED).astype(np.float32)
        document = Encoded(source.id, encoding.ids_T, labels_T, weights_T)
        shorten = partial(pieces, encoding=encoding)
        before = len(split.documents)
        if admit(split, source, document, shorten, max_length=max_length, over_length=over_length):
            found = np.flatnonzero(np.concatenate([d.weights for d in split.documents[before:]]))
            first = len(told_W) - len(found) if over_length == "cut_left" else 0
            places_W[:] = -1
            places_W[told_W[first : first + len(found)]] = found
            split.sentences.append(Sentence(source.id, source.words, source.names, places_W))
    require_some(split.documents, split.rejected)
    return split


def first_tokens(words: Sequence[str], encoding: Encoding) -> np.ndarray:
    """places_W of words joined by blanks: the first token that holds a character of the word and
    is not an earlier word's; -1 where there is none."""
    own_T = np.flatnonzero(encoding.offsets_T2[:, 1])  # not the special ones around them: (0, 0)
    starts, ends = encoding.offsets_T2[own_T].T.tolist()  # both in order
    places, free, start = [], 0, 0
    for word in words:
        place = bisect_right(ends, start, lo=free)
        is_own = place < len(ends) and starts[place] < start + len(word)
        places.append(own_T[place] if is_own else -1)
        free, start = place + 1 if is_own else free, start + len(word) + 1
    return np.array(places)
