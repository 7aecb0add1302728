"""Prompts that begin like earlier ones: what is told of it, to whom, and that nothing else is."""

from pathlib import Path
from typing import Any
import numpy as np
from ftcore.data.tokenizer import Tokenizer
from tests.serve.conftest import QWEN3, Client, Make, serving

QUESTION = {"role": "user", "content": "what is the answer to the other question?"}
NAMES = "ft_prefix_cache_queries_total", "ft_prefix_cache_hits_total"

def cached(answer: Any) -> int:
    return answer["usage"]["prompt_tokens_details"]["cached_tokens"]

def test_two_turns_of_a_chat_are_as_without(decoder: Path, tmp_path: Path) -> None:
    """The same texts and log-probabilities; the second turn finds the first, its answer too."""
    asked = {"temperature": 0, "max_tokens": 24, "logprobs": True, "ignore_eos": True}
    z = str(Tokenizer.load(decoder).encode("z").ids_T[0])  # so that its text has its tokens

    def talk(client: Client) -> list[Any]:
        told = []
        for turns in (1, 3, 3):
            said = [choice["message"] for answer in told for choice in answer["choices"]][:1]
            earlier = [{key: one[key] for key in ("role", "content")} for one in said]
            messages = [QUESTION, *earlier, QUESTION][:turns]
            bias = {} if told else {z: 100}
            told.append(client.chat(messages=messages, logit_bias=bias, **asked).json)
        return told

    with serving(decoder, tmp_path) as client:
        before, found = client.metrics(), talk(client)
        after = client.idle()
        events = client.chat(QUESTION["content"], stream=True,
                             stream_options={"include_usage": True}).events
        # an echo is read whole, its answer is not
        prompt = "the question and the answer to the other question, " * 3
        echoed = [client.complete(prompt=prompt, echo=True, logprobs=1).json for _ in range(2)]
    with serving(decoder, tmp_path / "off", "--prefix-tokens", "0") as client:
        assert "kept of ended sequences 0.0 MiB" in client.printed
        without = talk(client)
        alone = client.complete(prompt=prompt, echo=True, logprobs=1).json
        assert client.metrics()[NAMES[1]] == 0
    for one, other in zip([*found, *echoed], [*without, alone, alone], strict=True):
        choices = one["choices"][0], other["choices"][0]
        assert choices[0].get("text") == choices[1].get("text")
        assert choices[0].get("message") == choices[1].get("message")
        said = [choice["logprobs"] for choice in choices]
        values = [[part["logprob"] for part in each["content"]] if "content" in each
                  else each["token_logprobs"][1:] for each in said]
        assert np.allclose(*values, atol=1e-4)
    sizes = [answer["usage"]["prompt_tokens"] for answer in found]
    first, second, third = map(cached, found)
    assert first == 0 and sizes[0] + 8 < second < sizes[1] and third == (sizes[1] - 1) // 16 * 16
    told = [after[name] - before[name] for name in NAMES]
    assert told == [sum(sizes), second + third]
    assert cached(events[-2]) == (sizes[0] - 1) // 16 * 16 > 0
    assert [*map(cached, [*without, *echoed, alone])] == [0] * 4 + [16, 0]

def test_two_keys_never_share(keyed: Client) -> None:
    for expected in (0, 16):
        for keyed.key in ("alpha", "beta"):
            told = keyed.chat("one and the other question", max_tokens=2).json
            assert told["usage"]["prompt_tokens"] > 16 and cached(told) == expected
    keyed.key = "alpha"

def test_several_answers_count_their_prompt_once(made: Make) -> None:
    ask = made(QWEN3, "lm")
    ask.engine.prefixes.most = 8
    for expected in (0, 16):
        told = ask("/v1/chat/completions", messages=[QUESTION], n=3, max_tokens=2)
        assert cached(told) == expected // 16 * ((told["usage"]["prompt_tokens"] - 1) // 16 * 16)
