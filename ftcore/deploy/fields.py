"""Bodies of requests: JSON read strictly, and every field checked against fields.toml.

All that could raise later is refused here, before a request takes a place: what is no JSON, a key
twice, a surrogate, a number that is none or has no place in 64 bits, an unknown field.
"""

import json
import math
import tomllib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from ftcore.deploy.http import Refused
from ftcore.errors import nearest

Rule = Mapping[str, Any]
KINDS = {"integer": int, "number": int | float, "string": str, "boolean": bool, "array": list,
         "object": dict}
BOUNDS = {  # whether it holds, in words, what is compared
    "minimum": (lambda x, y: x >= y, ">= {}"), "maximum": (lambda x, y: x <= y, "<= {}"),
    "exclusiveMinimum": (lambda x, y: x > y, "> {}"),
    "minLength": (lambda x, y: len(x.encode()) >= y, "of >= {} bytes"),
    "maxLength": (lambda x, y: len(x.encode()) <= y, "of <= {} bytes"),
    "minItems": (lambda x, y: len(x) >= y, "of >= {} items"),
    "maxItems": (lambda x, y: len(x) <= y, "of <= {} items"),
    "maxProperties": (lambda x, y: len(x) <= y, "of <= {} entries")}
TABLE = tomllib.loads(Path(__file__).with_suffix(".toml").read_text("utf-8"))

class Fields:
    """What the body of a route may hold: some `groups` of fields.toml.

    numbers     what the names of bounds mean there; those in `flags` are options of serve.py
    """

    def __init__(self, groups: str, numbers: Mapping[str, Any], flags: Collection[str]) -> None:
        self.rules = {k: rule for group in groups.split() for k, rule in TABLE[group].items()}
        self.numbers, self.flags = numbers, flags

    def read(self, body: bytes) -> dict[str, Any]:
        """The fields of a body, with the defaults of those that it lacks. Raises Refused."""
        return self._object(read_json(body), self.rules, "")

    def schema(self) -> dict[str, Any]:
        """The rules in JSON Schema."""
        return self._schema({"type": "object", "properties": self.rules,
                             "additionalProperties": False})

    def _schema(self, rule: Any) -> Any:
        if isinstance(rule, list):
            return [self._schema(part) for part in rule]
        if not isinstance(rule, dict):
            return rule
        parts = {k: self.numbers[v] if k in BOUNDS and isinstance(v, str) else self._schema(v)
                 for k, v in rule.items() if k not in ("code", "indexed", "ids")}
        required = [k for k, v in rule.get("properties", {}).items() if v.get("required")]
        if isinstance(parts.get("required"), bool):
            del parts["required"]
        return parts | {"required": required} if required else parts

    def _object(self, given: Mapping[str, Any], rules: Rule, path: str) -> dict[str, Any]:
        fields = {}
        for name, rule in rules.items():
            value, where = given.get(name), f"{path}.{name}".lstrip(".")
            if value is None and rule.get("required"):
                raise Refused("invalid_value", f"{where}: must be given", where)
            fields[name] = rule.get("default") if value is None else self._value(value, rule, where)
        for name in given.keys() - rules.keys():
            shown = ascii(name)[1:-1][:64]
            said = f"{shown}: is unknown here{nearest(shown, [*rules])}"
            raise Refused("unknown_parameter", said, f"{path}.{shown}".lstrip("."))
        return fields

    def _value(self, value: Any, rule: Rule, path: str) -> Any:
        """A value, as the rule allows it."""
        if kinds := rule.get("anyOf"):
            fitting = next((kind for kind in kinds if fits(value, kind)), None)
            if fitting is None:
                words = " or ".join(dict.fromkeys(kind["type"] for kind in kinds))
                raise Refused("invalid_value", f"{path}: must be {words}", path)
            return self._value(value, {**rule, "anyOf": None, **fitting}, path)
        code = rule.get("code", "invalid_value")
        if value not in rule.get("enum", [value]):
            allowed = json.dumps(rule["enum"])[1:-1]
            raise Refused(code, f"{path}: {f'must be {allowed}' if allowed else 'is not done here'}",
                          path)
        if "type" in rule and not fits(value, {"type": rule["type"]}):
            raise Refused("invalid_value", f"{path}: must be {rule['type']}, well-formed", path)
        for name in BOUNDS.keys() & rule.keys():
            (holds, words), bound = BOUNDS[name], rule[name]
            number = self.numbers[bound] if isinstance(bound, str) else bound
            if not holds(value, number):
                flag = f" (--{bound.replace('_', '-')})" if bound in self.flags else ""
                said = f"{path}: must be {words.format(number)}{flag}"
                raise Refused(code if name[:3] == "max" else "invalid_value", said, path)
        if "properties" in rule:
            return self._object(value, rule["properties"], path)
        if "ids" in rule:
            if not all(k.isdecimal() and len(k) < 10 and k.isascii() for k in value) or any(
                    int(k) > self.numbers["last_id"] for k in value):
                raise Refused("invalid_value", f"{path}: its keys must be token ids", path)
            each = rule["additionalProperties"]
            return {int(k): self._value(v, each, path) for k, v in value.items()}
        if "items" in rule:
            places = (f"{path}[{i}]" if "indexed" in rule else path for i in range(len(value)))
            return [self._value(*each, path=where) for each, where in
                    zip(((v, rule["items"]) for v in value), places, strict=True)]
        return value

def fits(value: Any, rule: Rule) -> bool:
    """Whether a value is of a rule's type; of a list, its first item too."""
    kind = rule["type"]
    if not isinstance(value, KINDS[kind]) or isinstance(value, bool) != (kind == "boolean"):
        return False
    if isinstance(value, str):
        return not any("\ud800" <= c <= "\udfff" for c in value) if not value.isascii() else True
    if isinstance(value, float):
        return math.isfinite(value)
    return not (isinstance(value, list) and value and "items" in rule) or fits(
        value[0], {"type": rule["items"]["type"]})

def read_json(body: bytes) -> dict[str, Any]:
    """A JSON object in UTF-8 without a key twice; numbers that are too long are infinite."""
    try:
        value = json.loads(body.decode(), object_pairs_hook=_unique,
                           parse_int=lambda text: int(text) if len(text) <= 20 else math.inf)
    except RecursionError:
        raise Refused("json_too_deep", "the body nests too deeply") from None
    except ValueError:
        raise Refused("invalid_json", "the body is not JSON in UTF-8") from None
    if not isinstance(value, dict):
        raise Refused("invalid_json", "the body must be a JSON object")
    return value

def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    seen: dict[str, Any] = {}
    for key, value in pairs:
        if key in seen:
            shown = ascii(key)[1:-1][:64]
            raise Refused("duplicate_key", f"{shown}: stands twice in one object", shown)
        seen[key] = value
    return seen
