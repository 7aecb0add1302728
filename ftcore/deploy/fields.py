"""Bodies of requests: JSON read strictly, and every field checked against fields.toml.

All that could raise later is refused here, before a request takes a place: what is no JSON, a key
twice, half a surrogate pair, a number that is not finite, an unknown field.
"""

import json
import math
import re
import tomllib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from ftcore.deploy.http import Refused
from ftcore.errors import nearest

Rule = Mapping[str, Any]
KINDS = {"integer": int, "number": int | float, "string": str, "boolean": bool, "array": list,
         "object": dict}
BOUNDS = {"minimum": "", "maximum": "", "minLength": "bytes", "maxLength": "bytes",
          "minItems": "items", "maxItems": "items", "maxProperties": "entries"}  # their units
TABLE = tomllib.loads(Path(__file__).with_suffix(".toml").read_text("utf-8"))

class Fields:
    """What the body of a route may hold: `groups` of fields.toml. `numbers` are what the names of
    bounds mean; those in `flags` are options of serve.py."""

    def __init__(self, groups: str, numbers: Mapping[str, Any], flags: Collection[str]) -> None:
        rules = {name: rule for group in groups.split() for name, rule in TABLE[group].items()}
        self.rule = {"type": "object", "properties": rules,
                     "required": [name for name in rules if name in TABLE["required"]]}
        self.numbers, self.flags = numbers, flags

    def read(self, body: bytes) -> dict[str, Any]:
        """The fields of a body, with the defaults of those that it lacks. Raises Refused."""
        if not isinstance(given := read_json(body), dict):
            raise Refused("invalid_json", "the body must be a JSON object")
        return self._object(given, self.rule, "")

    def _value(self, value: Any, rule: Rule, path: str) -> Any:
        """A value as its rule allows it; `path` is its name in errors."""
        kinds, code = rule.get("anyOf") or [rule], rule.get("code", "invalid_value")
        if value not in rule.get("enum", [value]):
            allowed = f"must be {json.dumps(rule['enum'])[1:-1]}" if rule["enum"] else "is not done"
            raise Refused(code, f"{path}: {allowed}", path)
        if (kind := next((kind for kind in kinds if fits(value, kind)), None)) is None:
            words = " or ".join(dict.fromkeys(kind["type"] for kind in kinds))
            raise Refused("invalid_value", f"{path}: must be {words}", path)
        for name in BOUNDS.keys() & kind.keys():
            bound, unit, is_most = kind[name], BOUNDS[name], name.startswith("max")
            number = self.numbers[bound] if isinstance(bound, str) else bound
            size = len(value.encode() if unit == "bytes" else value) if unit else value
            if size > number if is_most else size < number:
                flag = f" (--{bound.replace('_', '-')})" if bound in self.flags else ""
                said = f"{path}: must be {'<=' if is_most else '>='} {number} {unit}".rstrip()
                code = kind.get("code", code) if is_most else "invalid_value"
                raise Refused(code, said + flag, path)
        if "properties" in kind:
            return self._object(value, kind, path)
        if "ids" in kind:
            if any(not re.fullmatch("[0-9]{1,9}", key) or int(key) > self.numbers["last_id"]
                   for key in value):
                raise Refused("invalid_value", f"{path}: its keys must be token ids", path)
            each = kind["additionalProperties"]
            return {int(key): self._value(part, each, path) for key, part in value.items()}
        if "items" in kind:
            mark = "[{}]" if "indexed" in rule else ""
            return [self._value(part, kind["items"], path + mark.format(place))
                    for place, part in enumerate(value)]
        return value

    def _object(self, given: Mapping[str, Any], rule: Rule, path: str) -> dict[str, Any]:
        fields, rules = {}, rule["properties"]
        for name, inner in rules.items():
            value, place = given.get(name), f"{path}.{name}".lstrip(".")
            if value is None and name in rule.get("required", ()):
                raise Refused("invalid_value", f"{place}: must be given", place)
            is_given = value is not None
            fields[name] = self._value(value, inner, place) if is_given else inner.get("default")
        for name in map(shown, given.keys() - rules.keys()):
            said, place = f"{name}: is unknown here{nearest(name, [*rules])}", f"{path}.{name}"
            raise Refused("unknown_parameter", said, place.lstrip("."))
        return fields

def fits(value: Any, rule: Rule) -> bool:
    """Whether a value is of a rule's type; of a list, its first item too."""
    kind = rule.get("type", "")
    if not isinstance(value, KINDS.get(kind, object)):
        return False
    if kind in ("integer", "number"):
        return type(value) is not bool and math.isfinite(value)
    if kind == "string":
        return value.isascii() or not re.search("[\ud800-\udfff]", value)
    return kind != "array" or not value or fits(value[0], rule["items"])

def read_json(body: bytes) -> Any:
    """JSON in UTF-8 without a key twice; integers that are too long are infinite."""
    try:
        return json.loads(body.decode(), object_pairs_hook=_unique,
                          parse_int=lambda text: int(text) if len(text) <= 20 else math.inf)
    except RecursionError:
        raise Refused("json_too_deep", "the body nests too deeply") from None
    except ValueError:
        raise Refused("invalid_json", "the body is not JSON in UTF-8") from None

def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names, found = [name for name, _ in pairs], dict(pairs)
    if len(found) < len(pairs):
        twice = shown(next(name for place, name in enumerate(names) if name in names[:place]))
        raise Refused("duplicate_key", f"{twice}: stands twice in one object", twice)
    return found

def shown(name: str) -> str:
    """A name that a request made up, short and in ASCII."""
    return ascii(name[:64])[1:-1]
