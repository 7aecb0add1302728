"""Masked-language modelling: no token is lost; hiding is a function of (seed, step, row)."""

from pathlib import Path

import numpy as np
import pytest

from ftcore.config import MaskedDataConfig
from ftcore.data.columns import Text
from ftcore.data.encode import Masking, encode
from ftcore.data.pack import Encoded
from ftcore.data.prepare import prepare
from ftcore.data.tokenizer import Tokenizer
from ftcore.errors import DataError, ModelError

LONG = "The unaffable reader counts his [MASK] tokens, one by one, and loses none of them. " * 3

def row(length: int, name: str = "r") -> Encoded:
    tokens_T = np.arange(200, 200 + length, dtype=np.int32)
    weights_T = np.ones(length, dtype=np.float32)
    weights_T[[0, -1]] = 0
    return Encoded(name, tokens_T, tokens_T, weights_T)

@pytest.mark.parametrize("max_length", [3, 7, 20, 1000])
def test_pieces_hold_every_token_once(bert: Tokenizer, max_length: int) -> None:
    config = MaskedDataConfig(max_length=max_length)
    encoded = encode(config, [Text("a", (LONG,)), Text("b", ("x",))], bert)
    alone = bert.encode(LONG).ids_T.tolist()
    pieces = [d.tokens_T.tolist() for d in encoded.documents if d.row_id[0] == "a"]
    assert all(p[0] == alone[0] and p[-1] == alone[-1] for p in pieces)
    assert max(map(len, pieces)) == min(max_length, len(alone))
    found = sum((p[1:-1] for p in pieces), [])
    lost = 3 if max_length == 3 else 0  # pieces that are the [MASK] of the text alone
    assert not encoded.rejected and len(found) == len(alone) - 2 - lost
    noted = f"more than {max_length} tokens: split"
    noted += "; nothing to supervise in some parts" if lost else ""
    assert [r.reason for r in encoded.cut] == ([noted] if max_length < 1000 else [])
    for document in encoded.documents:
        special = np.isin(document.tokens_T, list(bert.special_ids))
        assert (document.weights == ~special).all() and (document.labels == document.tokens_T).all()
    assert len({d.row_id for d in encoded.documents}) == len(encoded.documents)
    with pytest.raises(DataError, match="data.max_length = 2: 2 special tokens leave no room"):
        encode(MaskedDataConfig(max_length=2), [Text("a", (LONG,))], bert)

@pytest.mark.parametrize("side", ["cut_left", "cut_right"])
def test_one_piece_is_kept_of_a_text_that_is_cut(bert: Tokenizer, side: str) -> None:
    """Between the special tokens, as many of the text's last or first ones as fit."""
    alone = bert.encode(LONG).ids_T
    for limit in range(4, len(alone)):
        config = MaskedDataConfig(max_length=limit, over_length=side)
        encoded = encode(config, [Text("a", (LONG,))], bert)
        (document,), room = encoded.documents, limit - 2
        kept = alone[1:-1][-room:] if side == "cut_left" else alone[1:-1][:room]
        assert document.tokens_T.tolist() == [alone[0], *kept, alone[-1]]
        assert [r.reason for r in encoded.cut] == [f"more than {limit} tokens: {side}"]

def test_hiding_is_a_function_of_seed_step_and_row(bert: Tokenizer) -> None:
    hide = Masking.of(bert, seed=3)
    first = hide(row(60), 7)
    again = Masking.of(bert, seed=3)(row(60), 7)
    assert (first.tokens_T == again.tokens_T).all() and (first.weights == again.weights).all()
    for other in (hide(row(60), 8), hide(row(60, "s"), 7), Masking.of(bert, seed=4)(row(60), 7)):
        assert (other.weights != first.weights).any()

def test_shares(bert: Tokenizer) -> None:
    hide, document = Masking.of(bert, seed=0), row(102)
    hidden, masked, kept, places = 0, 0, 0, np.zeros(102)
    for step in range(400):
        made = hide(document, step)
        chosen = made.weights > 0
        assert chosen.sum() == 15 and made.weights[[0, -1]].sum() == 0
        assert (made.tokens_T[~chosen] == document.tokens_T[~chosen]).all()
        assert (made.labels == document.tokens_T).all()
        hidden += 15
        masked += (made.tokens_T[chosen] == bert.id_of("[MASK]")).sum()
        kept += (made.tokens_T[chosen] == document.tokens_T[chosen]).sum()
        places += chosen
    assert abs(masked / hidden - 0.8) < 0.02 and abs(kept / hidden - 0.1) < 0.015
    assert places[1:-1].min() > 30 and places[1:-1].max() < 95  # each with a chance of 0.15
    short = hide(row(3), 0)
    assert short.weights.tolist() == [0, 1, 0]

def test_random_tokens_are_ordinary_ones(bert: Tokenizer) -> None:
    made = Masking.of(bert, seed=0)
    assert not set(made.ordinary.tolist()) & bert.special_ids
    assert len(made.ordinary) == bert.vocab_size - len(bert.special_ids)

def test_a_decoder_has_no_mask(base: Tokenizer) -> None:
    with pytest.raises(ModelError, match="the tokenizer has no mask token; name an encoder"):
        Masking.of(base, seed=0)

def test_held_out_text_is_hidden_once_and_for_all(bert: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(LONG, "utf-8")
    path = (str(tmp_path / "a.txt"),)
    config = MaskedDataConfig(train=path, dev=path, test=path, max_length=16)
    data, other = (prepare(config, bert, seed=seed) for seed in (1, 2))
    mine, theirs = data.dev.documents, other.dev.documents
    assert [d.tokens_T.tolist() for d in mine] == [d.tokens_T.tolist() for d in theirs]
    assert [d.tokens_T.tolist() for d in mine] == [
        d.tokens_T.tolist() for d in data.tests["a"].documents
    ]
    whole = data.train.documents
    assert all((a.labels == b.labels).all() for a, b in zip(mine, whole, strict=True))
    assert sum(d.weights.sum() for d in mine) < 0.3 * sum(d.weights.sum() for d in whole)
    seeds = [(made.draw(whole[0], 0).weights > 0).tolist() for made in (data, other)]
    assert seeds[0] != seeds[1]
