"""Training rows beside each other and beside held-out ones: what leaves, what is only told."""

from collections.abc import Sequence
import pytest
from ftcore.builtin import chat as builtin
from ftcore.config import ChatDataConfig, LabelledDataConfig, TextDataConfig
from ftcore.data.columns import Chat, Example, Text
from ftcore.data.prepare import clusters, compare, said
from ftcore.data.read import Notes, Rows, collect
from ftcore.errors import DataError

WORDS = [f"word{n}" for n in range(60)]
LONG = " ".join(WORDS)
NEAR = " ".join([*WORDS[:59], "other"])  # 55 of 57 runs of 5 words are shared

def rows(*examples: tuple[str, str] | str, split: str = "train") -> Rows:
    made: list[Example] = []
    for number, example in enumerate(examples, start=1):
        named = {"file": f"{split}.tsv", "line": number}
        text, target = (example, None) if isinstance(example, str) else example
        made.append(Text(f"{split}{number}", (text,), target, **named))
    return Rows(made, [], len(made))

def chat(row: str, *turns: tuple[str, str]) -> Chat:
    messages = tuple({"role": role, "content": content} for role, content in turns)
    return Chat(row, messages, "chats.jsonl", int(row))

def left(part: Rows) -> list[str]:
    return [example.id for example in part.examples]

def found(config: LabelledDataConfig, train: Rows, **held: Rows) -> Notes:
    notes: Notes = {}
    compare(config, train, held, notes)
    return notes

@pytest.mark.parametrize(
    ("duplicates", "wanted"),
    [("off", [1, 2, 3, 4, 5]), ("report", [1, 2, 3, 4, 5]), ("exact", [1, 3, 4, 5])],
)
def test_equal_rows_of_one_label_leave_the_others_are_told(
    duplicates: str, wanted: Sequence[int]
) -> None:
    train = rows(("A text", "x"), ("A text", "x"), ("a text", "y"), (LONG, "x"), (NEAR, "x"))
    notes = found(LabelledDataConfig(duplicates=duplicates), train)
    assert left(train) == [f"train{n}" for n in wanted]
    if duplicates == "off":
        assert notes == {}
        return
    assert notes["conflicts"] == {
        "texts": 1,
        "such as": [["a text", ["x", "train.tsv:1"], ["y", "train.tsv:3"]]],
    }
    assert notes["alike"]["duplicate"]["rows"] == 1
    near = notes["alike"]["near duplicate"]
    assert (near["rows"], near["left out"]) == (1, False)
    assert near["such as"] == [["train.tsv:5", "near duplicate", "train.tsv:4, Jaccard 0.965"]]

def test_near_duplicates_leave_on_request_each_with_its_twin() -> None:
    train = rows((LONG, "x"), (NEAR, "x"), (NEAR + " more", "y"))
    found(LabelledDataConfig(duplicates="near"), train)
    assert len(train.examples) == 2 and {e.target for e in train.examples} == {"x", "y"}
    (lost,) = train.rejected
    assert lost.reason == "near duplicate" and "Jaccard 0.9" in lost.detail

def test_one_large_cluster_stops_for_review_where_it_would_leave() -> None:
    made = [(" ".join([*WORDS, f"end{n}"]), "x") for n in range(30)]
    with pytest.raises(DataError, match="stop for review"):
        found(LabelledDataConfig(duplicates="near"), rows(*made))
    train = rows(*made)
    notes = found(LabelledDataConfig(), train)
    assert len(train.examples) == 30 and notes["alike"]["near duplicate"]["rows"] == 29

def test_what_gives_a_held_out_row_away_leaves_training_alone() -> None:
    run = " ".join(WORDS[20:33])
    train = rows(("A text", "y"), (NEAR, "x"), (NEAR + " more", "y"), (f"so {run} it goes", "x"))
    test = rows(("a text", "x"), (LONG, "x"), split="test")
    notes = found(LabelledDataConfig(duplicates="off"), train, test=test)
    assert left(train) == ["train3"] and len(test.examples) == 2  # another label stays, if near
    assert [row.reason for row in train.rejected] == [
        "exact in test",
        "near in test",
        "13 words in test",
    ]
    assert train.rejected[2].detail == f"test.tsv:2, {run}"
    assert notes["alike"]["leak"]["left out"]
    kept = rows(("A text", "y"))
    notes = found(LabelledDataConfig(leaks="report"), kept, test=test)
    assert left(kept) == ["train1"] and notes["alike"]["leak"]["rows"] == 1

def test_what_a_template_says_gives_nothing_away() -> None:
    asks = "Tell whether the review that stands below these words speaks well of the film or not"
    train = rows(*((f"{asks}: {' '.join(WORDS[n : n + 20])}", "x") for n in range(40)))
    test = rows((f"{asks}: {' '.join(WORDS[::-2])}", "x"), split="test")
    found(LabelledDataConfig(), train, test=test)
    assert len(train.examples) == 40
    run = " ".join(WORDS[5:18])
    test = rows((f"{asks}: {run} {' '.join(WORDS[::-2])}", "x"), split="test")
    found(LabelledDataConfig(), train, test=test)
    assert len(train.examples) == 34 and train.rejected[0].detail == f"test.tsv:1, {run}"
    near = rows(*((f"{LONG} so it ends {n}", "x") for n in range(30)))
    found(LabelledDataConfig(), near, test=rows((LONG, "x"), split="test"))
    assert len(near.examples) == 30

def test_of_chats_the_questions_leak_and_conflict_and_the_system_does_not_count() -> None:
    system = ("system", LONG)
    asked = ("user", "how many bones has an adult cat")
    examples = [
        chat("1", system, asked, ("assistant", "230")),
        chat("2", system, asked, ("assistant", "about 230")),
        chat("3", system, ("user", "what do bees eat"), ("assistant", "nectar")),
    ]
    train = Rows(examples, [], 3)
    test = Rows([chat("9", asked, ("assistant", "many"))], [], 1)
    notes = found(ChatDataConfig(leaks="report"), train, test=test)
    assert len(train.examples) == 3
    assert notes["conflicts"]["texts"] == 1
    assert notes["alike"]["leak"]["rows"] == 2
    assert notes["alike"]["near duplicate"]["rows"] == 0

def test_what_is_only_reported_is_not_confused_by_rows_that_leak() -> None:
    train = rows(("A text", "x"), ("other", "x"), ("other", "x"), (LONG, "x"), (NEAR, "x"))
    notes = found(LabelledDataConfig(duplicates="report"), train, test=rows(("a text", "x")))
    assert left(train) == [f"train{n}" for n in (2, 3, 4, 5)]
    alike = notes["alike"]
    assert (alike["duplicate"]["rows"], alike["near duplicate"]["rows"]) == (1, 1)
    assert alike["near duplicate"]["such as"][0][0] == "train.tsv:5"

def test_plain_text_that_shares_words_with_held_out_text_stays_and_is_told() -> None:
    train, dev = rows(LONG, "something else"), rows(NEAR, split="dev")
    notes = found(TextDataConfig(), train, dev=dev)
    assert len(train.examples) == 2 and notes["alike"]["leak"]["rows"] == 1

def test_clusters_join_rows_that_are_nearly_alike() -> None:
    train = rows((LONG, "x"), ("a text", "x"), (NEAR, "y"))
    assert clusters([*map(said, train.examples)]) == [0, 1, 0]

def test_planted_duplicates_are_found_and_templates_are_not_gutted() -> None:
    config = ChatDataConfig(train=("builtin:chat",), duplicates="near")
    train = collect(config, {})["train"]
    faults = {row["id"]: row["fault"] for row in builtin.rows("train") if row["fault"]}
    found(config, train)
    lost = {row.id: row.reason for row in train.rejected}
    for kind in ("exact_duplicate", "near_duplicate"):
        planted = [(id_, fault["of"]) for id_, fault in faults.items() if fault["kind"] == kind]
        assert len(planted) == 285 and all(lost.keys() & pair for pair in planted)
    both = {id_ for id_, fault in faults.items() for id_ in (id_, fault.get("of"))}
    others = [id_ for id_, reason in lost.items() if reason == "near duplicate" and id_ not in both]
    assert len(others) < 0.02 * train.num_rows  # requests of one template with other values stay
