"""Rows that are too long: an error, dropped, cut on either side, or split; each is counted."""

from typing import Any
import numpy as np
import pytest
from ftcore.cli import parse
from ftcore.config import (
    ChatDataConfig,
    LabelledDataConfig,
    OverLength,
    TextDataConfig,
)
from ftcore.data.columns import Chat, Text
from ftcore.data.encode import Split, cut, encode
from ftcore.data.pack import IGNORED
from ftcore.data.tokenizer import Tokenizer
from ftcore.errors import DataError
from tests.data.templates import TURNS, styled

CHAT = Chat("a", TURNS, "chat.jsonl", 7)
PAIRS = ("no", "yes")
WORDS = "one two three four five " * 9
LONG = Text("l", ("good " * 30, "bad " * 40), "no", "t.tsv", 4)
SHORT = Text("s", ("good", "bad"), "yes", "t.tsv", 5)

def reasons(split: Split) -> tuple[list[str], list[str]]:
    """Of rows that were left out, and of those that were cut."""
    return [row.reason for row in split.rejected], [row.reason for row in split.cut]

def chats(over_length: OverLength, max_length: int, *more: Chat) -> Split:
    limits = {"max_length": max_length, "over_length": over_length}
    return encode(ChatDataConfig(**limits), [CHAT, *more], styled("llama3"))

def targets(*documents: Any) -> list[int]:
    """Ids of the supervised tokens."""
    return np.concatenate([d.labels[d.weights > 0] for d in documents]).tolist()

@pytest.fixture(scope="module")
def whole() -> Any:
    """The chat that is too long below, as it is; its first token is BOS."""
    (document,) = encode(ChatDataConfig(), [CHAT], styled("llama3")).documents
    assert document.tokens_T[0] == styled("llama3").bos_id
    return document

def test_long_chats_are_errors_or_dropped(whole: Any) -> None:
    limit = len(whole) - 1
    with pytest.raises(DataError, match=f"chat.jsonl:7: {limit + 1} tokens, {limit} are allowed"):
        chats("error", limit)
    assert len(chats("error", limit + 1).documents) == 1
    dropped = chats("drop", limit, Chat("s", TURNS[:2]))
    assert [d.row_id for d in dropped.documents] == [chat.id for chat in dropped.chats] == ["s"]
    assert reasons(dropped) == ([f"more than {limit} tokens: drop"], [])

def test_chats_cut_on_the_right(whole: Any) -> None:
    split = chats("cut_right", 30)
    (short,) = split.documents
    assert short.tokens_T.tolist() == whole.tokens_T[:30].tolist() and split.chats == [CHAT]
    assert targets(short) == whole.labels[:30][whole.weights[:30] > 0].tolist()
    assert reasons(split) == ([], ["more than 30 tokens: cut_right"])
    with pytest.raises(DataError, match="more than 5 tokens: cut_right; nothing to supervise in i"):
        chats("cut_right", 5)

@pytest.mark.parametrize("limit", [3, 8, 30, 60])
def test_chats_cut_on_the_left_keep_their_bos(whole: Any, limit: int) -> None:
    split = chats("cut_left", limit)
    (short,) = split.documents
    last = slice(len(whole) - limit + 1, None)
    assert short.tokens_T.tolist() == [whole.tokens_T[0], *whole.tokens_T[last]]
    assert short.weights.tolist() == [0, *whole.weights[last]]  # BOS does not predict what is gone
    assert targets(short) == whole.labels[last][whole.weights[last] > 0].tolist()
    assert reasons(split) == ([], [f"more than {limit} tokens: cut_left"])
    config = ChatDataConfig(max_length=limit, over_length="cut_left")
    (bare,) = encode(config, [CHAT], styled("chatml")).documents
    (full,) = encode(ChatDataConfig(), [CHAT], styled("chatml")).documents
    assert bare.tokens_T.tolist() == full.tokens_T[-limit:].tolist()
    assert bare.weights.tolist() == full.weights[-limit:].tolist()

@pytest.mark.parametrize("limit", [1, 3, 10, 50])
def test_split_chats_lose_no_supervised_token(whole: Any, limit: int) -> None:
    split = chats("split", limit, Chat("s", TURNS[:2]))
    documents = [d for d in split.documents if d.row_id.startswith("a:")]
    assert targets(*documents) == targets(whole)
    assert max(map(len, documents)) <= limit and all(d.weights.any() for d in documents)
    assert len({d.row_id for d in documents}) == len(documents)
    assert split.chats[0] == CHAT and not split.rejected
    without = "; nothing to supervise in some parts" if limit < 50 else ""
    assert split.cut[0].reason == f"more than {limit} tokens: split{without}"

def test_splitting_loses_no_supervised_token(base: Tokenizer) -> None:
    (document,) = encode(TextDataConfig(), [Text("t", (WORDS,))], base).documents
    for size in (1, 7, len(document) - 1, len(document)):
        cuts = cut(document, TextDataConfig(max_length=size), None)
        assert max(map(len, cuts)) <= size
        for name in ("tokens_T", "labels", "weights"):
            joined = np.concatenate([getattr(piece, name) for piece in cuts])
            assert (joined == getattr(document, name)).all()
        assert len({piece.row_id for piece in cuts}) == len(cuts)

def test_plain_text(base: Tokenizer) -> None:
    texts = [Text("t", (WORDS,)), Text("u", ("six seven",))]
    (whole, short) = encode(TextDataConfig(), texts, base).documents

    def made(over_length: OverLength) -> tuple[list[list[int]], int]:
        split = encode(TextDataConfig(max_length=7, over_length=over_length), texts, base)
        assert len(split.cut) + len(split.rejected) == 1
        return [d.tokens_T.tolist() for d in split.documents], split.num_bytes

    ids, other = whole.tokens_T.tolist(), short.tokens_T.tolist()
    assert made("cut_right") == ([ids[:7], other], 0)  # which bytes were predicted is not known
    assert made("cut_left") == ([ids[-7:], other], 0)
    assert made("drop") == ([other], len("six seven"))
    *found, last = made("split")[0]
    assert sum(found, []) == ids and last == other
    assert made("split")[1] == len(WORDS) + len("six seven")
    with pytest.raises(DataError, match="tokens, 7 are allowed; raise data.max_length, or choose"):
        made("error")

def test_a_last_part_without_anything_to_predict_is_left_out(base: Tokenizer) -> None:
    """A part of one token, the last, which predicts nothing."""
    (whole,) = encode(TextDataConfig(), [Text("t", (WORDS,))], base).documents
    split = encode(TextDataConfig(max_length=len(whole) - 1), [Text("t", (WORDS,))], base)
    assert [len(d) for d in split.documents] == [len(whole) - 1]
    limit = f"more than {len(whole) - 1} tokens"
    assert reasons(split)[1] == [f"{limit}: split; nothing to supervise in some parts"]
    assert targets(*split.documents) == targets(whole)

@pytest.mark.parametrize("over_length", ["cut_left", "cut_right"])
def test_pairs_are_cut_between_their_special_tokens(bert: Tokenizer, over_length: str) -> None:
    long = Text("l", ("a b c " * 10, "d e f " * 13), "no", "t.tsv", 4)
    config = LabelledDataConfig(max_length=19, over_length=over_length)
    rows = encode(config, [long, SHORT], bert, PAIRS)
    first, second = ("b c " + "a b c " * 2, "e f " + "d e f " * 2)
    if over_length == "cut_right":
        first, second = "a b c " * 2 + "a b ", "d e f " * 2 + "d e "
    text = f"[CLS] {first}[SEP] {second}[SEP]"
    cut = rows.documents[0]
    assert bert.decode(cut.tokens_T, special=True) == text
    assert len(cut) == 19 and cut.labels == 0 and cut.types_T.tolist() == [0] * 10 + [1] * 9
    assert reasons(rows) == ([], [f"more than 19 tokens: {over_length}"])
    assert [d.row_id for d in rows.documents] == ["l", "s"]

def test_labelled_rows_that_are_too_long(bert: Tokenizer) -> None:
    with pytest.raises(DataError, match="t.tsv:4: 73 tokens, 20 are allowed"):
        encode(LabelledDataConfig(max_length=20), [LONG], bert, PAIRS)
    with pytest.raises(DataError, match="data.max_length = 3: 3 special tokens leave no room"):
        encode(LabelledDataConfig(max_length=3, over_length="cut_right"), [LONG], bert, PAIRS)
    config = LabelledDataConfig(max_length=20, over_length="drop")
    dropped = encode(config, [LONG, SHORT], bert, PAIRS)
    assert [d.row_id for d in dropped.documents] == ["s"]

@pytest.mark.parametrize(
    ("task", "choice"),
    [("classify", "split"), ("regress", "split"), ("reward", "cut_right"), ("dpo", "split")],
)
def test_parts_of_a_labelled_text_and_of_an_answer_are_no_choice(
    task: str, choice: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse([task, f"--data.over-length={choice}"])
    said = capsys.readouterr().err
    assert f"invalid choice '{choice}'" in said and "'drop', 'cut_left'" in said

def test_text_is_split_unless_told_otherwise() -> None:
    assert TextDataConfig().over_length == "split"

def test_targets_after_bos_are_gone(whole: Any) -> None:
    """Where every token counts, the one behind BOS is not that of the whole chat."""
    tokenizer = styled("llama3")
    options = {"train_on": "all", "max_length": 9, "over_length": "cut_left"}
    (short,) = encode(ChatDataConfig(**options), [CHAT], tokenizer).documents
    assert short.weights.tolist() == [0, *[1] * 7, 0] and short.labels[-1] == IGNORED
    assert targets(short) == short.tokens_T[2:].tolist()
