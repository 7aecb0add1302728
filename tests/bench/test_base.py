"""The built-in corpus and tokenizer: determinism, disjoint splits, true copies, round trips."""

import json
import re
from itertools import islice
from pathlib import Path
import pytest
from tokenizers import Tokenizer
import ftcore.builtin
from tests.bench.base.copying import chat
from tests.bench.base.corpus import documents, lexicon, made, split_of
from tests.bench.base.tokenizer import SPECIAL_TOKENS, VOCAB_SIZE, text_of, train_tokenizer
from tests.bench.base.values import Draw, copying_words
from tests.bench.chat.phrases import kinds_of

BASE = Path(ftcore.builtin.__file__).parent / "base"
TURN = re.compile(r"<\|im_start\|>(\w+)\n(.*?)<\|im_end\|>\n", re.DOTALL)
ODD = [
    "caf\u00e9 cafe\u0301 \u212b \ufb01",
    "\U0001f469\u200d\U0001f680 \u05e9\u05dc\u05d5\u05dd \u4f60\u597d \ufeff\u2028",
    "tabs\t\tand  spaces \r\n\r\n   end   ",
    "\x00\x7f\u0085",
    "",
]

@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(BASE / "tokenizer.json"))

@pytest.fixture(scope="module")
def copies() -> list[str]:
    return [text_of(document) for document in made("copy", "train", 0, 5000)]

def test_every_kind_that_a_frame_names_exists() -> None:
    assert copying_words()["codas"][:4] == ["", "", "", "b"]
    for frame in copying_words()["frames"]:
        assert kinds_of(frame) and all(hasattr(Draw, kind) for kind in kinds_of(frame).values())

def test_a_copy_document_depends_on_split_seed_and_index_alone(copies: list[str]) -> None:
    assert [text_of(document) for document in made("copy", "train", 0, 50)] == copies[:50]
    assert text_of({"messages": chat("copy", lexicon(), 49)}) == copies[49]
    assert text_of(next(made("copy", "train", 1, 1))) != copies[0]

def test_copy_documents_are_distinct_within_and_across_splits(copies: list[str]) -> None:
    assert len(set(copies)) >= 0.999 * len(copies)
    heldout = {text_of(document) for document in made("copy", "heldout", 0, 1000)}
    assert len(heldout & set(copies)) <= 1

def test_the_library_is_split_by_file() -> None:
    train = {document["id"] for document in documents("train", copies=3, echoes=1)}
    heldout = {document["id"] for document in documents("heldout", copies=3, echoes=1)}
    assert not train & heldout
    assert 0.005 < len(heldout) / len(train | heldout) < 0.05
    files = {name.removesuffix("#docs") for name in train | heldout if name.endswith(".py#docs")}
    assert len(files) > 300
    assert all((f"{name}#docs" in train) == (name in train) for name in files)
    assert not any("/test/" in name or "site-packages" in name for name in train | heldout)
    assert split_of("argparse.py") == split_of("argparse.py")

def test_copy_documents_are_whole_chat_turns(copies: list[str]) -> None:
    for text in copies:
        turns = TURN.findall(text)
        rebuilt = "".join(f"<|im_start|>{role}\n{said}<|im_end|>\n" for role, said in turns)
        assert rebuilt == text
        assert turns[-1][0] == "assistant" and all(said for _, said in turns)

def test_echoes_are_repeated_and_distinct() -> None:
    train = made("echo", "train", 0, 1000)
    said = [[turn["content"] for turn in doc["messages"]] for doc in train]
    assert len(said) == 1000 and all(asked and asked == answered for asked, answered in said)
    assert len({asked for asked, _ in said}) == 1000
    heldout = made("echo", "heldout", 0, 1000)
    shared = {doc["messages"][0]["content"] for doc in heldout} & {asked for asked, _ in said}
    # Python seeds 257 and 2^40 + 257 give one stream; the committed base saw that echo.
    assert len(shared) <= 1

def test_values_of_json_answers_stand_in_the_prompt(copies: list[str]) -> None:
    checked = 0
    for text in copies:
        turns = TURN.findall(text)
        for index, (role, said) in enumerate(turns):
            if role != "assistant" or not said.startswith("{"):
                continue
            prompt = "\n".join(content for _, content in turns[:index])
            answer = json.loads(said)
            assert said == json.dumps(answer, ensure_ascii=False)
            if str(answer.get("event")) in copying_words()["events"]:
                del answer["event"]  # a kind of event is told, not quoted
            inner = [value for value in answer.values() if isinstance(value, dict)]
            for fields in [answer, *inner]:
                values = [value for value in fields.values() if isinstance(value, str)]
                assert all(value in prompt for value in values), text
            checked += 1
    assert checked > 2000

def test_round_trip(tokenizer: Tokenizer, copies: list[str]) -> None:
    for text in [*ODD, *copies[:300]]:
        ids = tokenizer.encode(text).ids
        assert tokenizer.decode(ids, skip_special_tokens=False) == text

def test_vocabulary(tokenizer: Tokenizer, copies: list[str]) -> None:
    assert tokenizer.get_vocab_size() == VOCAB_SIZE == len(set(tokenizer.get_vocab().values()))
    assert [tokenizer.token_to_id(token) for token in SPECIAL_TOKENS] == [0, 1, 2]
    assert {1, 2} <= set(tokenizer.encode(copies[0]).ids)
    assert tokenizer.encode(" 7:30 x4471").tokens[1:5] == ["7", ":", "3", "0"]
    assert not any(re.search(r"\d.|.\d", token) for token in tokenizer.get_vocab())

def test_a_word_keeps_its_pieces_after_a_space(tokenizer: Tokenizer, copies: list[str]) -> None:
    for word in {word for text in copies[:500] for word in re.findall(r"[a-zA-Z]+", text)}:
        spaced = "".join(f"|{piece}" for piece in tokenizer.encode(f" {word}").tokens)
        bare = "".join(f"|{piece}" for piece in tokenizer.encode(word).tokens)
        assert spaced.replace("|\u0120|", "|\u0120").replace("\u0120", "") == bare

def test_training_is_deterministic_and_saves_a_loadable_file(tmp_path: Path) -> None:
    texts = [text_of(document) for document in islice(documents("train", copies=0, echoes=0), 150)]
    trained = train_tokenizer(texts)
    assert trained.get_vocab_size() == VOCAB_SIZE
    assert trained.to_str() == train_tokenizer(texts).to_str()
    file = str(tmp_path / "tokenizer.json")
    trained.save(file)
    loaded = Tokenizer.from_file(file)
    assert loaded.encode(texts[0]).ids == trained.encode(texts[0]).ids

def test_transformers_reads_the_base_folder(tokenizer: Tokenizer, copies: list[str]) -> None:
    transformers = pytest.importorskip("transformers", reason="the oracle is transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(BASE)
    for text in [*ODD, *copies[:300]]:
        assert theirs(text)["input_ids"] == tokenizer.encode(text).ids
    assert (theirs.eos_token, theirs.pad_token, theirs.bos_token) == (
        "<|im_end|>", "<|endoftext|>", None,
    )
    chat = [{"role": "user", "content": "Hi 12"}]
    rendered = theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert rendered == "<|im_start|>user\nHi 12<|im_end|>\n<|im_start|>assistant\n"
    config = transformers.AutoConfig.from_pretrained(BASE)
    assert config.rope_parameters["rope_theta"] == 10000.0
    assert config.vocab_size == VOCAB_SIZE
    model = transformers.AutoModelForCausalLM.from_config(config)
    assert sum(parameter.numel() for parameter in model.parameters()) < 6_000_000
