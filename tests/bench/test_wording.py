"""The words of the built-in chat data set: their form, what they name."""

from pathlib import Path
import pytest
from tests.bench.chat import phrases
from tests.bench.chat.phrases import kinds_of, wording

WORDS = Path(phrases.__file__).parent / "words"
NAMES = sorted(path.stem for path in WORDS.glob("*.toml"))

def lists(table: dict) -> list[list[str]]:
    """Every list of a table, inner tables included."""
    inner = [lists(value) for value in table.values() if isinstance(value, dict)]
    return [value for value in table.values() if isinstance(value, list)] + sum(inner, [])

@pytest.mark.parametrize("name", NAMES)
def test_a_file_says_what_it_holds_and_its_lists_are_strings(name: str) -> None:
    text = (WORDS / f"{name}.toml").read_text(encoding="utf-8")
    assert text.startswith("# ") and "\t" not in text and "\\" not in text
    assert wording(name) is wording(name)
    assert lists(wording(name)) and all(lists(wording(name)))
    for entry in (entry for entries in lists(wording(name)) for entry in entries):
        assert isinstance(entry, str) and entry == " ".join(entry.split(" "))
        assert "\n" not in entry and entry.count("{") == entry.count("}")

def test_a_table_is_read_as_it_stands() -> None:
    assert wording("slots")["half"] == ["am", "pm"]
    assert wording("intents")["tails"][1] == ", please"
    assert wording("intents")["intents"]["translate"]["share"] == 8
    assert "".join(wording("slots")["first"]).isascii() is False

def test_every_kind_that_is_named_exists() -> None:
    grammar = wording("slots")
    for form in (form for forms in grammar.values() for form in forms):
        assert kinds_of(form).keys() <= grammar.keys(), form
