"""Text to token ids and back, through the `tokenizers` library: one path for training and serving.

Nothing is ever cut or padded, whatever tokenizer.json says. Offsets count characters of the text,
and every character belongs to some token: post-processors may not trim white space from offsets."""

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import accumulate, chain, islice, pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple
import numpy as np
import tokenizers
from tokenizers import processors
from ftcore.errors import DataError, ModelError
from ftcore.hub import json_object

SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
END_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>")  # chat models end a turn with another token
# ByteLevel writes a byte as a character: itself where that can be seen, else one from 256 on.
UNSEEN = [byte for byte in range(256) if byte == ord(" ") or not chr(byte).isprintable()]
BYTE_OF = {chr(256 + UNSEEN.index(b) if b in UNSEEN else b): b for b in range(256)}
SLAB = 1024  # texts tokenised in one call; a library encoding takes some 100 bytes a token

class Encoding(NamedTuple):
    """Token ids of one text: `ids_T`, and `offsets_T2`: first and past-the-end character; int32."""
    ids_T: np.ndarray
    offsets_T2: np.ndarray

class Tokenizer:
    """A vocabulary with its special tokens and chat template, from the files of a folder, `where`
    it is. Raises ModelError: a file is missing or damaged, a special token is unknown.

    special         names of tokenizer_config.json -> token, as "eos_token" -> "</s>"
    end_of_text_id  what ends a document of plain text: <|endoftext|> or alike, else eos
    stop_ids        what ends an answer: any of both"""

    def __init__(self, files: Mapping[str, bytes], *, where: str) -> None:
        self.files, self.where = dict(files), where
        others, config = (json_object(self.files.get(name, b"{}"), f"{self.where}/{name}")
                          for name in ("special_tokens_map.json", "tokenizer_config.json"))
        named = {name: token.get("content") if isinstance(token, dict) else token
                 for name, token in (others | config).items() if name.endswith("_token")}
        self.special = {name: token for name, token in named.items() if isinstance(token, str)}
        self._fast = self._vocabulary()
        vocab = self._fast.get_vocab()
        self._fast.add_special_tokens([t for t in self.special.values() if t in vocab])
        added = self._fast.get_added_tokens_decoder()
        self.special_ids = frozenset(id_ for id_, token in added.items() if token.special)
        self.added_ids = added.keys()
        decoder = self._fast.decoder
        self.is_byte_level = decoder is not None and decoder.decode(["\u0120"]) == " "
        self.special_tokens = tuple(added[id_].content for id_ in sorted(self.special_ids))
        self._any_special = re.compile("|".join(map(re.escape, self.special_tokens)) or "(?!)")
        self.vocab_size = max(vocab.values()) + 1
        named = (self.special.get(name) for name in ("bos_token", "eos_token"))
        self.bos_id, self.eos_id = (None if token is None else self.id_of(token) for token in named)
        ends = [token for token in END_OF_TEXT if token in self.special_tokens]
        self.end_of_text_id = self.id_of(ends[0]) if ends else self.eos_id
        self.stop_ids = frozenset({self.eos_id, self.end_of_text_id} - {None})
        self.chat_template = self._template(config)
        self.digest = hashlib.sha256(repr(sorted(self.files.items())).encode()).hexdigest()

    @classmethod
    def load(cls, folder: str | Path) -> "Tokenizer":
        if not Path(folder, "tokenizer.json").is_file():
            mend = f"from_pretrained({str(folder)!r}).save_pretrained({str(folder)!r})"
            what = f"{folder}: holds no tokenizer.json; or make it"
            raise ModelError(f"{what}: transformers.AutoTokenizer.{mend}")
        names = ["tokenizer.json", *(name for name in SETTINGS if Path(folder, name).is_file())]
        return cls({name: Path(folder, name).read_bytes() for name in names}, where=str(folder))

    def save(self, folder: str | Path) -> None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        for name, content in self.files.items():
            Path(folder, name).write_bytes(content)

    def encode(self, text: str, *, special: bool = True) -> Encoding:
        return next(self.encode_batch([text], special=special))

    def encode_batch(self, texts: Iterable[str], *, special: bool = True) -> Iterator[Encoding]:
        """Ids and offsets of many texts, on all cores. `special` adds the model's own tokens ([CLS]
        and [SEP], or BOS, of which no text gets a second); not to a rendered chat: it has them."""
        encode = partial(self._fast.encode_batch, add_special_tokens=special)
        found = self._encoded(encode, texts, lambda fast: [*chain.from_iterable(fast.offsets)])
        for ids_T, offsets_T in found:
            yield Encoding(ids_T, offsets_T.reshape(-1, 2)[-len(ids_T) :])

    def encode_pairs(self, texts: Sequence[tuple[str, ...]], *, max_length: int | None = None,
                     side: Literal["left", "right"] = "right",
                     ) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
        """Ids and segment numbers (int32; None: all 0) of texts or pairs, special ones too. Above
        `max_length` the longer text loses tokens on one `side`. DataError: no room for any."""
        fast, are_pairs = self._fast, any(len(some) > 1 for some in texts)
        if max_length is not None:
            special = fast.num_special_tokens_to_add(are_pairs)
            if special >= max_length:
                what = f"{special} special tokens leave no room"
                raise DataError(f"data.max_length = {max_length}: {what}")
            fast = tokenizers.Tokenizer.from_str(fast.to_str())  # the first stays as it is
            fast.enable_truncation(max_length, direction=side)
        inputs = [some if len(some) > 1 else some[0] for some in texts]
        is_typed = are_pairs or any(fast.encode("a").type_ids)  # cost: else lists of zeros
        found = self._encoded(fast.encode_batch_fast, inputs,
                              lambda fast: fast.type_ids if is_typed else [])
        for ids_T, types_T in found:
            yield ids_T, types_T[-len(ids_T) :] if len(types_T) and types_T.any() else None

    def _encoded(self, encode: Callable, inputs: Iterable, beside: Callable) -> Iterator[tuple]:
        """Ids, without the first of two BOS, and what `beside` takes from each encoding. SLAB at a
        time: a thread makes the next encodings, on all cores, while these are used."""
        inputs, twice = iter(inputs), [self.bos_id] * 2
        with ThreadPoolExecutor(1) as thread:
            slabs = iter(lambda: list(islice(inputs, SLAB)), [])
            coming = (thread.submit(encode, slab) for slab in slabs)
            for ready, _ in pairwise(chain(coming, [None])):  # the one behind it is submitted
                ids = [fast.ids for fast in ready.result()]
                ids = _arrays([some[1:] if some[:2] == twice else some for some in ids])
                yield from zip(ids, _arrays(list(map(beside, ready.result()))), strict=True)

    def decode(self, ids: Sequence[int] | np.ndarray, *, special: bool = False) -> str:
        return self._fast.decode([int(id_) for id_ in ids], skip_special_tokens=not special)

    def bytes_of(self, id_: int) -> bytes:
        """What a token is in a text, which may be a part of a character; special ones too."""
        token = self._fast.id_to_token(id_) or ""
        if self.is_byte_level and id_ not in self.added_ids:
            return bytes(BYTE_OF[character] for character in token)
        if match := re.fullmatch("<0x([0-9A-F]{2})>", token):
            return bytes.fromhex(match[1])
        return token.replace("\u2581", " ").encode()

    def find_special(self, text: str) -> str | None:
        """The first special token written out in a text, None if there is none."""
        match = self._any_special.search(text)
        return match and match.group()

    def id_of(self, token: str) -> int:
        id_ = self._fast.token_to_id(token)
        if id_ is None:
            raise ModelError(f"{self.where}: tokenizer.json has no token {token!r}: add it there")
        return id_

    def _vocabulary(self) -> tokenizers.Tokenizer:
        try:
            fast = tokenizers.Tokenizer.from_buffer(self.files["tokenizer.json"])
        except Exception as error:  # the library raises nothing narrower
            raise ModelError(f"{self.where}/tokenizer.json: not a tokenizer ({error})") from error
        fast.no_truncation()
        fast.no_padding()
        processor = fast.post_processor
        for part in processor if isinstance(processor, processors.Sequence) else [processor]:
            if hasattr(part, "trim_offsets"):  # white space too belongs to a token
                part.trim_offsets = False
        fast.post_processor = processor
        return fast

    def _template(self, config: dict[str, Any]) -> str | None:
        if "chat_template.jinja" in self.files:
            return self.files["chat_template.jinja"].decode("utf-8")
        template = config.get("chat_template")
        if isinstance(template, list):  # HF: several templates by name
            named = [each for each in template if isinstance(each, dict)]
            template = next((e.get("template") for e in named if e.get("name") == "default"), None)
        if not isinstance(template, str | None):
            what = f"{self.where}/tokenizer_config.json: chat_template = {template!r}"
            raise ModelError(f"{what}: must be text, or a list of named ones")
        return template

def _arrays(lists: Sequence[list[int]]) -> list[np.ndarray]:
    """Each list as int32, a view of one array of all: making many costs several times more."""
    flat_N = np.fromiter(chain.from_iterable(lists), np.int32)
    return [flat_N[start:end] for start, end in pairwise(accumulate(map(len, lists), initial=0))]
