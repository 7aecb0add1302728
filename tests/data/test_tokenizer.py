"""Tokenizer folders: equal to transformers, never cut or padded, saved as they were read."""

import json
import shutil
import numpy as np
import pytest
import tokenizers
from tokenizers import processors
from ftcore.data.tokenizer import Tokenizer
from ftcore.errors import ModelError

TEXTS = [
    "Hello w\u00f6rld, this is na\u00efve.",
    " leading\u00a0blanks\tand \x00 control\x08 characters ",
    "\u4e2d\u6587 and \U0001f642 and unbelievablyzzzq",
    "[MASK] and [SEP] stand for themselves",
    "don't stop " * 40,
]

@pytest.fixture(scope="module")
def reference(bert_folder):
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(bert_folder)

def changed(tokenizer, **content):
    """The same tokenizer with parts of its tokenizer.json replaced."""
    parts = json.loads(tokenizer.files["tokenizer.json"]) | content
    files = {**tokenizer.files, "tokenizer.json": json.dumps(parts).encode()}
    return Tokenizer(files, where="test")

def encode_pair(tokenizer, text, pair=None, **options):
    texts = (text,) if pair is None else (text, pair)
    (encoded,) = written_out(tokenizer.encode_pairs([texts], **options))
    return encoded

def written_out(encoded):
    """With zeros for the segments of those that have none."""
    return [(ids, np.zeros_like(ids) if types is None else types) for ids, types in encoded]

def test_cutting_pairs_changes_nothing_else(bert, monkeypatch):
    """While pairs are asked for one by one, and in every slab."""
    monkeypatch.setattr("ftcore.data.tokenizer.SLAB", 2)
    short = bert.encode_pairs([("word " * 50,)] * 5, max_length=7)
    assert len(next(short)[0]) == 7
    assert len(bert.encode("word " * 50).ids_T) == 52
    assert len(next(bert.encode_pairs([("word " * 50,)]))[0]) == 52
    assert [len(ids) for ids, _ in short] == [7] * 4

def test_truncation_and_padding_of_the_file_are_off(bert, bert_folder):
    stored = json.loads((bert_folder / "tokenizer.json").read_text())
    assert stored["truncation"]["max_length"] == 128 and stored["padding"] is not None
    assert len(bert.encode("word " * 500).ids_T) == 502
    assert len(bert.encode("word").ids_T) == 3
    assert len(encode_pair(bert, "word " * 200, "word " * 200)[0]) == 403

@pytest.mark.parametrize("max_length", [None, 5, 16, 17])
def test_ids_and_types_equal_transformers(bert, reference, max_length):
    for text in TEXTS:
        for pair in (None, *TEXTS):
            expected = reference(text, pair, truncation=bool(max_length), max_length=max_length)
            ids, types = encode_pair(bert, text, pair, max_length=max_length)
            assert ids.tolist() == expected["input_ids"]
            assert types.tolist() == expected["token_type_ids"]

def test_a_vocabulary_is_made_a_tokenizer_json_as_the_error_says(bert, bert_folder, tmp_path):
    transformers = pytest.importorskip("transformers")
    for name in ("vocab.txt", "config.json"):
        shutil.copy(bert_folder / name, tmp_path)
    with pytest.raises(ModelError, match="holds no tok") as told:
        Tokenizer.load(tmp_path)
    same = repr(str(tmp_path))
    mend = f"transformers.AutoTokenizer.from_pretrained({same}).save_pretrained({same})"
    assert str(told.value).endswith(f"or make it: {mend}")
    transformers.AutoTokenizer.from_pretrained(tmp_path).save_pretrained(tmp_path)
    built = Tokenizer.load(tmp_path)
    for text in TEXTS:
        for pair in (None, TEXTS[0]):
            ours, stored = encode_pair(built, text, pair), encode_pair(bert, text, pair)
            assert [a.tolist() for a in ours] == [a.tolist() for a in stored]
    assert built.special_ids == bert.special_ids

def test_pairs_in_a_batch_equal_single_pairs(bert):
    pairs = [None, "a pair", None, "another"]
    texts = [(text, pair) if pair else (text,) for text, pair in zip(TEXTS, pairs, strict=False)]
    batch = written_out(bert.encode_pairs(texts))
    for text, pair, (ids, types) in zip(TEXTS, pairs, batch, strict=False):
        alone = encode_pair(bert, text, pair)
        assert (ids == alone[0]).all() and (types == alone[1]).all()
        assert ids.dtype == types.dtype == np.int32

def test_saved_files_are_the_same_and_transformers_reads_them(base, bert_folder, tmp_path):
    transformers = pytest.importorskip("transformers")
    base.save(tmp_path / "base")
    again = Tokenizer.load(tmp_path / "base")
    assert again.digest == base.digest and again.chat_template == base.chat_template
    other = transformers.AutoTokenizer.from_pretrained(tmp_path / "base")
    for text in [*TEXTS, "a<|im_end|>b\n\n  c"]:
        ids = again.encode(text).ids_T.tolist()
        assert ids == base.encode(text).ids_T.tolist() == other(text)["input_ids"]
        assert base.decode(ids, special=True) == text
    Tokenizer.load(bert_folder).save(tmp_path / "copy")
    other = transformers.BertTokenizerFast.from_pretrained(tmp_path / "copy")
    ids = Tokenizer.load(tmp_path / "copy").encode(TEXTS[0]).ids_T.tolist()
    assert other(TEXTS[0])["input_ids"] == ids

BYTE_LEVEL = {
    "GPT2Tokenizer": ["<|endoftext|>"],
    "RobertaTokenizer": ["<s>", "<pad>", "</s>", "<unk>", "<mask>"],
}

@pytest.fixture
def byte_level_folder(base, tmp_path):
    """(class, settings) -> a folder with the base's BPE as transformers saves it."""
    transformers = pytest.importorskip("transformers")

    def make(kind, config):
        model = json.loads(base.files["tokenizer.json"])["model"]
        words = [token for token in model["vocab"] if token not in base.special_tokens]
        vocab = {token: id_ for id_, token in enumerate([*BYTE_LEVEL[kind], *words])}
        merges = [m for m in model["merges"] if "".join(m) not in base.special_tokens]
        lines = ["#version: 0.2", *map(" ".join, merges)]
        (tmp_path / "vocab.json").write_text(json.dumps(vocab))
        (tmp_path / "merges.txt").write_text("\n".join(lines) + "\n", "utf-8")
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        getattr(transformers, kind).from_pretrained(tmp_path).save_pretrained(tmp_path / "saved")
        return tmp_path / "saved"

    return make

@pytest.mark.parametrize("settings", [{}, {"add_prefix_space": True}])
@pytest.mark.parametrize("kind", BYTE_LEVEL)
def test_byte_level_tokenizers(kind, settings, byte_level_folder):
    transformers = pytest.importorskip("transformers")
    folder = byte_level_folder(kind, {"tokenizer_class": kind, **settings})
    tokenizer = Tokenizer.load(folder)
    reference = getattr(transformers, kind).from_pretrained(folder)
    for text in [*TEXTS, "", "a<|endoftext|>b", "x<s> y</s> <mask> z", "12 345's  \n\n y"]:
        ids = tokenizer.encode(text).ids_T.tolist()
        assert ids == reference(text)["input_ids"]
        assert tokenizer.decode(ids) == reference.decode(ids, skip_special_tokens=True)
        pair = encode_pair(tokenizer, text, "b c")
        assert pair[0].tolist() == reference(text, "b c")["input_ids"]
    eos = BYTE_LEVEL[kind][0 if kind == "GPT2Tokenizer" else 2]
    assert tokenizer.eos_id == reference.eos_token_id == tokenizer.id_of(eos)
    assert set(tokenizer.special_tokens) == set(BYTE_LEVEL[kind])
    tokenizer.save(folder / "copy")
    assert Tokenizer.load(folder / "copy").digest == tokenizer.digest

def test_digest_tells_files_apart(base):
    template = {**base.files, "chat_template.jinja": b"{{ messages }}"}
    changed_template = Tokenizer(template, where="test")
    assert changed_template.chat_template == "{{ messages }}"
    assert changed_template.digest != base.digest
    assert Tokenizer(base.files, where="elsewhere").digest == base.digest

@pytest.mark.parametrize("trimmed", [False, True])
def test_offsets_cover_every_character(base, trimmed):
    fast = tokenizers.Tokenizer.from_buffer(base.files["tokenizer.json"])
    fast.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=trimmed)])
    files = {**base.files, "tokenizer.json": fast.to_str().encode()}
    text = "a \n\n b\u00e9\U0001f642  <|im_end|>\n"
    encoding = Tokenizer(files, where="test").encode(text)
    covered = set()
    for start, end in encoding.offsets_T2.tolist():
        assert start < end
        covered.update(range(start, end))
    assert covered == set(range(len(text)))

def test_special_tokens(base, bert):
    assert base.special_tokens == ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    assert base.special_ids == {0, 1, 2}
    assert (base.bos_id, base.eos_id, base.end_of_text_id) == (None, 2, 0)
    assert base.vocab_size == 4096
    assert bert.special["cls_token"] == "[CLS]" and bert.id_of("[CLS]") == 101
    assert base.find_special("a <|im_end|> b <|endoftext|>") == "<|im_end|>"
    assert base.find_special("a <|im_end b") is None
    with pytest.raises(ModelError, match="tokenizer.json has no token '<x>'"):
        base.id_of("<x>")

def test_at_most_one_bos(families):
    llama = families["llama3"]
    bos = {"id": "<|begin_of_text|>", "type_id": 0}
    first, second = ({"Sequence": {"id": x, "type_id": t}} for x, t in (("A", 0), ("B", 1)))
    tokenizer = changed(
        llama,
        post_processor={
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": bos}, first],
            "pair": [{"SpecialToken": bos}, first, second],
            "special_tokens": {bos["id"]: {**bos, "ids": [llama.bos_id], "tokens": [bos["id"]]}},
        },
    )
    for text in ("hi", "<|begin_of_text|>hi"):
        encoding = tokenizer.encode(text)
        assert (encoding.ids_T == tokenizer.bos_id).tolist() == [True, False]
        assert len(encoding.offsets_T2) == 2
        assert encode_pair(tokenizer, text)[0].tolist() == encoding.ids_T.tolist()
        short = encode_pair(tokenizer, text * 9, max_length=4)[0]
        assert (short == tokenizer.bos_id).tolist()[:2] == [True, False]
    assert tokenizer.encode("hi", special=False).ids_T[0] != tokenizer.bos_id

def test_named_templates(base):
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    files = {**base.files, "tokenizer_config.json": json.dumps({"chat_template": named}).encode()}
    assert Tokenizer(files, where="test").chat_template == "d"
    files["tokenizer_config.json"] = json.dumps({"chat_template": named[:1]}).encode()
    assert Tokenizer(files, where="test").chat_template is None  # which is told when it is needed

def test_special_tokens_written_as_objects(base):
    eos = {"content": "<|im_end|>", "lstrip": False, "special": True}
    files = {
        "tokenizer.json": base.files["tokenizer.json"],
        "special_tokens_map.json": json.dumps({"eos_token": eos}).encode(),
    }
    assert Tokenizer(files, where="test").eos_id == 2

@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "holds no tokenizer.json; or make it"),
        ({"vocab.json": b"{}"}, "holds no tokenizer.json; .*make it: tran"),
        ({"tokenizer.json": b'{"version": "1.0", "mod'}, "tokenizer.json: not a tokenizer"),
    ],
)
def test_damaged_folders(tmp_path, files, message):
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ModelError, match=message):
        Tokenizer.load(tmp_path)

@pytest.mark.parametrize(
    ("config", "message"),
    [
        (b'{"eos_token": "</s>"}', "no token '</s>': add it there"),
        (b'{"eos_token": ', "tokenizer_config.json: not valid JSON"),
        (b"[]", "tokenizer_config.json: holds list, must be a JSON object"),
    ],
)
def test_damaged_settings(base, config, message):
    with pytest.raises(ModelError, match=message):
        Tokenizer({**base.files, "tokenizer_config.json": config}, where="test")
