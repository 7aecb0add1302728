"""Files to the documents of one run, every row accounted for: collect (files to examples), tidy
(one normal form), compare (duplicates, leaks), split (rows held out, classes balanced), encode."""

import gc
import math
from collections import Counter
from collections.abc import Hashable, Sequence
from functools import partial
from itertools import compress

import numpy as np

from ftcore import config as configs
from ftcore import files
from ftcore.data import clean, store
from ftcore.data.columns import Chat, DataConfig, Text, besides, label_map, left_out
from ftcore.data.compare import SYSTEM, UNASKED, clusters, compare, leaks, said, settle
from ftcore.data.encode import Names, Split, encode
from ftcore.data.read import Notes, Rows, collect
from ftcore.data.tokenizer import Tokenizer
from ftcore.errors import CheckpointError, ConfigError, DataError

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
        if isinstance(config, configs.TextsConfig) and not labels:
            is_scored = isinstance(config, configs.ScoredDataConfig)
            labels = (config.label,) if is_scored else label_map(train.examples)
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
    found, lost, lost_in = Counter(), [], clean.PATTERNS["mojibake"].findall
    normal = partial(clean.normalised, form=config.unicode, unescape=config.unescape)
    for index, example in enumerate(part.examples):
        before = example.texts
        after = before if config.unicode == "off" else tuple(map(normal, before))
        found["mojibake"] += sum(len(lost_in(text)) for text in after if not text.isascii())
        if after != before:
            found["texts changed"] += 1
            part.examples[index] = example = example.with_texts(after)
        if not isinstance(example, Chat) and not all(after):
            lost.append(left_out(example, "empty, once it is normalised", "filter"))
    notes.setdefault("found", {})[split] = {name: n for name, n in found.items() if n}
    part.drop(lost)

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
