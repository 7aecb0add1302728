"""Texts, chats, labelled texts, tagged sentences and pairs to the `Encoded` documents of a `Split`.

Letters: T tokens of a document. Every row becomes one, or is rejected. A pair too is one document
(`pack.pair`), so that no step divides it; each conversation ends with its answer."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product, tee
import numpy as np
from ftcore import config as configs
from ftcore.data import columns
from ftcore.data.chat import find_answers, supervise
from ftcore.data.columns import Chat, DataConfig, Example, Rejected, Text
from ftcore.data.pack import IGNORED, Encoded, apart, is_pair, pair, shifted
from ftcore.data.tokenizer import Tokenizer
from ftcore.errors import ConfigError, DataError, ModelError

Names = tuple[str, ...] | None  # of classes, by index
HIDDEN = 0.15  # share of a text's tokens

@dataclass
class Split:
    """Documents of one purpose in the order of their rows, and what was lost on the way."""
    num_rows: int = 0  # that were read
    documents: Sequence[Encoded] = field(default_factory=list)
    rejected: list[Rejected] = field(default_factory=list)  # rows that gave none
    cut: list[Rejected] = field(default_factory=list)  # rows cut to the maximum length, or split
    chats: list[Chat] = field(default_factory=list)  # of the documents, where a model is judged
    num_bytes: int = 0  # UTF-8 bytes of plain text, for bits per byte; 0: other data, or text cut

def encode(config: DataConfig, examples: Sequence[Example], tokenizer: Tokenizer,
           labels: Names = None) -> Split:
    """Examples of one split as documents; `labels` of what has classes. DataError: none is left."""
    split, index = Split(), {name: number for number, name in enumerate(labels or ())}
    kinds = {configs.MaskedDataConfig: _masked, configs.TextDataConfig: _texts,
             configs.PairsDataConfig: _pairs, configs.ChatDataConfig: _chats,
             configs.TaggedDataConfig: partial(_tagged, labels=index),
             configs.TextsConfig: partial(_labelled, labels=index)}
    make = next(make for kind, make in kinds.items() if isinstance(config, kind))
    make(split, examples, tokenizer, config)
    columns.require_some(split.documents, split.rejected)
    return split

def _texts(split: Split, texts: Sequence[Text], tokenizer: Tokenizer, config: DataConfig) -> None:
    """Documents of plain text, behind each the token that ends it."""
    if tokenizer.end_of_text_id is None:
        raise ModelError(f"{tokenizer.where}: the tokenizer has no token that ends a text")
    encodings = tokenizer.encode_batch([text.texts[0] for text in texts])
    for text, encoding in zip(texts, encodings, strict=True):
        ids_T = np.append(encoding.ids_T, np.int32(tokenizer.end_of_text_id))
        document = shifted(text.id, ids_T, np.ones(len(ids_T)))
        if admit(split, text, document, config, tokenizer.bos_id):
            split.num_bytes += len(text.texts[0].encode())
    if split.cut and config.over_length != "split":
        split.num_bytes = 0

def _masked(split: Split, texts: Sequence[Text], tokenizer: Tokenizer, config: DataConfig) -> None:
    """Texts between an encoder's special tokens, `maskings` times. Of their own tokens some, chosen
    by the row's id and the number of the masking alone, are scored: most stand as the mask token,
    one in ten as any, one in ten as itself. source: Devlin et al. 2019, arXiv:1810.04805, 3.1"""
    if (mask := tokenizer.special.get("mask_token")) is None:
        raise ModelError(f"{tokenizer.where}: the tokenizer has no mask token: name an encoder")
    around, _ = next(tokenizer.encode_pairs([("",)], max_length=config.max_length))
    limited = replace(config, max_length=config.max_length - len(around))
    encodings = tokenizer.encode_batch([text.texts[0] for text in texts], special=False)
    for text, (ids_T, _) in zip(texts, encodings, strict=True):
        admit(split, text, Encoded(text.id, ids_T, ids_T, np.ones(len(ids_T))), limited)
    whole, split.documents, lead = split.documents, [], len(around) // 2
    for document, number in product(whole, range(config.maskings)):
        random = np.random.default_rng([number, *document.row_id.encode()])
        ids_T, chance_T = np.insert(around, lead, document.tokens_T), random.random(len(document))
        chance_T = np.pad(chance_T, (lead, len(around) - lead), constant_values=1)
        most = max(HIDDEN, chance_T.min())  # so that one is hidden at least
        kinds = [chance_T > most, chance_T > 0.2 * most, chance_T > 0.1 * most]
        any_T = random.integers(tokenizer.vocab_size, size=len(ids_T))
        read_T = np.select(kinds, [ids_T, tokenizer.id_of(mask), ids_T], any_T).astype(np.int32)
        row_id, weights_T = f"{document.row_id}:{number}", (chance_T <= most).astype(np.float32)
        split.documents.append(Encoded(row_id, read_T, ids_T, weights_T))

def cut(document: Encoded, config: DataConfig, bos_id: int | None) -> list[Encoded]:
    """What is left of a document that is too long: its first tokens, its last ones behind BOS, or
    parts, of which the last position predicts the first token of the next. Of a pair each side is
    cut; nothing is left where an answer would lose its prompt."""
    max_length = config.max_length
    if is_pair(document):
        whole = apart([document])
        both = [side for one in whole for side in cut(one, config, bos_id)]
        scored = [[np.count_nonzero(d.weights) for d in sides] for sides in (whole, both)]
        return [pair(document.row_id, both, document.labels[3])] if scored[0] == scored[1] else []
    if config.over_length == "split":
        starts = range(0, len(document), max_length)
        return [take(document, slice(s, s + max_length), f":{n}") for n, s in enumerate(starts)]
    if config.over_length == "cut_right":
        return [take(document, slice(max_length))]
    lead, over = int(document.tokens_T[0] == bos_id), max(0, len(document) - max_length)
    last = take(document, np.r_[:lead, lead + over : len(document)])
    last.weights[:lead] = 0  # what followed BOS is gone
    return [last]

def _chats(split: Split, chats: Sequence[Chat], tokenizer: Tokenizer,
           config: configs.ChatDataConfig) -> None:
    """Chats, of which `train_on` says what counts: messages whose `train` is true (assistant), the
    last of these (last), all behind its prompt (completion), or all; ends of turns too if asked."""
    if not config.train_on_end and config.train_on in ("all", "completion"):
        mend = "leave out --data.no-train-on-end, or take assistant or last"
        raise ConfigError(f"data.train_on = {config.train_on} supervises ends of turns too: {mend}")
    answered = partial(find_answers, tokenizer=tokenizer, train_on=config.train_on)
    ahead, kept = tee(columns.usable(chats, answered, split.rejected))
    encodings = tokenizer.encode_batch((text for _, (text, _) in ahead), special=False)
    for (chat, (text, answers)), encoding in zip(kept, encodings, strict=True):
        document = supervise(chat.id, text, encoding, answers, tokenizer, config.train_on_end)
        if admit(split, chat, document, config, tokenizer.bos_id):
            split.chats.append(chat)

def _labelled(split: Split, examples: Sequence[Text], tokenizer: Tokenizer, config: DataConfig,
              labels: Mapping[str, int]) -> None:
    """Labelled texts and pairs; of pairs the longer text is cut. DataError: a label is unknown."""
    side, limit = config.over_length.removeprefix("cut_"), config.max_length

    def encoded(some: Sequence[Text], max_length: int | None = None) -> Iterator[Encoded]:
        ids = tokenizer.encode_pairs([e.texts for e in some], max_length=max_length, side=side)
        for example, (ids_T, types_T) in zip(some, ids, strict=True):
            label = example.target
            if isinstance(label, str):
                (label,) = columns.indices(labels, example)
            elif isinstance(label, tuple):
                label = np.zeros(len(labels), dtype=np.float32)
                label[columns.indices(labels, example)] = 1.0
            yield Encoded(example.id, ids_T, label, example.weight, types_T)

    pairs = list(zip(examples, encoded(examples), strict=True))
    long = [example for example, whole in pairs if limit and len(whole) > limit]
    shortened = encoded(long, limit)  # each when it is asked for, in turn
    for example, document in pairs:
        admit(split, example, document, config, shorten=lambda *_: [next(shortened)])

def _tagged(split: Split, examples: Sequence[Text], tokenizer: Tokenizer, config: DataConfig,
            labels: Mapping[str, int]) -> None:
    """Sentences, words joined by blanks; of each word the first token that ends in it is scored,
    labels[t] being the tag of token t. Words without one are listed. DataError: an unknown tag."""
    encodings = tokenizer.encode_batch([" ".join(example.texts) for example in examples])
    for example, (ids_T, offsets_T2) in zip(examples, encodings, strict=True):
        own_O = np.flatnonzero(np.diff(offsets_T2)[:, 0])  # not the special ones around them
        starts_W = np.cumsum([0, *(len(word) + 1 for word in example.texts)])
        word_O = np.searchsorted(starts_W, offsets_T2[own_O, 1] - 1, "right") - 1
        told_W, first_W = np.unique(word_O, return_index=True)
        labels_T = np.full(len(ids_T), IGNORED, dtype=np.int32)
        labels_T[own_O[first_W]] = np.array(columns.indices(labels, example))[told_W]
        weights_T = (labels_T != IGNORED).astype(np.float32)
        if admit(split, example, Encoded(example.id, ids_T, labels_T, weights_T), config):
            split.cut += [columns.left_out(example, "a word gives no token", detail=repr(word))
                          for word in np.delete(np.array(example.texts, dtype=object), told_W)]

def _pairs(split: Split, chats: Sequence[Chat], tokenizer: Tokenizer,
           config: configs.PairsDataConfig) -> None:
    """Each conversation must fit into `max_length`; what is cut of one is its prompt's start."""
    others = [replace(chat, messages=(*prompt, {**answer, "content": chat.rejected}))
              for chat in chats for *prompt, answer in [chat.messages]]
    found = [sides(some, tokenizer, config.train_on_end) for some in (chats, others)]
    split.rejected += {row.id: row for each in reversed(found) for row in each.rejected}.values()
    made = [{document.row_id: document for document in each.documents} for each in found]
    for chat in columns.besides(chats, split.rejected):
        both = [documents[chat.id] for documents in made]
        if np.array_equal(both[0].tokens_T, both[1].tokens_T):
            split.rejected.append(columns.left_out(chat, "the two answers are the same tokens"))
        else:
            document = pair(chat.id, both, chat.margin)
            first_id = document.tokens_T[0] if reads_texts(tokenizer) else tokenizer.bos_id
            admit(split, chat, document, config, first_id)

def sides(chats: Sequence[Chat], tokenizer: Tokenizer, train_on_end: bool = True) -> Split:
    """Each conversation as a model reads it, to the end of its answer, which alone is scored; and
    those that give nothing. DataError: all."""
    if not reads_texts(tokenizer):
        config = configs.ChatDataConfig(train_on="last", train_on_end=train_on_end)
        split = encode(config, chats, tokenizer)
        ends = [np.flatnonzero(document.weights)[-1] + 2 for document in split.documents]
        split.documents = list(map(take, split.documents, map(slice, ends)))
        return split
    split, texts = Split(), [("\n".join(m["content"] for m in chat.messages[:-1]),
                              chat.messages[-1]["content"]) for chat in chats]
    answers = tokenizer.encode_batch((answer for _, answer in texts), special=False)
    read = zip(chats, tokenizer.encode_pairs(texts), answers, strict=True)
    for chat, (ids_T, types_T), (answer_T, _) in read:
        if len(answer_T):  # behind it stands one special token
            counts_T = np.arange(len(ids_T), 0, -1) <= len(answer_T) + 1
            split.documents.append(shifted(chat.id, ids_T, counts_T, types_T))
        else:
            split.rejected.append(columns.left_out(chat, "an answer is empty"))
    columns.require_some(split.documents, split.rejected)
    return split

def reads_texts(tokenizer: Tokenizer) -> bool:
    """Whether it is an encoder's, which without a template reads a chat as a pair of texts."""
    return tokenizer.chat_template is None and "cls_token" in tokenizer.special

def take(document: Encoded, places: np.ndarray | slice, part: str = "") -> Encoded:
    arrays = (document.tokens_T, document.labels, document.weights, document.types_T)
    kept = (None if array is None else array[places] for array in arrays)
    return Encoded(document.row_id + part, *kept)

def admit(split: Split, source: Example, document: Encoded, config: DataConfig,
          bos_id: int | None = None, shorten: Callable[..., list[Encoded]] = cut) -> bool:
    """Take in a document, or, where it (of a pair, one side) is longer than `max_length`, what
    `shorten` makes of it, or nothing (drop), or raise DataError (error); but no part without
    anything to supervise. All that is lost is noted. False: nothing was taken."""
    limit, choice, made, said = config.max_length, config.over_length, [document], []
    if limit is not None and (size := max(map(len, apart([document])))) > limit:
        if choice == "error":
            what = f"{columns.place(source)}: {size} tokens, {limit} are allowed"
            raise DataError(f"{what}; raise data.max_length, or choose data.over_length for it")
        made = [] if choice == "drop" else shorten(document, config, bos_id)
        lost = "" if made or choice == "drop" else ", no room for a prompt"
        said = [f"more than {limit} tokens: {choice}{lost}"]
    kept = [d for d in made if (d.weights if isinstance(d.weights, float) else d.weights.any())]
    if len(kept) < len(made):
        said.append(f"nothing to supervise in {'some parts' if kept else 'it'}")
    if said:
        (split.cut if kept else split.rejected).append(columns.left_out(source, "; ".join(said)))
    split.documents += kept
    return bool(kept)
