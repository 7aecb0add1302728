"""The rows of the built-in chat data set: faults, splits, values, wording, wrong answers."""

import json
import os
import re
import subprocess
import sys
import unicodedata
from collections import Counter
from random import Random
import pytest
from ftcore.builtin.chat import Row, preference_pairs
from tests.bench.chat.phrases import MAX_WORDS, SLOT, command, draw, intents, is_new, wording
from tests.bench.chat.rows import FAULTS, TRAIN_ROWS, build, misspell, rivalled, shares

TESTS = ("test_values", "test_combinations", "test_wording")
BY_NAME = {intent.name: intent for intent in intents()}

@pytest.fixture(scope="module")
def splits() -> dict[str, list[Row]]:
    return build(seed=0)

def request_of(row: Row) -> str:
    return row["messages"][0]["content"]

def answer_of(row: Row) -> str:
    return row["messages"][1]["content"]

def gist(text: str) -> str:
    return re.sub(r"\W", "", text).casefold()

def values(rows: list[Row]) -> set[str]:
    return {value.casefold() for row in rows for value in row["slots"].values()}

def clean(rows: list[Row]) -> list[Row]:
    return [row for row in rows if row["fault"] is None]

def faulty(rows: list[Row], kind: str) -> list[Row]:
    return [row for row in rows if row["fault"] and row["fault"]["kind"] == kind]

def pieces(text: str) -> set[str]:
    """Runs of five characters, as near-duplicate detection compares them."""
    return {text[at : at + 5] for at in range(len(text) - 4)}

def test_sizes_and_ids(splits):
    assert {name: len(rows) for name, rows in splits.items()} == {
        "train": sum(shares(TRAIN_ROWS)) + 7 * TRAIN_ROWS // 100,
        "dev": sum(shares(300)),
        "test_values": 256,
        "test_combinations": 256,
        "test_wording": 256,
    }
    ids = [row["id"] for rows in splits.values() for row in rows]
    assert len(set(ids)) == len(ids)
    assert all(row["id"].startswith(f"{name}-") for name, rows in splits.items() for row in rows)

def test_the_answer_is_the_command_with_values_copied_in_the_order_of_the_intent(splits):
    for row in (row for rows in splits.values() for row in clean(rows)):
        assert [message["role"] for message in row["messages"]] == ["user", "assistant"]
        expected = {"intent": row["intent"], **row["slots"]}
        assert answer_of(row) == json.dumps(expected, ensure_ascii=False)
        assert list(json.loads(answer_of(row)).items()) == list(expected.items())
        assert all(value in request_of(row) for value in row["slots"].values())
        order = BY_NAME[row["intent"]].slots
        assert list(row["slots"]) == [slot for slot in order if slot in row["slots"]]
        assert len(row["slots"]) <= 3
        assert all(len(value.split()) <= MAX_WORDS for value in row["slots"].values())

def test_a_request_without_a_typo_is_its_phrasing_with_the_values_filled_in(splits):
    for row in (row for rows in splits.values() for row in clean(rows) if not row["typo"]):
        filled = SLOT.sub(lambda part, row=row: row["slots"][part["key"]], row["phrasing"])
        assert request_of(row).casefold() == filled.casefold()

def test_typos_are_frequent_and_hand_written_wording_has_none(splits):
    for name in ("train", "dev", "test_values", "test_combinations"):
        assert 0.06 < sum(row["typo"] for row in splits[name]) / len(splits[name]) < 0.18
    assert not any(row["typo"] for row in splits["test_wording"])

def test_every_planted_fault_is_recorded_and_only_train_has_any(splits):
    counts = Counter(row["fault"]["kind"] for row in splits["train"] if row["fault"])
    base = sum(shares(TRAIN_ROWS))
    assert counts == {kind: round(rate * base) for kind, rate in FAULTS.items()}
    for name in ("dev", *TESTS):
        assert clean(splits[name]) == splits[name]

def test_duplicates_name_a_clean_twin(splits):
    twins = {row["id"]: row for row in clean(splits["train"])}
    for row in faulty(splits["train"], "exact_duplicate"):
        assert row["messages"] == twins[row["fault"]["of"]]["messages"]
    texts = Counter(request_of(row) for row in clean(splits["train"]))
    assert max(texts.values()) == 1
    for row in faulty(splits["train"], "near_duplicate"):
        twin = twins[row["fault"]["of"]]
        ours, theirs = pieces(request_of(row)), pieces(request_of(twin))
        assert request_of(row) != request_of(twin) and answer_of(row) == answer_of(twin)
        assert len(ours & theirs) / len(ours | theirs) >= 0.8
        assert all(value in request_of(row) for value in row["slots"].values())

def test_odd_unicode_is_mended_by_plain_normalisation(splits):
    odd = str.maketrans({"\u00a0": " ", "\u2019": "'", "\u200b": None, "\ufeff": None})
    rows = faulty(splits["train"], "odd_unicode")
    forms = Counter(row["fault"]["form"] for row in rows)
    assert set(forms) == {"no_break_space", "curly_quote", "zero_width", "loose_accent"}
    assert max(forms.values()) - min(forms.values()) <= 1
    for row in rows:
        mended = unicodedata.normalize("NFC", request_of(row).translate(odd))
        assert mended != request_of(row)
        assert all(value in mended for value in row["slots"].values())
        if row["fault"]["form"] != "loose_accent":
            assert all(value in request_of(row) for value in row["slots"].values())

def test_wrong_labels_keep_the_truth_beside_them(splits):
    rows = faulty(splits["train"], "wrong_label")
    for row in rows:
        assert row["fault"]["truth"] != row["intent"] == json.loads(answer_of(row))["intent"]
        core_slots = {key for part in row["combination"] for key in re.findall(r"{(\w+)", part)}
        assert core_slots <= set(BY_NAME[row["fault"]["truth"]].slots)
    assert {row["fault"]["truth"] for row in rows} > {"play_music"}

def test_empty_rows_lack_the_request_the_answer_or_both(splits):
    blanks = Counter(
        (not request_of(row).strip(), not answer_of(row).strip())
        for row in faulty(splits["train"], "empty")
    )
    assert set(blanks) == {(True, False), (False, True), (True, True)}
    others = [row for row in splits["train"] if (row["fault"] or {}).get("kind") != "empty"]
    assert all(request_of(row).strip() and answer_of(row).strip() for row in others)

def test_imbalance_is_twenty_to_one_in_train_and_none_in_the_test_splits(splits):
    truth = Counter(
        (row["fault"] or {}).get("truth", row["intent"])
        for row in splits["train"]
        if (row["fault"] or {}).get("kind") not in ("exact_duplicate", "near_duplicate", "empty")
    )
    assert [truth[intent.name] for intent in intents()] == shares(TRAIN_ROWS)
    assert max(truth.values()) / min(truth.values()) == pytest.approx(20, abs=0.5)
    assert min(truth.values()) >= 60
    for name in TESTS:
        assert set(Counter(row["intent"] for row in splits[name]).values()) == {16}

def test_thousands_are_distinct(splits):
    rows = clean(splits["train"])
    assert len({gist(request_of(row)) for row in rows}) == len(rows) > 4500
    assert len({row["phrasing"] for row in rows}) > 3500
    assert len({tuple(row["combination"]) for row in rows}) > 1000
    assert len(values(rows)) > 3000

def test_no_request_is_in_two_splits(splits):
    said = {name: {gist(request_of(row)) for row in rows} for name, rows in splits.items()}
    for name in said:
        for other in said.keys() - {name}:
            assert not said[name] & said[other] - {""}

def test_no_value_of_a_test_split_is_in_train_and_dev_has_values_of_its_side(splits):
    seen = values(splits["train"]) | values(splits["dev"])
    assert not any(map(is_new, seen))
    for name in TESTS:
        assert not values(splits[name]) & seen
        assert all(map(is_new, values(splits[name])))

def test_new_names_are_made_of_new_words(splits):
    def names(rows: list[Row]) -> set[str]:
        people = [v for row in rows for k, v in row["slots"].items() if k in ("contact", "artist")]
        return {word for name in people for word in name.split() if word.istitle()}

    everyday = {"Brothers", "Band"}
    for name in TESTS:
        assert len(names(splits[name])) > 10
        assert names(splits[name]) & names(clean(splits["train"])) <= everyday

def test_combinations_are_known_in_one_split_and_unseen_in_the_other(splits):
    trained = {(row["intent"], tuple(row["combination"])) for row in clean(splits["train"])}
    parts = {(intent, part) for intent, combination in trained for part in combination}
    phrasings = {(row["intent"], row["phrasing"]) for row in clean(splits["train"])}
    for row in splits["test_values"]:
        assert row["slots"]
        assert (row["intent"], row["phrasing"]) in phrasings
    for row in splits["test_combinations"]:
        assert (row["intent"], tuple(row["combination"])) not in trained
        assert {(row["intent"], part) for part in row["combination"]} <= parts
        assert len(row["combination"]) > 1

def test_train_shows_every_core_and_every_clause(splits):
    for intent in intents():
        rows = [row for row in clean(splits["train"]) if row["intent"] == intent.name]
        shown = {part.removesuffix(",") for row in rows for part in row["combination"]}
        assert shown == {*intent.commands, *intent.statements, *intent.clauses}
        known = Counter(part for row in rows for part in row["combination"])
        assert min(known.values()) >= 2, intent.name

def test_new_wording_holds_no_core_of_train(splits):
    requests = wording("test_wording")
    assert set(requests) == set(BY_NAME)
    cores = {core: intent for intent in intents() for core in intent.commands + intent.statements}
    for name, templates in requests.items():
        assert len(templates) == len(set(templates)) >= 8
        for core, intent in cores.items():
            words = re.sub(r"\\{.*?\\}", ".+", re.escape(core))
            # One word ("put") may serve another intent; a phrase of several may not.
            if intent.name == name or len(SLOT.sub("", core).split()) > 2:
                pattern = re.compile(rf"\b{words}(?!\w)", re.IGNORECASE)
                assert not any(map(pattern.search, templates)), (name, core)
    assert {row["phrasing"] for row in splits["test_wording"]} <= set(sum(requests.values(), []))

def test_every_slot_of_a_phrase_is_one_of_its_intent_and_can_be_drawn():
    for intent in intents():
        templates = intent.commands + intent.statements + intent.clauses
        templates += wording("test_wording")[intent.name]
        for slot in (slot for template in templates for slot in SLOT.finditer(template)):
            assert slot["key"] in intent.slots
            for new in (False, True):
                value = draw(slot["kind"] or slot["key"], Random(0), new=new)
                assert is_new(value) == new and value == value.strip() and "{" not in value

def test_same_seed_same_rows_in_any_process_and_other_seeds_differ(splits):
    assert build(seed=1)["train"] != splits["train"]
    code = "import json; from tests.bench.chat.rows import build; print(json.dumps(build(0)))"
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    output = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, check=True, text=True
    ).stdout
    assert json.loads(output) == splits

def broken(answer: str) -> bool:
    try:
        json.loads(answer)
    except json.JSONDecodeError:
        return True
    return False

def slots_altered(corruption: str, right: dict[str, str], wrong: dict[str, str]) -> bool:
    if corruption == "wrong_intent":
        return right == wrong
    if corruption == "missing_slot":
        return len(right) - len(wrong) == 1 and wrong.items() < right.items()
    differing = [key for key in right if right[key] != wrong.get(key)]
    if corruption == "swapped_slots":
        first, second = differing
        return (wrong[first], wrong[second]) == (right[second], right[first])
    return corruption == "altered_value" and right.keys() == wrong.keys() and len(differing) == 1

def test_pairs_are_right_against_wrong_as_they_say(splits):
    rows = {row["id"]: row for row in splits["train"]}
    pairs = preference_pairs(rivalled(splits["train"], seed=3))
    assert [pair["id"] for pair in pairs] == [row["id"] for row in clean(splits["train"])]
    for pair in pairs:
        row = rows[pair["id"]]
        (chosen,), (rejected,) = pair["chosen"], pair["rejected"]
        assert [*pair["prompt"], chosen] == row["messages"]
        assert rejected["role"] == "assistant" and rejected["content"] != chosen["content"]
        assert broken(rejected["content"]) == (pair["corruption"] == "broken_json")
        if pair["corruption"] != "broken_json":
            wrong = json.loads(rejected["content"])
            assert (wrong.pop("intent") != row["intent"]) == (pair["corruption"] == "wrong_intent")
            assert slots_altered(pair["corruption"], row["slots"], wrong)
    counts = Counter(pair["corruption"] for pair in pairs)
    assert len(counts) == 5 and min(counts.values()) > 300
    assert pairs == preference_pairs(rivalled(splits["train"], seed=3))
    assert pairs != preference_pairs(rivalled(splits["train"], seed=4))

@pytest.mark.parametrize("word", ["a", "aa", "aaa", "7:30", "ab"])
def test_a_misspelt_word_differs(word):
    rng = Random(0)
    assert all(misspell(word, rng) not in ("", word) for _ in range(50))

def test_command_keeps_unicode_and_escapes_quotes():
    assert command("play_music", {"title": "Dear Zo\u00eb"}) == (
        '{"intent": "play_music", "title": "Dear Zo\u00eb"}'
    )
    assert json.loads(command("translate", {"text": 'say "no"'}))["text"] == 'say "no"'
