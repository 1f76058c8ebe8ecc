"""The JSON Schema of a benchmark document, and a check against it that needs no package."""

from __future__ import annotations

from typing import Any, Dict, Iterator, List

FORMAT = "asymtrack-edge-benchmark"
VERSION = 1

_TEXT: Dict[str, Any] = {"type": "string"}
_TEXT_OR_NULL: Dict[str, Any] = {"type": ["string", "null"]}
_NUMBER: Dict[str, Any] = {"type": "number"}
_NUMBER_OR_NULL: Dict[str, Any] = {"type": ["number", "null"]}
_WHOLE_OR_NULL: Dict[str, Any] = {"type": ["integer", "null"]}
_NUMBERS: Dict[str, Any] = {"type": "object", "additionalProperties": _NUMBER}
_TEXTS: Dict[str, Any] = {"type": "array", "items": _TEXT}


def _object(properties: Dict[str, Any]) -> Dict[str, Any]:
    """All properties required, no others."""
    return {
        "type": "object",
        "properties": properties,
        "required": sorted(properties),
        "additionalProperties": False,
    }


_SUBJECT = _object(
    {
        **dict.fromkeys(
            ("name", "tracker", "backend", "form", "device", "precision", "template", "weights", "model_sha256"), _TEXT
        ),
        "threads": _WHOLE_OR_NULL,
        "batch": {"type": "integer", "minimum": 1},
        "multiply_adds": _WHOLE_OR_NULL,
        "notes": _TEXTS,
    }
)
_DEVICE = _object(
    {
        **dict.fromkeys(
            ("cpu", "board", "gpu", "compute_capability", "driver", "l4t", "jetpack", "power_mode"), _TEXT_OR_NULL
        ),
        **dict.fromkeys(("os", "kernel", "asymtrack_edge", "python"), _TEXT),
        "cores": {"type": "integer", "minimum": 1},
        "ram_mb": _WHOLE_OR_NULL,
        "virtual_machine": {"type": ["boolean", "null"]},
        "clocks_locked": {"type": ["boolean", "null"]},
        "versions": {"type": "object", "additionalProperties": _TEXT},
    }
)
_CONDITIONS = _object(
    {"temperatures": _NUMBERS, "cpu_mhz": _NUMBER_OR_NULL, "gpu_mhz": _NUMBER_OR_NULL, "load": _NUMBER_OR_NULL}
)
_LATENCY = {
    "anyOf": [
        {"type": "null"},
        _object(
            {
                "count": {"type": "integer", "minimum": 1},
                **dict.fromkeys(("mean", "median", "trimmed_mean", "std", "min", "max", "p90", "p95", "p99"), _NUMBER),
            }
        ),
    ]
}
_ROW = _object(
    {
        "protocol": {"enum": ["P1", "P2", "P3", "P4", "P5", "P6", "P7", "P8", "startup"]},
        "subject": _SUBJECT,
        "device": _DEVICE,
        "before": _CONDITIONS,
        "after": _CONDITIONS,
        "latency": _LATENCY,
        "fps": _NUMBER_OR_NULL,
        "stages": _NUMBERS,
        "values": _NUMBERS,
        "share_of_peak": _NUMBER_OR_NULL,
        "notes": _TEXTS,
        "samples": {"type": "array", "items": _NUMBER},
    }
)
_RATIO = _object(
    {
        **dict.fromkeys(("protocol", "name", "base", "warning"), _TEXT),
        **dict.fromkeys(("speedup", "low", "high"), _NUMBER),
        "rounds": {"type": "integer", "minimum": 1},
        "verdict": {"enum": ["faster", "slower", "equal", "inconclusive"]},
    }
)
_LAYER = _object({"model": _TEXT, "operator": _TEXT, "name": _TEXT, "milliseconds": _NUMBER})
_BESIDE = _object(
    {
        **dict.fromkeys(("table", "what", "paper_device", "device", "name"), _TEXT),
        "same_device": {"type": "boolean"},
        **dict.fromkeys(("measured", "published", "ratio"), _NUMBER_OR_NULL),
    }
)

#: JSON Schema (draft 2020-12) of a document.
SCHEMA: Dict[str, Any] = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "title": f"{FORMAT}, version {VERSION}",
    **_object(
        {
            "format": {"const": FORMAT},
            "version": {"const": VERSION},
            "created": _TEXT,
            "command": _TEXT,
            "rows": {"type": "array", "items": _ROW},
            "ratios": {"type": "array", "items": _RATIO},
            "layers": {"type": "array", "items": _LAYER},
            "paper": {"type": "array", "items": _BESIDE},
            "values": _NUMBERS,
            "messages": _TEXTS,
        }
    ),
}

_TYPES: Dict[str, Any] = {
    "object": dict,
    "array": list,
    "string": str,
    "boolean": bool,
    "null": type(None),
    "number": (int, float),
    "integer": int,
}


def _is(value: Any, name: str) -> bool:
    # In Python a bool is an int; in JSON it is not.
    if isinstance(value, bool) and name in ("number", "integer"):
        return False
    return isinstance(value, _TYPES[name])


def violations(value: Any, schema: Dict[str, Any], at: str = "document") -> Iterator[str]:
    """Yields what breaks a schema, for the keywords that ``SCHEMA`` uses."""
    if "const" in schema and value != schema["const"]:
        yield f"{at} is {value!r}, not {schema['const']!r}"
    if "enum" in schema and value not in schema["enum"]:
        yield f"{at} is {value!r}, not one of {schema['enum']}"
    if "anyOf" in schema and all(any(True for _ in violations(value, s, at)) for s in schema["anyOf"]):
        yield f"{at} fits no alternative"
    kinds = schema.get("type")
    names: List[str] = [kinds] if isinstance(kinds, str) else list(kinds or ())
    if names and not any(_is(value, name) for name in names):
        yield f"{at} is {type(value).__name__}, not {' or '.join(names)}"
        return
    if "minimum" in schema and value < schema["minimum"]:
        yield f"{at} is {value}, less than {schema['minimum']}"
    if isinstance(value, dict):
        properties = schema.get("properties", {})
        for name in schema.get("required", ()):
            if name not in value:
                yield f"{at} has no {name!r}"
        for name, item in value.items():
            inner = properties.get(name, schema.get("additionalProperties", True))
            if inner is False:
                yield f"{at} has an unknown {name!r}"
            elif isinstance(inner, dict):
                yield from violations(item, inner, f"{at}.{name}")
    if isinstance(value, list) and "items" in schema:
        for i, item in enumerate(value):
            yield from violations(item, schema["items"], f"{at}[{i}]")
