"""Training rows beside each other and beside those held out: duplicates, conflicts, leaks."""

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence

from ftcore.data import dedup
from ftcore.data.columns import Chat, DataConfig, Example, Rejected, besides, left_out, place
from ftcore.data.read import Notes, Rows
from ftcore.errors import DataError

SHOWN = 100  # findings that are noted by name; the rest is counted
SYSTEM, UNASKED = ("system",), ("system", "assistant")  # roles whose turns are not compared

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
            detail = f"{place(other)}, {by}"
            lost.append(left_out(example, f"{kind} in {split}", "compare", detail))
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
