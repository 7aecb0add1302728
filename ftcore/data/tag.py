"""Tagged sentences to `Encoded` documents: the first token of each word is supervised.

Letters: W words of a sentence, T tokens of its document.
"""

from collections.abc import Sequence

import numpy as np

from ftcore.config import OverLength
from ftcore.data.columns import LabelMap, Tagged, left_out, require_some
from ftcore.data.encode import Sentence, Split, admit, pieces, take
from ftcore.data.pack import Encoded
from ftcore.data.supervise import IGNORED
from ftcore.data.tokenizer import Encoding, Tokenizer


def encode_tagged(
    sentences: Sequence[Tagged],
    tokenizer: Tokenizer,
    labels: LabelMap,
    *,
    max_length: int | None = None,
    over_length: OverLength = "error",
) -> Split:
    """Sentences, the first token of each word supervised: labels[t] is the tag of token t itself.

    The words are joined by blanks and read like any text. A word without a token of its own stays
    in its sentence, where it counts as predicted "O"; see `encode_chats` for `over_length`.
    """
    split = Split()
    encodings = tokenizer.encode_batch([" ".join(source.words) for source in sentences])
    for source, encoding in zip(sentences, encodings, strict=True):
        places_W = first_tokens(source.words, encoding)
        for word in np.array(source.words, dtype=object)[places_W < 0]:
            split.untold.append(left_out(source, f"the word {word!r} gives no token"))
        if places_W.max() < 0:
            split.rejected.append(left_out(source, "no word gives a token"))
            continue
        labels_T = np.full(len(encoding), IGNORED, dtype=np.int32)
        labels_T[places_W[places_W >= 0]] = np.array(labels.indices(source))[places_W >= 0]
        weights_T = (labels_T != IGNORED).astype(np.float32)
        document = Encoded(source.id, encoding.ids_T, labels_T, weights_T)
        kept_T = pieces(encoding, max_length or len(encoding))[0]
        places_W = np.where(np.isin(places_W, kept_T), places_W, -1)
        admit(split, source, document, take(document, kept_T), over_length=over_length)
        if len(split.documents) > len(split.sentences):  # it was admitted
            split.sentences.append(Sentence(source.words, source.names, places_W))
    require_some(split.documents, split.rejected)
    return split


def first_tokens(words: Sequence[str], encoding: Encoding) -> np.ndarray:
    """places_W of words joined by blanks: the first token that holds a character of the word and
    is not an earlier word's; -1 where there is none."""
    starts_T, ends_T = encoding.offsets_T2.T
    places, free, start = [], 0, 0
    for word in words:
        found = np.flatnonzero((starts_T < start + len(word)) & (ends_T > start))
        found = found[found >= free]
        places.append(int(found[0]) if len(found) else -1)
        free = max(free, places[-1] + 1)
        start += len(word) + 1
    return np.array(places)
