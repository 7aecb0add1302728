"""Text while it grows: half characters and half stop strings are held back."""

import json
from itertools import pairwise
from pathlib import Path
import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers
from ftcore.data.tokenizer import Tokenizer
from ftcore.deploy.answers import Choice, spelled
from kernels.sampling import Token

@pytest.fixture(scope="module")
def bytewise(decoder: Path) -> Tokenizer:
    return Tokenizer.load(decoder)

@pytest.fixture(scope="module")
def piecewise(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """As SentencePiece's: a mark for a blank, bytes by name, the first blank left out."""
    folder = tmp_path_factory.mktemp("pieces")
    pieces = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", "\u2581one",
              "two", "\u2581", "o"]
    vocab = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab, [], byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence([
        decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(),
        decoders.Strip(" ", 1, 0)])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
    return Tokenizer.load(folder)

def pieces(choice: Choice, ids: list[int]) -> list[str]:
    """What each token adds to the text, and then its end; none after a stop."""
    texts = [""]
    for id_ in ids:
        if not choice.reason:
            choice.add(Token(id_))
        texts.append(choice.text)
    choice.end("length")
    return [new.removeprefix(old) for old, new in pairwise([*texts, choice.text])]

def test_pieces_make_the_text_of_all_tokens(bytewise: Tokenizer) -> None:
    draw = np.random.default_rng(0)
    texts = ["caf\u00e9 \u20ac \U0001f600", "\U0001f468\u200d\U0001f469", "one and the other"]
    several = [bytewise.encode(text).ids_T.tolist() for text in texts]
    several += [draw.integers(0, 300, 40).tolist() for _ in range(200)]  # mostly no UTF-8
    for ids in several:
        said = pieces(Choice(bytewise, []), ids)
        assert "".join(said) == bytewise.decode(ids)
    said = pieces(Choice(bytewise, []), several[0])
    assert "\ufffd" not in "".join(said) and "" in said[:-1]

def test_an_answer_is_trimmed_as_its_tokenizer_does(piecewise: Tokenizer) -> None:
    one, two = piecewise.id_of("\u2581one"), piecewise.id_of("two")
    euro = [piecewise.id_of(f"<0x{byte:02X}>") for byte in "\u20ac".encode()]
    ids = [one, two, *euro, one, piecewise.eos_id]
    assert pieces(Choice(piecewise, [], trims=True), ids) == [
        "one", "two", "", "", "\u20ac", " one", "", ""]
    assert piecewise.decode(ids) == "onetwo\u20ac one"
    assert "".join(pieces(Choice(piecewise, []), ids)) == " onetwo\u20ac one"

@pytest.mark.parametrize("stops", [["other"], ["d the \u20ac o"], ["x", "e and"], ["ot", "other"],
                                   ["one"], ["\u20ac"]])
def test_a_stop_is_found_across_tokens(stops: list[str], bytewise: Tokenizer) -> None:
    text = "one and the \u20ac other"
    ids = bytewise.encode(text).ids_T.tolist()
    for tokens in (ids, [bytewise.id_of(c) for c in map(shown, text.encode())]):
        choice = Choice(bytewise, stops)
        said = pieces(choice, tokens)
        assert "".join(said) == text[: min(text.find(s) for s in stops if s in text)]
        assert choice.reason == "stop"

def shown(byte: int) -> str:
    """A byte as ByteLevel writes it."""
    from ftcore.data.tokenizer import BYTE_OF

    return next(character for character, value in BYTE_OF.items() if value == byte)

def test_what_only_begins_a_stop_is_said_in_the_end(bytewise: Tokenizer) -> None:
    choice = Choice(bytewise, ["other!"])
    said = pieces(choice, bytewise.encode("the other").ids_T.tolist())
    assert "".join(said) == "the other" and said[-1] == "other" and choice.reason == "length"

def test_the_alphabet_of_bytes_is_the_library_s() -> None:
    from ftcore.data.tokenizer import BYTE_OF

    assert sorted(BYTE_OF) == sorted(pre_tokenizers.ByteLevel.alphabet())
    assert sorted(BYTE_OF.values()) == [*range(256)]
    splitter = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    for text in ("\u00e9", "\u20ac", "\n", " ", "\x7f", "\u00ad"):
        ((written, _),) = splitter.pre_tokenize_str(text)
        assert bytes(BYTE_OF[character] for character in written) == text.encode()

def test_half_a_character_is_spelled_as_bytes() -> None:
    assert spelled("\u20ac".encode()) == "\u20ac" and spelled(b"\xe2\x82") == r"bytes:\xe2\x82"
