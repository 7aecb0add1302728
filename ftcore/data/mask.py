"""Masked-language modelling: plain text in pieces, and which of their tokens a step hides.

Of a piece's own tokens, not the special ones, a share is to be predicted, at least one. Most of
these become the mask token, some a random one, and the rest stay: later texts hold no masks.
source: Devlin et al. 2019, arXiv:1810.04805, section 3.1
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from ftcore.config import OverLength
from ftcore.data.columns import Text, require_some
from ftcore.data.encode import Split, admit, numbered, pieces
from ftcore.data.pack import Encoded
from ftcore.data.tokenizer import Tokenizer
from ftcore.errors import ModelError

SHARE = 0.15  # of a piece's own tokens
MASKED, RANDOM = 0.8, 0.1  # of these

def encode_pieces(
    texts: Sequence[Text], tokenizer: Tokenizer, *, max_length: int,
    over_length: OverLength = "split",
) -> Split:  # fmt: skip
    """Texts as documents of at most `max_length` tokens, the special ones around each; labels are
    the tokens themselves, and those that may be hidden have weight 1. See `admit` for longer ones.
    Raises DataError: no text can be used, or no room is left beside the special tokens."""
    split, special = Split(), list(tokenizer.special_ids)
    encodings = tokenizer.encode_batch([text.text for text in texts])
    for text, encoding in zip(texts, encodings, strict=True):
        weights_T = (~np.isin(encoding.ids_T, special)).astype(np.float32)
        whole = Encoded(text.id, encoding.ids_T, encoding.ids_T, weights_T)
        # numbered, as what is hidden depends on the row id
        admit(split, text, whole, lambda *args, e=encoding: numbered(pieces(*args, encoding=e)),
              max_length=max_length, over_length=over_length)  # fmt: skip
    require_some(split.documents, split.rejected)
    return split

@dataclass(frozen=True)
class Masking:
    """What a step makes of a document: a pure function of (seed, step, row id)."""
    mask_id: int  # what stands for a hidden token
    ordinary: np.ndarray  # ids (int32) that may stand there instead
    seed: int

    @classmethod
    def of(cls, tokenizer: Tokenizer, seed: int) -> "Masking":
        """The masking of a tokenizer's ids; ModelError if it has no mask token."""
        if "mask_token" not in tokenizer.special:
            mend = "name an encoder whose tokenizer_config.json has a mask_token"
            raise ModelError(f"{tokenizer.where}: the tokenizer has no mask token; {mend}")
        ids = np.arange(tokenizer.vocab_size, dtype=np.int32)
        ordinary = ids[~np.isin(ids, list(tokenizer.special_ids))]
        return cls(tokenizer.id_of(tokenizer.special["mask_token"]), ordinary, seed)

    def __call__(self, document: Encoded, step: int) -> Encoded:
        """The document with some tokens hidden; these alone keep their weight."""
        random = np.random.default_rng([self.seed, step, *document.row_id.encode()])
        own_T = np.flatnonzero(document.weights)
        hidden_M = random.permutation(own_T)[: max(1, round(SHARE * len(own_T)))]
        chance_M = random.random(len(hidden_M))
        tokens_T, weights_T = document.tokens_T.copy(), np.zeros_like(document.weights)
        tokens_T[hidden_M[chance_M < MASKED]] = self.mask_id
        swapped = hidden_M[(chance_M >= MASKED) & (chance_M < MASKED + RANDOM)]
        tokens_T[swapped] = random.choice(self.ordinary, len(swapped))
        weights_T[hidden_M] = 1.0
        return replace(document, tokens_T=tokens_T, weights=weights_T)
