"""Bodies of requests: JSON read strictly, and every field checked against fields.toml.

All that could raise later is refused here, before a request takes a place: what is no JSON, a key
twice, half a surrogate pair, a number that is not finite, an unknown field."""

import json
import math
import re
from collections.abc import Collection, Mapping
from typing import Any
from ftcore.deploy.http import FIELDS, JSON, Refused, require
from ftcore.errors import nearest

KINDS = {"integer": int, "number": int | float, "string": str, "boolean": bool, "array": list,
         "object": dict}
OWN, BOUNDS = {"code", "indexed", "ids"}, ("min", "max")  # JSON Schema lacks OWN
UNITS = {"Length": " bytes", "Items": " items", "Properties": " entries"}  # of minLength ...

class Fields:
    """What the body of a route may hold: `groups` of fields.toml. `numbers` are what the names of
    bounds mean; those in `flags` are options of serve.py."""

    def __init__(self, groups: str, numbers: Mapping[str, Any], flags: Collection[str]) -> None:
        rules = {name: rule for group in groups.split() for name, rule in FIELDS[group].items()}
        self.rule = {"properties": rules, "required": FIELDS["required"]}
        self.numbers, self.flags = numbers, flags

    def read(self, body: bytes) -> dict[str, Any]:
        """The fields of a body, with the defaults of those that it lacks. Raises Refused."""
        try:
            given = json.loads(body.decode(), object_pairs_hook=_unique,
                               parse_int=lambda text: int(text) if len(text) <= 20 else math.inf)
        except RecursionError:
            raise Refused("json_too_deep") from None
        except ValueError:
            raise Refused("invalid_json") from None
        require(isinstance(given, dict), code="invalid_json")
        return self._object(given, self.rule, "")

    def _object(self, given: dict[str, Any], rule: Mapping[str, Any], path: str) -> dict[str, Any]:
        fields, rules, start = {}, rule["properties"], f"{path}." if path else ""
        for name, inner in rules.items():
            if (value := given.get(name)) is not None:
                fields[name] = self._value(value, inner, start + name)
            else:
                require(name not in rule.get("required", ()), start + name, "must be given")
                fields[name] = inner.get("default")
        for name in map(shown, given.keys() - rules.keys()):
            raise Refused("unknown_parameter", start + name, nearest=nearest(name, [*rules]))
        return fields

    def _value(self, value: Any, rule: Mapping[str, Any], path: str) -> Any:
        """A value as its rule allows it; `path` is its name in errors."""
        kinds, code = rule.get("anyOf") or [rule], rule.get("code", "invalid_value")
        if "enum" in rule:
            allowed = f"must be {json.dumps(rule['enum'])[1:-1]}" if rule["enum"] else "is not done"
            require(value in rule["enum"], path, allowed, code)
        kind = next((kind for kind in kinds if fits(value, kind)), None)
        if kind is None:
            words = " or ".join(dict.fromkeys(kind["type"] for kind in kinds))
            raise Refused("invalid_value", path, said=f"must be {words}")
        for name in (name for name in kind if name.startswith(BOUNDS)):
            bound, unit, is_most = kind[name], UNITS.get(name[3:], ""), name.startswith("max")
            number = self.numbers.get(bound, bound)
            size = len(value.encode() if unit == " bytes" else value) if unit else value
            if size > number if is_most else size < number:
                flag = f" (--{bound.replace('_', '-')})" if bound in self.flags else ""
                code = kind.get("code", code) if is_most else "invalid_value"
                said = f"must be {'<=' if is_most else '>='} {number}{unit}{flag}"
                raise Refused(code, path, said=said)
        if "properties" in kind:
            return self._object(value, kind, path)
        if "ids" in kind:
            last, each = self.numbers["last_id"], kind["additionalProperties"]
            are_ids = all(re.fullmatch("[0-9]{1,9}", key) and int(key) <= last for key in value)
            require(are_ids, path, "its keys must be token ids")
            return {int(key): self._value(part, each, path) for key, part in value.items()}
        if "items" in kind:
            mark = "[{}]" if "indexed" in rule else ""
            return [self._value(part, kind["items"], path + mark.format(place))
                    for place, part in enumerate(value)]
        return value

    def schema(self) -> dict[str, Any]:
        """The rules as JSON Schema has them, without those of what is always refused."""
        def plain(rule: dict[str, Any]) -> dict[str, Any]:  # whose parts are plain already
            told = {name: self.numbers[part] if type(part) is str and name[:3] in BOUNDS else part
                    for name, part in rule.items() if name not in OWN and part != {"enum": []}}
            if fields := told.get("properties"):
                needed = [name for name in rule.get("required", ()) if name in fields]
                told |= {"type": "object", "required": needed, "additionalProperties": False}
            return told

        return json.loads(json.dumps(self.rule), object_hook=plain)

def openapi(numbers: Mapping[str, Any]) -> dict[str, Any]:
    """The routes, and what their bodies may hold, as OpenAPI 3.1 has it."""
    paths = {}
    for path, (name, groups) in FIELDS["routes"].items():
        told = {"summary": name, "responses": FIELDS["responses"]}
        if groups:
            content = {JSON: {"schema": Fields(groups, numbers, ()).schema()}}
            told["requestBody"] = {"required": True, "content": content}
        paths[path] = {"post" if groups else "get": told}
    return FIELDS["openapi"] | {"paths": paths}

def fits(value: Any, rule: Mapping[str, Any]) -> bool:
    """Whether a value is of a rule's type; of a list, its first item too."""
    kind = rule.get("type", "")
    if not isinstance(value, KINDS.get(kind, object)):
        return False
    if kind in ("integer", "number"):
        return type(value) is not bool and math.isfinite(value)
    if kind == "string":
        return value.isascii() or not re.search("[\ud800-\udfff]", value)
    return kind != "array" or not value or fits(value[0], rule["items"])

def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        require(name not in found, shown(name), code="duplicate_key")
        found[name] = value
    return found

def shown(name: str) -> str:
    """A name that a request made up, short and in ASCII."""
    return ascii(name[:64])[1:-1]
