"""The format of plan files as a JSON Schema, for editors and for programs in other languages.

It is made from the records themselves: types from their fields, descriptions from their docstrings.
"""

from __future__ import annotations

import re
from dataclasses import MISSING, Field, fields, is_dataclass
from inspect import cleandoc
from types import NoneType, UnionType
from typing import Any, get_args, get_origin

from lightning_hetero.devices.spec import DeviceSpec
from lightning_hetero.plan.plan import FORMAT, LATER_FIELDS, VERSION, Plan
from lightning_hetero.plan.read import types_of

DIALECT = "https://json-schema.org/draft/2020-12/schema"

_ATTRIBUTE = re.compile(r"^ {4}(\w+): (.+(?:\n {8}\S.*)*)", re.MULTILINE)
_PLAIN: dict[Any, dict[str, Any]] = {
    str: {"type": "string"},
    bool: {"type": "boolean"},
    int: {"type": "integer", "minimum": 0},
    float: {"type": "number", "minimum": 0},
}


def plan_schema() -> dict[str, Any]:
    """The schema of what `Plan.to_dict` writes, JSON Schema draft 2020-12, as plain JSON types."""
    records: dict[str, Any] = {}
    plan = _record(Plan, records)
    plan["properties"] = {"format": {"const": FORMAT}, "version": {"const": VERSION}, **plan["properties"]}
    plan["required"] = ["format", "version", *(name for name in plan["required"] if name not in LATER_FIELDS)]
    return {"$schema": DIALECT, "title": "Plan of lightning_hetero", **plan, "$defs": records}


def _record(cls: type[Any], records: dict[str, Any]) -> dict[str, Any]:
    said = {name: " ".join(text.split()) for name, text in _ATTRIBUTE.findall(cleandoc(cls.__doc__ or ""))}
    properties = {}
    for name, kind in types_of(cls).items():
        properties[name] = _type(kind, records) | ({"description": said[name]} if name in said else {})
    return {
        "description": (cls.__doc__ or cls.__name__).splitlines()[0],
        "type": "object",
        "properties": properties,
        "required": [field.name for field in fields(cls) if not _may_be_missing(cls, field)],
        "additionalProperties": False,
    }


def _type(kind: Any, records: dict[str, Any]) -> dict[str, Any]:
    if is_dataclass(kind) and isinstance(kind, type):
        if kind.__name__ not in records:
            records[kind.__name__] = {}  # the place, before that of what it holds
            records[kind.__name__] = _record(kind, records)
        return {"$ref": f"#/$defs/{kind.__name__}"}
    if isinstance(kind, UnionType):
        return {"anyOf": [{"type": "null"} if part is NoneType else _type(part, records) for part in get_args(kind)]}
    if get_origin(kind) is tuple:
        inner = get_args(kind)
        if inner[-1] is Ellipsis:
            return {"type": "array", "items": _type(inner[0], records)}
        return {"type": "array", "prefixItems": [_type(part, records) for part in inner], "items": False}
    return dict(_PLAIN[kind])


def _may_be_missing(cls: type[Any], field: Field[Any]) -> bool:
    if cls is DeviceSpec:
        return field.default is not MISSING or field.default_factory is not MISSING
    return field.name in getattr(cls, "LATER_FIELDS", ())


PLAN_SCHEMA = plan_schema()
"""The schema, for `json.dumps`."""
