"""Cleaning: texts that must change and texts that must not."""

import re
import tarfile
from pathlib import Path
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from ftcore.data.prepare import PATTERNS, normalised
from ftcore.data.read import read_rows

MOJIBAKE = PATTERNS["mojibake"].findall

ZWNJ, ZWJ, ZWSP = "\u200c", "\u200d", "\u200b"
FAMILY = f"\U0001f469\u200d\u2764\ufe0f{ZWJ}\U0001f468 \U0001f408{ZWJ}\u2b1b"

NORMAL = [  # text, normalised
    ("e\u0301 \ufb01", "\xe9 \ufb01"),
    ("a\r\nb\rc\u2028d\u2029e\x0cf\r\x85g", "a\nb\nc\nd\ne\nf\ng"),
    ("a \nb", "a\nb"),
    ("a \nb\t\r\n\n  c\u3000\n \n\t", "a\nb\n\n  c"),
    ("\ufeffa\ufeffb\u2060c\xadd", "abcd"),
    ("a\x00\x08\x1b[0m\x7fb\tc", "a[0mb\tc"),
    (f"a{ZWSP}b{ZWNJ}c{ZWJ}d", "abcd"),
    (f"a{ZWSP}{ZWSP} ", "a"),
    ("e\x08\u0301", "\xe9"),  # dropping a character lets two others join
]
KEPT = [
    "",
    "plain text, once.\n\n\tdef f(x):  # two blanks\n\t    return x  +  1",
    "\n  indented",
    FAMILY,
    f"\u0645\u06cc{ZWNJ}\u062e\u0648\u0627\u0647\u0645",  # Persian
    f"\u0915\u094d{ZWJ}\u0937 \u0915\u094d{ZWNJ}\u0937",  # Devanagari
    f"\u1797{ZWSP}\u17a2",  # Khmer
    "it\x92s \x93so\x94\x85 and so on\x85",
    "\xa0a\u2003b \u201cquoted\u201d \u00a0x",
    "&amp; stays",
]

@pytest.mark.parametrize(("text", "normal"), NORMAL)
def test_what_changes(text, normal):
    assert normalised(text) == normal

@pytest.mark.parametrize("text", KEPT)
def test_what_stays(text):
    assert normalised(text) == text

def test_nfkc_and_entities_on_request():
    assert normalised("\ufb01\u2460 \xa0", form="nfkc") == "fi1"
    entities = "&lt;b&gt; &#39;&#x41;&nbsp;&eacute; &amp;lt; &amp;amp;#38;gt;"
    assert normalised(entities, unescape=True) == "<b> 'A\xa0\xe9 < >"
    left = "AT&T &unknown; ?a=1&copy=2 &amp &notit; #39;"
    assert normalised(left, unescape=True) == left
    assert normalised("&amp;unknown;", unescape=True) == "&unknown;"
    assert normalised("a&#8203;b&#13;&#10;c&nbsp;", unescape=True) == "ab\nc"
    assert len(normalised("&" + "amp;" * 100_000 + "lt;", unescape=True)) == 1

ODD = st.sampled_from(
    ["&", "amp;", "lt;", "#38;", "&#8203;", "&nbsp;", "\r", "\n", "\x85", " ", "\t", "\x08", "\xad"]
    + ["\ufeff", ZWSP, ZWNJ, ZWJ, "\u0301", "e", "\u0915", "\u094d", "\u2764", "\ufe0f", "\u1797"]
    + ["\U0001f469", "\u3000", "\u2028", "\ufdfa", "\u0344", "\u1100", "\u1161"]
)

@settings(max_examples=400, deadline=None)
@given(st.lists(st.one_of(ODD, st.characters())).map("".join), st.sampled_from(["nfc", "nfkc"]))
@example(f"\u2764\u0301{ZWSP}{ZWJ}\u2764{ZWJ}{ZWJ}\u2764", "nfc")
def test_normalising_twice_is_normalising_once(text, form):
    for unescape in (False, True):
        once = normalised(text, form=form, unescape=unescape)
        assert normalised(once, form=form, unescape=unescape) == once

@given(st.text(st.sampled_from("ab \t\n\r\x00&;"), max_size=40))
def test_the_fast_path_of_ascii_changes_nothing(text):
    assert normalised(text) == normalised(text + "\n\u03b1").removesuffix("\u03b1").rstrip("\n")

@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("it\x92s", 1), ("caf\xc3\xa9 \xe2\u20ac\u2122 \xc2\xa0 \xe2\x80\x99", 4), ("\ufffd", 1),
        ("\xef\xbb\xbfa \xc3\u2013", 2), ("na\xefve \xc2ME \xc3O \u20ac5 \xe2ge \u201cso\u201d", 0),
    ],
)  # fmt: skip
def test_mojibake_is_counted(text, count):
    assert len(MOJIBAKE(text)) == count and normalised(text) == text

def test_real_texts(data_dir: Path):
    """Counts of real dirt: C1 controls, control characters, entities."""

    def read(name: str, column: str, **options: object) -> list[str]:
        return [row.fields[column] for row in read_rows([data_dir / name], **options)]

    with tarfile.open(data_dir / "imdb/aclImdb_train_5000.tar.gz") as archive:
        files = [archive.extractfile(member) for member in archive if member.isfile()]
        imdb = [file.read().decode() for file in files]
    assert sum(bool(MOJIBAKE(text)) for text in imdb) == 140
    assert all(MOJIBAKE(normalised(text)) == MOJIBAKE(text) for text in imdb)
    cola = read("cola/train.tsv", "d", columns=["a", "b", "c", "d"])
    changed = [text for text in cola if normalised(text) != text]
    assert len(changed) == 3 and all("\x08" in text for text in changed)
    news = read("ag_news/test.csv.gz", "c", columns=["a", "b", "c"])
    assert sum(bool(re.search("&[a-z]+;", normalised(text))) for text in news) > 100
    assert not any(re.search("&[lg]t;", normalised(text, unescape=True)) for text in news)
