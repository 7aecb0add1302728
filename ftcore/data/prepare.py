"""Files to the documents of one run, every row accounted for: collect (files to examples), tidy
(one normal form; patterns stand in patterns.toml), compare (duplicates, conflicts, leaks), split
(rows held out, classes balanced), encode."""

import gc
import html.entities
import math
import re
import tomllib
import unicodedata
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from functools import partial
from itertools import compress, filterfalse
from pathlib import Path
from typing import Literal
import numpy as np
from ftcore import config as configs
from ftcore import files
from ftcore.config import DataConfig
from ftcore.data import dedup, store
from ftcore.data.columns import Chat, Example, Rejected, Text, besides, label_map, left_out, place
from ftcore.data.encode import Names, Split, encode
from ftcore.data.read import Notes, Rows, collect
from ftcore.data.tokenizer import Tokenizer
from ftcore.errors import CheckpointError, ConfigError, DataError

TABLE = tomllib.loads(Path(__file__).with_name("patterns.toml").read_text("utf-8"))
PATTERNS = {name: re.compile(pattern, re.X) for name, pattern in TABLE.items()}
SHOWN = 100  # findings that are noted by name; the rest is counted
SYSTEM, UNASKED = ("system",), ("system", "assistant")  # roles whose turns are not compared

def prepared(config: DataConfig, tokenizer: Tokenizer, *, seed: int) -> tuple[store.Prepared, str]:
    """What `prepare` makes, from the cache or into it; and a line that says which. A cache whose
    hashes, at some 0.6 s a GB, do not agree is made anew. CheckpointError: it cannot be written."""
    name, why = store.key(config, tokenizer, seed), ""
    folder = config.cache and config.cache / name
    gc.disable()  # cost: Python's search for cycles would walk all rows again and again
    try:
        if folder and folder.is_dir():
            try:
                files.verify_folder(folder)
                return store.load(folder), f"data: from the cache {folder}"
            except CheckpointError as error:
                why = f"warning: {error}: made anew\n"
        data = prepare(config, tokenizer, seed=seed)
        data.notes["key"] = name
        if folder is None:
            return data, "data: prepared, and not kept"
        if store.key(config, tokenizer, seed) != name:
            raise DataError("a data file changed while it was read: start again")
        num_tokens = sum(sum(map(len, split.documents)) for _, split in data.splits())
        with files.write_folder(folder, needed_bytes=4 * num_tokens) as temp:
            store.save(data, temp)
        return store.load(folder), f"{why}data: prepared, and kept in the cache {folder}"
    except (CheckpointError, OSError) as error:
        raise CheckpointError(f"{error}; or do without a cache: --data.cache None") from error
    finally:
        gc.enable()

def prepare(config: DataConfig, tokenizer: Tokenizer, *, seed: int,
            labels: Names = None) -> store.Prepared:
    """All splits of a run; `labels` are the classes of a model that is only evaluated, None: those
    of the training rows. DataError: a file, column, label or row that cannot be used."""
    notes, splits = {}, {"train": Split(), "dev": Split()}
    parts = collect(config, notes)
    for name, part in parts.items():
        tidy(config, part, name, notes)
    if "train" in parts:
        train = parts.pop("train")
        compare(config, train, parts, notes)
        if dev := hold_out(config, train, seed):
            lost = leaks(train.examples, dev)
            settle("leak to rows held out", config.leaks == "drop", train, lost, notes)
        parts = {"train": train, **dev, **parts}
        if isinstance(config, configs.ScoredDataConfig):
            labels = labels or (config.label,)
        elif isinstance(config, configs.TextsConfig | configs.TaggedDataConfig):
            are_tags = isinstance(config, configs.TaggedDataConfig)
            labels = labels or label_map(train.examples, are_tags=are_tags)
        balance(config, train, seed, notes)
    for name, part in parts.items():
        split = splits[name] = encode(config, part.examples, tokenizer, labels)
        split.rejected[:0], split.num_rows = part.rejected, part.num_rows
        if name == "train" and not isinstance(config, configs.PromptsDataConfig):  # not judged
            split.chats = []
        notes.setdefault("statistics", {})[name] = store.statistics(split, tokenizer, labels)
    return store.Prepared(splits.pop("train"), splits.pop("dev"), splits, labels, notes)

def tidy(config: DataConfig, part: Rows, split: str, notes: Notes) -> None:
    """Texts in one normal form, the same in every split; the notes count what was found."""
    found, lost, lost_in = Counter(), [], PATTERNS["mojibake"].findall
    normal = partial(normalised, form=config.unicode, unescape=config.unescape)
    if isinstance(config, configs.TaggedDataConfig):  # a word of which nothing is left stays
        normal = partial(lambda plain, word: plain(word) or word, normal)
    for index, example in enumerate(part.examples):
        before = example.texts
        after = before if config.unicode == "off" else tuple(map(normal, before))
        found["mojibake"] += sum(map(len, map(lost_in, filterfalse(str.isascii, after))))
        if after != before:
            found["texts changed"] += 1
            part.examples[index] = example = example.with_texts(after)
        if not all(after) and not isinstance(example, Chat):
            lost.append(left_out(example, "empty, once it is normalised", "filter"))
    notes.setdefault("found", {})[split] = {name: n for name, n in found.items() if n}
    part.drop(lost)

def normalised(text: str, *, form: Literal["nfc", "nfkc"] = "nfc", unescape: bool = False) -> str:
    """One form for texts that look the same: line breaks become "\\n"; white space at the ends of
    lines and of the text, and characters that do nothing, are dropped. C1 characters stay: in
    10,000 IMDB reviews each is a byte of Windows-1252. With `unescape` HTML entities that end in
    ";" become characters. Steps are repeated until none changes the text."""
    before = None
    if text.isascii() and not (PATTERNS["control"].search(text) or " \n" in text or "\t\n" in text
                               or text[-1:].isspace() or (unescape and "&" in text)):
        return text
    while text != before:
        before = text
        if unescape:
            text = PATTERNS["entity"].sub(_character, text)
        text = PATTERNS["break"].sub("\n", unicodedata.normalize(form.upper(), text))
        text = PATTERNS["trailing"].sub("", PATTERNS["unseen"].sub("", text)).rstrip("\n")
    return text

def _character(entity: re.Match[str]) -> str:
    is_known = entity[1][0] == "#" or f"{entity[1]};" in html.entities.html5
    return html.unescape(f"&{entity[1]};") if is_known else f"&{entity[1]};"

def compare(config: DataConfig, train: Rows, held: Mapping[str, Rows], notes: Notes) -> None:
    """Leaves out training rows that repeat others or give a held-out one away, if asked to."""
    if config.duplicates != "off":
        notes["conflicts"] = conflicts(train.examples)
        equal = repeated(train.examples)
        settle("duplicate", config.duplicates != "report", train, equal, notes)
    if held:
        settle("leak", config.leaks == "drop", train, leaks(train.examples, held), notes)
    if config.duplicates != "off":
        others, is_dropped = besides(train.examples, equal), config.duplicates == "near"
        lost = nearly_repeated(others, dedup.COMMON if is_dropped else 1.0)
        settle("near duplicate", is_dropped, train, lost, notes)

def repeated(examples: Sequence[Example]) -> list[Rejected]:
    first, lost = {}, []
    for example in examples:
        roles = [m["role"] for m in example.messages] if isinstance(example, Chat) else ()
        other = first.setdefault((example.target, *roles, *example.texts), example)
        if other is not example:
            lost.append(left_out(example, "duplicate", "compare", place(other)))
    return lost

def nearly_repeated(examples: Sequence[Example], max_share: float) -> list[Rejected]:
    """Rows that nearly say what another with its answer says; of chats whole, or the question."""
    lost, is_chat = [], isinstance(examples[0], Chat)
    for without in (SYSTEM, UNASKED) if is_chat else (SYSTEM,):
        alike: dict[Hashable, list[Example]] = {}
        for example in besides(examples, lost):
            alike.setdefault(None if is_chat else example.target, []).append(example)
        for rows in (rows for rows in alike.values() if len(rows) > 1):
            texts = [said(row, without=without) for row in rows]
            share = 1.0 if without == UNASKED else max_share * len(examples) / len(rows)
            for gone, stays, jaccard in dedup.duplicates(texts, max_share=share):
                example, other = rows[gone], rows[stays]
                if without != UNASKED or example.target == other.target:
                    detail = f"{place(other)}, Jaccard {jaccard:.3f}"
                    lost.append(left_out(example, "near duplicate", "compare", detail))
    return lost

def clusters(texts: Sequence[str], groups: Sequence[Hashable] = ()) -> list[int]:
    """A number for each text, the same for those that are alike or nearly so, for those of one
    group (None: of none), and for what hangs together through others."""
    parents = list(range(len(texts)))

    def root(row: int) -> int:
        while parents[row] != row:
            parents[row] = row = parents[parents[row]]
        return row

    rows, first = {}, {}  # of each text and each group: its first row
    pairs = [(rows.setdefault(f, row), row) for row, f in enumerate(map(dedup.folded, texts))]
    pairs += [(rows[a], rows[b]) for a, b, _ in dedup.alike(rows)]
    pairs += [(first.setdefault(g, row), row) for row, g in enumerate(groups) if g is not None]
    for one, other in pairs:
        parents[root(other)] = root(one)
    return [root(row) for row in range(len(texts))]

def conflicts(examples: Sequence[Example]) -> Notes:
    """Texts with several labels, prompts with several answers; of pairs, each preferred once."""
    answers: dict[tuple[str, ...], dict[Hashable, str]] = {}
    for example in examples:
        both = sorted(example.texts[-2:]) if example.rejected else ()
        found = answers.setdefault((dedup.folded(said(example, without=UNASKED)), *both), {})
        found.setdefault(example.target, place(example))
    several = {text: found for (text, *_), found in answers.items() if text and len(found) > 1}
    shown = [[text[:200], *map(list, found.items())] for text, found in several.items()]
    return {"texts": len(several), "such as": shown[:SHOWN]}

def leaks(train: Sequence[Example], held: Mapping[str, Rows]) -> list[Rejected]:
    """Training rows that give away a row of another split: the same or nearly the same text with
    the same label, or 13 words of it; of chats what the user says. Nothing of a held-out row that
    more than `dedup.SMALL` and a share of `dedup.COMMON` are near to: it is of their template."""
    there = [(example, split) for split, part in held.items() for example in part.examples]
    mine, theirs = ([said(e, without=UNASKED) for e in es] for es in (train, [e for e, _ in there]))
    lost, found = [], dedup.leaks(mine, theirs)
    near = Counter(twin for twin, kind, _ in found.values() if kind == "near")
    for row, (twin, kind, by) in found.items():
        if kind == "near" and near[twin] > max(dedup.SMALL, dedup.COMMON * len(train)):
            continue
        example, (other, split) = train[row], there[twin]
        if isinstance(example, Chat) or kind == "exact" or example.target == other.target:
            lost.append(left_out(example, f"{kind} in {split}", "compare", f"{place(other)}, {by}"))
    return lost

def settle(what: str, is_dropped: bool, train: Rows, lost: list[Rejected], notes: Notes) -> None:
    """Rows that were found leave training or are only noted."""
    shown = [[place(row), row.reason, row.detail] for row in lost]
    found = {"rows": len(lost), "left out": is_dropped, "such as": shown[:SHOWN]}
    notes.setdefault("alike", {})[what] = found
    if is_dropped and len(lost) == len(train.examples):
        problem = f"every training row has a {what}, such as {': '.join(shown[0])}"
        raise DataError(f"{problem}; name other files, or keep such rows with data.leaks report")
    if is_dropped:
        train.drop(lost)

def said(example: Example, *, without: Sequence[str] = SYSTEM) -> str:
    """What is compared: all texts; of a chat those of roles that are not left aside."""
    if not isinstance(example, Chat):
        return "\n".join(example.texts)
    kept = [m["content"] for m in example.messages if m["role"] not in without]
    return "\n".join([*kept, example.rejected] if example.rejected and without == SYSTEM else kept)

def hold_out(config: DataConfig, train: Rows, seed: int) -> dict[str, Rows]:
    """Dev rows: what is nearly alike or of one group stays together, classes keep their shares."""
    if config.dev or not config.holdout:
        return {}
    groups = [train.groups.get(example.id) or None for example in train.examples]
    is_labelled = isinstance(config, configs.LabelledDataConfig)
    strata = [example.target if is_labelled else "" for example in train.examples]
    texts = [said(e, without=UNASKED if e.rejected else SYSTEM) for e in train.examples]
    is_dev = held_out(strata, clusters(texts, groups), config.holdout, seed)
    if not is_dev.any():
        what = "rows nearly alike, or of one data.group, stay together, and each cluster is larger"
        raise DataError(f"data.holdout = {config.holdout}: {what}; hold out more, or set data.dev")
    dev = list(compress(train.examples, is_dev))
    train.drop([left_out(example, "held out as dev rows", "split") for example in dev])
    return {"dev": Rows(dev, [], len(dev))}

def held_out(strata: Sequence[Hashable], groups: Sequence[Hashable], count: int,
             seed: int) -> np.ndarray:
    """Which rows are held out (bool): `count`, or a few less where groups, which stay on one side,
    are large; strata, the classes, have the shares that they have in all rows."""
    if count >= len(strata):
        raise DataError(f"data.holdout = {count}: train has {len(strata)} rows; hold out fewer")
    # of each class: whole quotas first, the rest to the largest remainders
    quotas = {name: count * rows / len(strata) for name, rows in Counter(strata).items()}
    room = Counter({name: int(quota) for name, quota in quotas.items()})
    room.update(sorted(quotas, key=lambda name: room[name] - quotas[name])[: count - room.total()])
    members: dict[Hashable, list[int]] = {}
    for row in np.random.default_rng([seed, len(strata)]).permutation(len(strata)).tolist():
        members.setdefault(groups[row], []).append(row)
    held = np.zeros(len(strata), dtype=bool)
    for rows in members.values():
        wanted = Counter(strata[row] for row in rows)
        if wanted <= room:
            room -= wanted
            held[rows] = True
    return held

def balance(config: DataConfig, train: Rows, seed: int, notes: Notes) -> None:
    if not isinstance(config, configs.LabelledDataConfig) or config.balance == "off":
        return
    if config.label_separator:
        raise ConfigError(f"data.balance = {config.balance}: is for rows of one label; leave off")
    before, sums = train.examples, [Counter(), Counter()]
    train.examples = balanced(before, config.balance, config.balance_cap, seed)
    for found, examples in zip(sums, (before, train.examples), strict=True):
        for example in examples:
            found[example.target] += example.weight
    notes["balance"] = {name: [n, round(sums[1][name], 2)] for name, n in sorted(sums[0].items())}
    lost = besides(before, train.examples)
    train.rejected += [left_out(example, "balance", "split") for example in lost]

def balanced(examples: Sequence[Text], method: str, cap: float, seed: int) -> list[Text]:
    """Examples of one label each, their classes balanced. weights: each weighs in inverse
    proportion to its class, at most `cap`; over: rows are repeated, at most `cap` times, up to the
    size of the largest class; under: no class keeps more than `cap` times the smallest."""
    counts = Counter(example.target for example in examples)
    if method == "weights":
        even = len(examples) / len(counts)
        return [e._replace(weight=min(cap, even / counts[e.target])) for e in examples]
    largest, smallest = max(counts.values()), min(counts.values())
    random, kept = np.random.default_rng([seed, 1]), []
    for label, count in counts.items():
        rows = [row for row, example in enumerate(examples) if example.target == label]
        over, under = min(largest, math.floor(cap * count)), min(count, math.floor(cap * smallest))
        kept.append(np.resize(random.permutation(rows), over if method == "over" else under))
    return [examples[row] for row in np.sort(np.concatenate(kept)).tolist()]
