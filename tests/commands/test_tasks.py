"""Tasks in a file: the same figures from a model here and from a server with OpenAI's API."""

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from ftcore.data.chat import encode_prompt
from ftcore.data.pack import collate
from ftcore.data.tokenizer import Tokenizer
from ftcore.evaluate.tasks import EvalTask, Local, cut
from ftcore.model.generate import generate
from ftcore.model.load import load_model
from tests.commands.test_eval import lines

Run = Callable[..., tuple[dict[str, Any], str]]
LIMITS = {"max_tokens": 200, "device": torch.device("cpu")}
ROWS = [
    {"q": "make thing", "a": "red", "b": "blue", "right": "red", "all": ["red", "blue", "cyan"]},
    {"q": "paint it", "a": "blue", "b": "red", "right": "1", "all": ["navy", "blue"]},
    {"q": "make a lamp", "a": "red one", "b": "x", "right": "x", "all": ["a", "x"]},
]

@pytest.fixture
def local(qwen3: Path) -> Local:
    loaded = load_model(qwen3, task="lm", dtype=torch.float32)
    return Local(loaded.model.eval(), Tokenizer.load(qwen3), LIMITS)

@pytest.fixture
def task_file(tmp_path: Path) -> Callable[..., Path]:
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)) + "\n", "utf-8")

    def make(**more: Any) -> Path:
        values = {"data": ["rows.jsonl"], "prompt": "{{q}} :", "target": "{{right}}", **more}
        values["data"] = [str(tmp_path / name) for name in values["data"]]
        text = "\n".join(f"{key} = {json.dumps(value)}" for key, value in values.items())
        (tmp_path / "odd.toml").write_text(text, "utf-8")
        return tmp_path / "odd.toml"

    return make

@pytest.fixture
def url(local: Local) -> Iterator[str]:
    """A server of the model, as far as tasks ask of one."""
    tokenizer = local.tokenizer

    def logprobs(text: str) -> dict[str, Any]:
        encoding = tokenizer.encode(text)
        with torch.inference_mode():
            batch = collate([_plain(encoding.ids_T)])
            hidden = local.model.trunk(
                batch.tokens_N, batch.positions_N, batch.types_N, batch.docs
            )
            log_p = local.model.head(hidden).log_softmax(-1)
        own = [None, *log_p[:-1].gather(1, batch.tokens_N[1:, None])[:, 0].tolist(), -0.5]
        return {"text_offset": [*encoding.offsets_T2[:, 0].tolist(), len(text)],
                "token_logprobs": own}  # fmt: skip

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if body["model"] != "tiny":
                self.send_error(404, "no such model")
                return
            if body.get("echo"):
                choice = {"text": body["prompt"], "logprobs": logprobs(body["prompt"])}
            else:
                prompt = body.get("prompt")
                ids = tokenizer.encode(prompt).ids_T if prompt else encode_prompt(
                    body["messages"], tokenizer)  # fmt: skip
                stop = frozenset({tokenizer.eos_id, tokenizer.end_of_text_id} - {None})
                most = body["max_tokens"]
                (made,) = generate(local.model, [ids], max_new_tokens=most, stop_ids=stop)
                said = tokenizer.decode([i for i in made if i not in stop])
                said = cut(said, body.get("stop", []))
                choice = {"text": said, "message": {"content": said}}
            told = json.dumps({"choices": [choice]}).encode()
            self.send_response(200)
            self.end_headers()
            self.wfile.write(told)

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    server.server_close()

def _plain(ids_T: Any) -> Any:
    from ftcore.data.chat import shifted

    return shifted("x", ids_T, torch.ones(len(ids_T)).numpy())

def test_likelihoods_are_those_of_the_continuation_alone(local: Local) -> None:
    pairs = [("make thing", " red"), ("make thing", " blue one"), ("x ", "y"), ("a", "bc")]
    for (prompt, text), found in zip(pairs, local.log_likelihoods(pairs), strict=True):
        encoding = local.tokenizer.encode(prompt + text)
        batch = collate([_plain(encoding.ids_T)])
        with torch.inference_mode():
            inputs = batch.tokens_N, batch.positions_N, batch.types_N, batch.docs
            log_p = local.model.head(local.model.trunk(*inputs)).log_softmax(-1)
        ends = encoding.offsets_T2[:, 1]
        expected = sum(
            log_p[t - 1, encoding.ids_T[t]].item()
            for t in range(1, len(ends)) if ends[t] > len(prompt.rstrip())
        )  # fmt: skip
        assert found == pytest.approx(expected, abs=1e-4)

@pytest.mark.parametrize("more", [
    {"max_new_tokens": 6}, {"max_new_tokens": 9, "stop": ["e", "\n"]},
    {"max_new_tokens": 6, "chat": True},
    {"choices": ["{{a}}", "{{b}}"]}, {"choices": "all"},
    {"choices": ["{{a}}", "{{b}}"], "shots": 2, "shots_from": ["rows.jsonl"]},
])  # fmt: skip
def test_here_and_behind_a_url(
    more: dict, qwen3: Path, url: str, run: Run, task_file: Callable[..., Path], tmp_path: Path
) -> None:
    if "shots_from" in more:
        more = {**more, "shots_from": [str(tmp_path / "rows.jsonl")]}
    file, exact = str(task_file(**more)), ("--env.precision", "fp32")
    here, printed = run("eval", str(qwen3), "--on", file, *exact)
    rows = lines("eval-predictions.jsonl")
    there, _ = run("eval", url, "--on", file, "--name", "tiny")
    assert here["results"] == there["results"] and here["intervals"] == there["intervals"]
    assert "odd, with 95% intervals" in printed and len(rows) == 3
    assert ("token_f1" in here["results"]["odd"]) == ("choices" not in more)
    for mine, theirs in zip(rows, lines("eval-predictions.jsonl"), strict=True):
        scores = theirs.pop("log_likelihoods", [])
        assert mine.pop("log_likelihoods", []) == pytest.approx(scores, abs=1e-4)
        assert mine == theirs
    if "choices" in more:
        lead = "make thing :red\n\npaint it :red\n\n" if "shots" in more else ""
        assert rows[0]["prompt"] == lead + "make thing :"
        assert rows[1]["target"] == ("blue" if more["choices"] == "all" else "red")  # place 1

def test_two_models_on_one_task(
    sft: list[str], qwen3: Path, run: Run, task_file: Callable[..., Path]
) -> None:
    run("train", *sft, "--loop.max-steps", "2")
    words = ("--on", str(task_file(choices="all")), "--against", str(qwen3))
    found, printed = run("eval", "runs/run", *words)
    assert f"runs/run against {qwen3}" in printed
    assert {"accuracy", "accuracy_by_byte", "mcnemar"} == found["against"]["odd"].keys()

@pytest.mark.parametrize(("more", "said"), [
    ({"promt": "x"}, "unknown key 'promt'"), ({"prompt": "{{nothing}}"}, "its columns are q, a, b"),
    ({"prompt": "{{"}, "rows.jsonl:1"), ({"choices": "q"}, "must give two choices or more"),
    ({"choices": ["{{a}}", "{{b}}"], "target": "green"}, "target 'green' is none of"),
    ({"promt": "x"}, "nearest: 'prompt'"), ({"prompt": "{{q + 1}}"}, "rows.jsonl:1"),
    ({"choices": "all", "chat": True}, "leave one out"),
])  # fmt: skip
def test_what_a_task_cannot_be(
    more: dict, said: str, qwen3: Path, task_file: Callable[..., Path], refused: Callable
) -> None:
    assert said in refused("eval", str(qwen3), "--on", str(task_file(**more)))

def test_a_server_that_is_not_there_or_refuses(
    url: str, task_file: Callable[..., Path], refused: Callable
) -> None:
    file = str(task_file())
    said = refused("eval", "http://127.0.0.1:9/v1", "--on", file)
    assert "http://127.0.0.1:9/v1/completions" in said and "is the server up" in said
    assert "no such model" in refused("eval", url, "--on", file, "--name", "other")
    assert "nowhere.toml" in refused("eval", url, "--on", "nowhere.toml")

def test_prompts_that_overlap_are_told_apart(local: Local) -> None:
    pairs = [("make thing", " red blue"), ("make thing red", " green"), ("", "red"), ("", "blue")]
    alone = [local.log_likelihoods([pair])[0] for pair in pairs]
    assert local.log_likelihoods(pairs) == pytest.approx(alone, abs=1e-4)

def test_what_is_no_language_model(
    classify: list[str], pretrain: list[str], run: Run, task_file: Callable, refused: Callable
) -> None:
    run("train", *classify)
    said = refused("eval", "runs/run", "--on", str(task_file(choices="all")))
    assert "prompts are for a language model" in said
    run("train", *pretrain, "--log.name", "text", "--loop.max-steps", "1")
    found, _ = run("eval", "runs/text", "--on", str(task_file(choices="all")))
    assert found["results"]["odd"]["accuracy"] >= 0

def test_an_answer_ends_before_the_first_stop() -> None:
    assert cut("one two three", ["three", "two"]) == "one "
    assert cut("one", []) == cut("one", ["x"]) == "one"
    assert EvalTask([""], "", "").shots == 0
