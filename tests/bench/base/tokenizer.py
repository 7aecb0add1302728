"""Training of the built-in tokenizer: byte-level BPE in which a word has one spelling.

Usual byte-level BPE merges the space into a word first, so " Marla" and "Marla" may share no piece,
and a model that copies a name out of a sentence into JSON must translate it. Here merges are
learned inside words alone; the merges of a space with the first piece of a word come after them
all. So a word has the same pieces with and without a space before it, except that the first one may
carry the space. Digits stand alone. No normalisation: decode(encode(text)) == text for any text.
The committed one was trained before values of the corpus were drawn from its own tokens.

`python -m tests.bench.base.tokenizer DIR` writes tokenizer.json.
"""

import itertools
import json
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from .corpus import documents

VOCAB_SIZE = 4096
WORD_VOCAB_SIZE = 2900  # the rest is for pieces with a space before them
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
SPACE = "\u0120"  # how byte-level BPE writes a space
COPIES = 45_000  # copy tasks in the training text: about 40% of its characters

SPACED_WORDS = r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
BARE_WORDS = SPACED_WORDS.replace(" ?", "")

def text_of(document: dict[str, Any]) -> str:
    """A document of the corpus as plain text, chats as the template of base/ renders them."""
    if "text" in document:
        return document["text"]
    turns = document["messages"]
    return "".join(f"<|im_start|>{t['role']}\n{t['content']}<|im_end|>\n" for t in turns)

def assemble(vocab: dict[str, int], merges: Sequence[tuple[str, str]], pattern: str) -> Tokenizer:
    """A tokenizer of these pieces; `pattern` cuts text into the words that merges stay inside."""
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    return tokenizer

def train_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """Learn merges inside words, then give the commonest first pieces a form with a space before.

    returns   VOCAB_SIZE tokens: special tokens, bytes, pieces, pieces with a space, in this order
    """
    texts = list(texts)
    bare = assemble({}, [], BARE_WORDS)
    trainer = trainers.BpeTrainer(
        vocab_size=WORD_VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bare.train_from_iterator(texts, trainer)
    learned = json.loads(bare.to_str())["model"]
    vocab, merges = learned["vocab"], [tuple(merge) for merge in learned["merges"]]
    for piece in itertools.islice(spaced_pieces(bare, texts), VOCAB_SIZE - len(vocab)):
        merges.append((SPACE, piece))
        vocab[SPACE + piece] = len(vocab)
    return assemble(vocab, merges, SPACED_WORDS)

def spaced_pieces(bare: Tokenizer, texts: Sequence[str]) -> list[str]:
    """Pieces that follow a single space, the most frequent first; digits are left out."""
    counts: Counter[str] = Counter()
    for encoding in bare.encode_batch(texts):
        pairs = itertools.pairwise(encoding.tokens)
        counts.update(after for before, after in pairs if before == SPACE)
    return [
        piece
        for piece, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))
        if not piece.isdigit() and piece[0] != SPACE and piece not in SPECIAL_TOKENS
    ]

if __name__ == "__main__":
    corpus = [doc for doc in documents("train", copies=COPIES) if doc["source"] != "echo"]
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    train_tokenizer(map(text_of, corpus)).save(str(folder / "tokenizer.json"))
