"""What /openapi.json says of the routes is so."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any
import pytest
from ftcore.data.tokenizer import Tokenizer
from ftcore.deploy.http import FIELDS
from tests.serve.conftest import QWEN3, Client
from tests.serve.test_answers import ROUTES

TYPES = {"string", "number", "integer", "boolean", "object", "array", "null"}
KNOWN = {"type", "enum", "default", "anyOf", "items", "properties", "required", "minimum",
         "maximum", "minLength", "maxLength", "minItems", "maxItems", "minProperties",
         "maxProperties", "additionalProperties"}
NEEDED = {"/v1/chat/completions": ["messages"], "/v1/completions": ["prompt"],
          "/v1/embeddings": ["input"], "/v1/classify": ["input"], "/v1/score": ["messages"],
          "/v1/feedback": ["request_id"], "/tokenize": ["prompt"], "/tokenize/chat": ["messages"],
          "/detokenize": ["tokens"]}

@pytest.fixture(scope="module")
def document(main: Client) -> dict[str, Any]:
    return main.get("/openapi.json").json

def schemas(schema: Any) -> Iterator[dict[str, Any]]:
    """A schema and those in it."""
    yield schema
    inner = [schema.get("items"), schema.get("additionalProperties"), *schema.get("anyOf", ())]
    for each in [*inner, *schema.get("properties", {}).values()]:
        if isinstance(each, dict):
            yield from schemas(each)

def bodies(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    told = {path: each["post"] for path, each in document["paths"].items() if "post" in each}
    return {path: each["requestBody"]["content"]["application/json"]["schema"]
            for path, each in told.items()}

def test_every_route_is_there_with_its_method_and_refusals(document: dict[str, Any]) -> None:
    assert document["openapi"] == "3.1.0" and {"title", "version"} <= document["info"].keys()
    assert document["paths"].keys() == ROUTES
    for path, methods in document["paths"].items():
        (method, told), = methods.items()
        assert method == ("post" if FIELDS["routes"][path][1] else "get")
        assert ("requestBody" in told) == (method == "post")
        assert told["responses"].keys() == {"200", "default"}
        assert told["responses"]["200"]["description"]
        *place, name = told["responses"]["default"]["$ref"].split("/")
        assert place == ["#", "components", "responses"]
        (content,) = document["components"]["responses"][name]["content"].values()
        assert content["schema"] == {"$ref": "#/components/schemas/refusal"}
    assert document["components"]["schemas"]["refusal"]["required"] == ["error"]

def test_bodies_are_json_schema(document: dict[str, Any], decoder: Path) -> None:
    found = bodies(document)
    assert {path: schema["required"] for path, schema in found.items()} == NEEDED
    for schema in (part for whole in found.values() for part in schemas(whole)):
        assert schema.keys() <= KNOWN and schema.get("type", "null") in TYPES
        assert set(schema.get("required", ())) <= schema.get("properties", {}).keys()
        assert schema.get("enum") != [] and schema.get("additionalProperties") is not True
        assert all(isinstance(value, int | float) for name, value in schema.items()
                   if name.startswith(("min", "max")))
    fields = found["/v1/chat/completions"]["properties"]
    assert fields["n"]["maximum"] == 8 and "structured_outputs" not in fields
    assert fields["messages"]["items"]["required"] == ["role", "content"]
    (_, ids, *_) = found["/v1/completions"]["properties"]["prompt"]["anyOf"]
    assert ids["maxItems"] == QWEN3["max_position_embeddings"]
    assert ids["items"]["maximum"] == Tokenizer.load(decoder).vocab_size - 1

def test_what_it_forbids_is_refused(document: dict[str, Any], main: Client) -> None:
    asked = {"messages": [{"role": "user", "content": "one"}], "prompt": "one", "input": "one",
             "tokens": [1], "request_id": "0" * 24, "label": "x"}
    tried = 0
    for path, schema in bodies(document).items():
        good = {name: asked[name] for name in schema["required"]}
        for name in schema["required"]:
            rest = {other: value for other, value in good.items() if other != name}
            assert main.post(path, rest).error == (400, "invalid_value", name)
        assert main.post(path, good | {"odd": 1}).error == (400, "unknown_parameter", "odd")
        for name, rule in schema["properties"].items():
            bad = [rule[name] + step for name, step in (("minimum", -1), ("maximum", 1))
                   if name in rule]
            bad += ["x" * (rule["maxLength"] + 1)] if "maxLength" in rule else []
            bad += [{"odd": 1}] if "enum" in rule or rule.get("type", "object") != "object" else []
            for value in bad:
                status, _, param = main.post(path, good | {name: value}).error
                assert (status, param) == (400, name)
                tried += 1
    assert tried > 80
