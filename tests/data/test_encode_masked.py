"""Masked-language modelling: no token is lost; what is hidden depends on row and masking alone."""

from dataclasses import replace
import numpy as np
import pytest
from ftcore.config import MaskedDataConfig
from ftcore.data.__main__ import text as shown
from ftcore.data.columns import Text
from ftcore.data.encode import HIDDEN, encode
from ftcore.data.tokenizer import Tokenizer
from ftcore.errors import DataError, ModelError

LONG = "The unaffable reader counts his tokens, one by one, and loses none of them. " * 3

@pytest.mark.parametrize("max_length", [3, 7, 20, 1000])
def test_parts_hold_every_token_once(bert: Tokenizer, max_length: int) -> None:
    """Between the special tokens; a hidden one stands in the labels."""
    config = MaskedDataConfig(max_length=max_length)
    split = encode(config, [Text("a", (LONG,)), Text("b", ("x",))], bert)
    alone = bert.encode(LONG).ids_T.tolist()
    parts = [d for d in split.documents if d.row_id[0] == "a"]
    for part in parts:
        assert part.labels[0] == part.tokens_T[0] == alone[0] and part.weights[0] == 0
        assert part.labels[-1] == part.tokens_T[-1] == alone[-1] and part.weights[-1] == 0
        assert set(part.weights) == {0, 1} and part.weights.dtype == np.float32
        same_T = part.labels == part.tokens_T
        assert same_T[part.weights == 0].all()
        assert part.weights.any()
    assert max(map(len, parts)) == min(max_length, len(alone))
    assert sum((part.labels[1:-1].tolist() for part in parts), []) == alone[1:-1]
    assert len({d.row_id for d in split.documents}) == len(split.documents)
    noted = [f"more than {max_length - 2} tokens: split"] if max_length < 1000 else []
    assert not split.rejected and [row.reason for row in split.cut] == noted

@pytest.mark.parametrize("side", ["cut_left", "cut_right"])
def test_one_part_is_kept_of_a_text_that_is_cut(bert: Tokenizer, side: str) -> None:
    alone = bert.encode(LONG).ids_T
    for limit in range(4, len(alone), 5):
        config = MaskedDataConfig(max_length=limit, over_length=side)
        (part,) = encode(config, [Text("a", (LONG,))], bert).documents
        kept = alone[1:-1][2 - limit :] if side == "cut_left" else alone[1:-1][: limit - 2]
        assert part.labels.tolist() == [alone[0], *kept, alone[-1]]

def test_what_is_hidden_depends_on_row_and_masking(bert: Tokenizer) -> None:
    rows = [Text("a", (LONG,)), Text("b", (LONG,))]
    config = MaskedDataConfig(maskings=3)
    made = {d.row_id: d.weights.tolist() for d in encode(config, rows, bert).documents}
    assert [*made] == ["a:0", "a:1", "a:2", "b:0", "b:1", "b:2"]
    assert len(set(map(str, made.values()))) == 6
    for some in (rows[:1], rows[1:], rows[::-1]):
        split = encode(replace(config, maskings=2), some, bert)
        assert all(d.weights.tolist() == made[d.row_id] for d in split.documents)

def test_shares(bert: Tokenizer) -> None:
    """Of the hidden tokens eight in ten are the mask, one is any ordinary one, one as it was."""
    split = encode(MaskedDataConfig(maskings=1500), [Text("a", (LONG,))], bert)
    scored_DT = np.stack([d.weights for d in split.documents]) > 0
    tokens_DT, labels_DT = (np.stack([getattr(d, name) for d in split.documents])[scored_DT]
                            for name in ("tokens_T", "labels"))
    masked = tokens_DT == bert.id_of("[MASK]")
    assert abs(masked.mean() - 0.8) < 0.01
    assert abs((tokens_DT == labels_DT).mean() - 0.1) < 0.01
    drawn = tokens_DT[~masked & (tokens_DT != labels_DT)]
    assert len({*drawn.tolist()}) > 100  # of the whole vocabulary, not of this text
    hits_T = scored_DT[:, 1:-1].mean(0)
    assert abs(hits_T.mean() - HIDDEN) < 0.005 and hits_T.min() > 0.1 and hits_T.max() < 0.2

def test_what_is_hidden_is_shown_in_its_place(bert: Tokenizer) -> None:
    split = encode(MaskedDataConfig(maskings=40), [Text("a", ("tokens are hidden here",))], bert)
    for document in split.documents:
        said = shown(document, None, bert)
        ids_T, is_hidden_T = document.labels, document.weights > 0
        spans = np.split(ids_T, np.flatnonzero(np.diff(is_hidden_T)) + 1)
        words = [bert.decode(span, special=True) for span in spans]
        assert said == "".join(f"[[{w}]]" if n % 2 else w for n, w in enumerate(words))
        assert said.replace("[[", "").replace("]]", "").split() and not is_hidden_T[[0, -1]].any()

def test_refusals(bert: Tokenizer, base: Tokenizer) -> None:
    with pytest.raises(DataError, match="data.max_length = 2: 2 special tokens leave no room"):
        encode(MaskedDataConfig(max_length=2), [Text("a", (LONG,))], bert)
    with pytest.raises(ModelError, match="the tokenizer has no mask token: name an encoder"):
        encode(MaskedDataConfig(), [Text("a", (LONG,))], base)
