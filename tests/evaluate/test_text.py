"""Exact match and command metrics, on answers as models really give them."""

import json
import math

import pytest
from sklearn.metrics import f1_score

from ftcore.errors import DataError
from ftcore.evaluate.text import command_figures, exact_match, judged_command, parse_object

LABELS = ["play_music", "set_alarm", "weather"]
ALARM = '{"intent": "set_alarm", "slots": {"time": "7:30", "days": ["sat", "sun"]}}'

def scored(*pairs: tuple[str, str], **options: str) -> dict[str, float]:
    return command_figures(judged_command(*pair, **options) for pair in pairs)

@pytest.mark.parametrize(
    ("target", "predicted", "expected"),
    [
        ("yes", " yes\n", True),
        ("yes", "Yes", False),
        ("a b", "a  b", False),
        ("a  b", "a b", False),
        ("caf\u00e9", "cafe\u0301", False),
        ("", " ", True),
    ],
)
def test_exact_match_strips_the_ends_only(target: str, predicted: str, expected: bool) -> None:
    assert exact_match(target, predicted) is expected

@pytest.mark.parametrize(
    "text",
    [
        "",
        "Sure! " + ALARM,
        ALARM + " done",
        ALARM[:-1],
        "[1, 2]",
        '"set_alarm"',
        "{'intent': 'set_alarm'}",
        '{"intent": NaN}',
        '{"intent": -Infinity}',
        '{"intent": "set\nalarm"}',
        "[" * 100_000,
        '{"a":' * 100_000,
        '{"a": ' + "9" * 10_000 + "}",
    ],
)
def test_not_one_json_object(text: str) -> None:
    assert parse_object(text) is None
    assert parse_object(text) is None

def test_one_json_object() -> None:
    assert parse_object(f"  {ALARM}\n")["intent"] == "set_alarm"
    assert parse_object("{}") == {}

def test_a_right_answer_scores_one_everywhere() -> None:
    targets = [ALARM, '{"intent": "weather"}', '{"intent": "play_music", "slots": {}}']
    result = scored(*zip(targets, targets, strict=True))
    assert set(result.values()) == {1.0}

def test_order_and_spacing_matter_as_text_not_as_object() -> None:
    command = json.loads(ALARM)
    turned = json.dumps(dict(reversed(command.items())), indent=1)
    result = scored((ALARM, turned))
    assert (result["exact_match"], result["exact_match_object"], result["slot_f1"]) == (0, 1, 1)

@pytest.mark.parametrize(
    ("wanted", "given"),
    [("1", "true"), ("1", "1.0"), ("1", '"1"'), ("0", "false"), ("{}", "[]"), ("{}", "null")],
)
def test_values_of_other_json_types_differ(wanted: str, given: str) -> None:
    template = '{"intent": "weather", "x": %s}'
    assert scored((template % wanted, template % given))["exact_match_object"] == 0
    assert scored((template % wanted, template % wanted))["exact_match_object"] == 1

def test_slots_by_hand() -> None:
    # wanted 3 + 1 + 0 slots, given 4 + 0 + 1, right 2 (time and the first day)
    result = scored(
        (ALARM, '{"intent": "weather", "slots": {"time": "7:30", "days": ["sat", "mon"], "a": 1}}'),
        ('{"intent": "play_music", "slots": {"song": "Yesterday"}}', "I do not know"),
        ('{"intent": "weather", "slots": {}}', '{"intent": "weather", "slots": {"city": "Rome"}}'),
    )
    assert result["slot_precision"] == 2 / 5
    assert result["slot_recall"] == 2 / 4
    assert result["slot_f1"] == pytest.approx(2 * 2 / 9, abs=1e-15)
    assert result["json_valid"] == pytest.approx(2 / 3)
    assert result["intent_accuracy"] == pytest.approx(1 / 3)

def test_list_order_counts_and_a_swapped_list_has_no_right_item() -> None:
    swapped = ALARM.replace('["sat", "sun"]', '["sun", "sat"]')
    assert scored((ALARM, swapped))["slot_recall"] == pytest.approx(1 / 3)

def test_intents_equal_sklearn_with_unknown_and_unusable_ones() -> None:
    answers = [
        ("weather", '{"intent": "weather"}'),
        ("weather", '{"intent": "wether"}'),
        ("weather", '{"intent": ["weather"]}'),
        ("set_alarm", '{"intent": null}'),
        ("set_alarm", '{"slots": {}}'),
        ("set_alarm", "intent: set_alarm"),
        ("play_music", '{"intent": "set_alarm"}'),
        ("play_music", '{"intent": "play_music"}'),
    ]
    read = ["weather", "?", "?", "?", "?", "?", "set_alarm", "play_music"]
    result = scored(*((json.dumps({"intent": name}), answer) for name, answer in answers))
    expected = f1_score([name for name, _ in answers], read, labels=LABELS, average="macro")
    assert result["intent_f1_macro"] == pytest.approx(expected, abs=1e-12)
    assert result["intent_accuracy"] == 2 / 8
    assert result["json_valid"] == 7 / 8

def test_the_intent_field_has_any_name_and_is_no_slot() -> None:
    row = '{"action": "weather", "city": "Rome"}'
    other = '{"action": "set_alarm", "city": "Rome"}'
    result = scored((row, other), intent="action")
    assert (result["intent_accuracy"], result["slot_f1"]) == (0, 1)

def test_verdicts_of_a_row() -> None:
    verdicts, _, _ = judged_command('{"intent": "weather"}', '{"intent": "weather" }')
    assert verdicts == {
        "json_valid": True,
        "exact_match": False,
        "exact_match_object": True,
        "intent_correct": True,
    }

def test_nothing_to_judge_is_nan() -> None:
    result = scored(('{"intent": "weather"}', '{"intent": "weather"}'))
    assert result["exact_match"] == 1
    assert all(math.isnan(result[f"slot_{x}"]) for x in ("precision", "recall", "f1"))

def test_an_answer_nested_deeper_than_pythons_stack_is_scored() -> None:
    deep = '{"intent": "weather", "x": ' + "[" * 900 + "]" * 900 + "}"
    assert scored((ALARM, deep))["json_valid"] == 1

def test_bad_targets() -> None:
    for target in ("hello", '{"intent": 3}', '{"action": "weather"}'):
        with pytest.raises(DataError, match="is not a JSON object with a text field 'intent'"):
            judged_command(target, ALARM)
