"""Exact match and command metrics, on answers as models really give them."""

import json
import pytest
from ftcore.errors import DataError
from ftcore.evaluate.metrics import exact_match, judged_command, parse_object

ALARM = '{"intent": "set_alarm", "slots": {"time": "7:30", "days": ["sat", "sun"]}}'

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
    for target in targets:
        assert set(judged_command(target, target).values()) == {1}

def test_order_and_spacing_matter_as_text_not_as_object() -> None:
    command = json.loads(ALARM)
    turned = json.dumps(dict(reversed(command.items())), indent=1)
    result = judged_command(ALARM, turned)
    assert not result["exact_match"]
    assert result["exact_match_object"] and result["slot_f1_of_row"] == 1

@pytest.mark.parametrize(
    ("wanted", "given"),
    [("1", "true"), ("1", "1.0"), ("1", '"1"'), ("0", "false"), ("{}", "[]"), ("{}", "null")],
)
def test_values_of_other_json_types_differ(wanted: str, given: str) -> None:
    template = '{"intent": "weather", "x": %s}'
    assert judged_command(template % wanted, template % given)["exact_match_object"] == 0
    assert judged_command(template % wanted, template % wanted)["exact_match_object"] == 1

@pytest.mark.parametrize(("target", "answer", "is_object", "has_intent", "slot_f1"), [
    (ALARM, '{"intent": "weather", "slots": {"time": "7:30", "days": ["sat", "mon"], "a": 1}}',
     True, False, 2 * 2 / 7),
    ('{"intent": "play_music", "slots": {"song": "Yesterday"}}', "I do not know", False, False, 0),
    ('{"intent": "weather", "slots": {}}', '{"intent": "weather", "slots": {"city": "Rome"}}',
     True, True, 0),
    ('{"intent": "weather"}', '{"intent": "weather" }', True, True, 1),
    ('{"intent": "weather"}', '{"intent": "wether"}', True, False, 0),
    (ALARM, ALARM.replace('["sat", "sun"]', '["sun", "sat"]'), True, True, 1 / 3),  # order counts
    ('{"intent": "weather"}', '{"intent": ["weather"]}', True, False, 0),
    ('{"intent": "weather"}', '{"intent": null}', True, False, 0),
    ('{"intent": "weather"}', '{"slots": {}}', True, False, 0),
    ('{"intent": "weather"}', "intent: weather", False, False, 0),
])  # fmt: skip
def test_commands_by_hand(
    target: str, answer: str, is_object: bool, has_intent: bool, slot_f1: float
) -> None:
    found = judged_command(target, answer)
    assert found["slot_f1_of_row"] == pytest.approx(slot_f1, abs=1e-15)
    assert (found["json_valid"], found["intent_accuracy"]) == (is_object, has_intent)

def test_the_intent_field_has_any_name_and_is_no_slot() -> None:
    row = '{"action": "weather", "city": "Rome"}'
    other = '{"action": "set_alarm", "city": "Rome"}'
    result = judged_command(row, other, intent="action")
    assert (result["intent_accuracy"], result["slot_f1_of_row"]) == (0, 1)

def test_an_answer_nested_deeper_than_pythons_stack_is_scored() -> None:
    deep = '{"intent": "weather", "x": ' + "[" * 900 + "]" * 900 + "}"
    assert judged_command(ALARM, deep)["json_valid"] == 1

def test_bad_targets() -> None:
    for target in ("hello", '{"intent": 3}', '{"action": "weather"}'):
        with pytest.raises(DataError, match="is not a JSON object with a text field 'intent'"):
            judged_command(target, ALARM)
