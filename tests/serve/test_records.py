"""What is noted of each request, and what is said of it later."""

import json
from pathlib import Path
import numpy as np
import pytest
from ftcore.deploy import answers
from ftcore.deploy.http import Refused
from kernels.sampling import Token
from tests.serve.conftest import BERT, QWEN3, Client, Make, serving

THREE = BERT | {"id2label": {"0": "a", "1": "b", "2": "c"}}

def test_a_classifier_notes_calibrated_figures(made: Make) -> None:
    ask = made(THREE, "classify", temperature=2.0)
    told = ask("/v1/classify", input=["one", "two three"], calibrated=True)["data"]
    rows = ask.noted("/v1/classify", input=["one", "two three"])["rows"]
    for row, each in zip(rows, told, strict=True):
        p = np.array(each["probs"])
        assert row["label"] == each["label"]
        assert row["confidence"] == pytest.approx(p.max(), abs=1e-5)
        assert row["entropy"] == pytest.approx(-(p * np.log(p)).sum(), abs=1e-5)
    assert rows[0]["prompt_tokens"] < rows[1]["prompt_tokens"]
    assert not {"input", "answer"} & rows[0].keys()

def test_an_answer_notes_its_tokens_and_their_mean(made: Make) -> None:
    ask = made(QWEN3, "lm")
    asked = {"prompt": "one", "max_tokens": 6, "temperature": 0}
    said = ask("/v1/completions", **asked, logprobs=0)["choices"][0]["logprobs"]
    (row,) = ask.noted("/v1/completions", **asked)["rows"]
    assert row["generation_tokens"] == 6 and row["reason"] == "length" and "temperature" not in row
    assert row["logprob"] == pytest.approx(np.mean(said["token_logprobs"]), abs=1e-5)
    drawn = ask.noted("/v1/completions", **{**asked, "temperature": 0.5, "n": 2})["rows"]
    assert [row["temperature"] for row in drawn] == [0.5, 0.5]
    assert ask("/v1/completions", **asked)["choices"][0]["logprobs"] is None

@pytest.mark.parametrize(("ids", "share"), [
    ([1, 2, 3], 0.0), ([1, 2, 3, 4, 5], 0.0), ([1] * 7, 0.75), ([1, 2, 3, 4, 1, 2, 3, 4], 0.2)])
def test_repetition_is_that_of_runs_of_four(ids: list[int], share: float) -> None:
    told = answers.answer_figures([Token(id_, 0.0) for id_ in ids], "stop")
    assert told["repeated"] == pytest.approx(share)

@pytest.mark.parametrize(("text", "left"), [
    ("mail me: jo.doe+x@mail.example.org!", "mail me: [email]!"),
    ("card 4111 1111 1111 1111, thanks", "card [card], thanks"),
    ("call +49 (30) 901820 or 555-867-5309", "call [phone] or [phone]"),
    ("on 12 May at 7:30, 3 of 20 rooms, 1,000 seats", None), ("order 123456", None)])
def test_personal_data_is_left_out(text: str, left: str | None) -> None:
    assert answers.redacted(text) == (left or text)

@pytest.mark.parametrize("run", ["a", "a.", "1", "1 ", "a@", "+", "(1"])
def test_a_long_text_is_read_once(run: str) -> None:
    """A pattern that began anew at each character would take hours of these."""
    text = run * 200_000
    assert len(answers.redacted(text)) <= len(text)

def test_texts_are_logged_on_demand_without_personal_data(made: Make) -> None:
    ask = made(THREE, "classify", flags=("--log-texts",))
    (row,) = ask.noted("/v1/classify", input="I am jo@mail.org")["rows"]
    assert row["input"] == "I am [email]"

def test_what_was_given_as_ids_or_turns_is_logged_as_text(made: Make) -> None:
    ask = made(QWEN3, "lm", flags=("--log-texts",))
    ids = ask.tokenizer.encode("one two").ids_T.tolist()
    (row,) = ask.noted("/v1/completions", prompt=ids, max_tokens=2)["rows"]
    assert row["input"] == "one two" and isinstance(row["answer"], str)

def test_feedback_is_noted(made: Make) -> None:
    ask = made(THREE, "classify")
    id_ = "0123456789abcdef01234567"
    given = {"request_id": f"classification-{id_}", "label": "b", "index": 1}
    assert ask.noted("/v1/feedback", **given)["feedback"] == {
        "request_id": id_, "label": "b", "index": 1}
    for odd, param in [({"label": "b", "text": "b"}, "label"), ({}, "label"),
                       ({"text": "b"}, "text"),
                       ({"request_id": "x" * 24, "label": "b"}, "request_id"),
                       ({"request_id": None, "label": "b"}, "request_id")]:
        with pytest.raises(Refused, match=f"^{param}"):
            ask.noted("/v1/feedback", **{"request_id": id_} | odd)

def test_a_full_log_is_put_aside(decoder: Path, tmp_path: Path) -> None:
    with serving(decoder, tmp_path, "--log-mib", "1") as client:
        client.log.write_bytes(b"x" * (2**20 - 1) + b"\n")
        assert client.complete().status == client.complete().status == 200
    aside, = tmp_path.glob("log.jsonl.*")
    assert aside.read_bytes()[-1:] == b"\n" and len(aside.read_bytes()) == 2**20
    lines = [json.loads(line) for line in client.log.read_text().splitlines()]
    assert sum("rows" in line for line in lines) == 2

def test_as_many_texts_as_are_allowed_fit_and_refused_ones_are_not_noted(
    server: Client, decoder: Path, tmp_path: Path
) -> None:
    whole = {"input": ["one"] * 256}
    assert server.post("/v1/embeddings", whole).status == 200
    with serving(decoder, tmp_path, "--queue", "8", "--max-sequences", "2") as client:
        assert client.post("/v1/embeddings", whole).error[1] == "queue_full"
        (line,) = map(json.loads, client.log.read_text().splitlines())
        assert "rows" not in line
