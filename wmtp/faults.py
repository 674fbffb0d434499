"""What is wrong with parameters in one line: what, where, expected, found, how to mend.

Places are keys of the file, so that they can be followed. Pydantic's own also name the members of unions that a value was tried against.
"""

import copy
import re
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError

Fault = Mapping[str, Any]
"""One of ValidationError.errors()."""


def _says(path: Sequence[Any]) -> str:
    """Where the schema has what stands at `path`."""
    return f"wmtp/{'method_schema' if path[0] == 'methods' else 'params'}.py says what"


def one_line(error: ValidationError, values: Any, schema: type[BaseModel], where: str) -> str:
    """The first fault of `values`; missing and unknown keys of one block together. `error` is what `schema` said of `values`."""
    faults = error.errors(include_url=False)
    together = [fault for fault in faults if fault["loc"][:-1] == faults[0]["loc"][:-1]]
    # A word that the block's form cannot have shows that another form was meant, with other keys.
    first = next((fault for fault in together if fault["type"] == "literal_error"), faults[0])
    odd = [fault for fault in together if fault["type"] in ("missing", "extra_forbidden")]
    if first in odd:
        told = _keys(odd, values)
    elif first["type"] in ("union_tag_invalid", "union_tag_not_found"):
        told = _choice(first, values, schema)
    else:
        told = _value(first, values)
    return f"{where}: {told}"


def _keys(odd: Sequence[Fault], values: Any) -> str:
    """Missing and unknown keys of one block."""
    missing, unknown = ([str(fault["loc"][-1]) for fault in odd if fault["type"] == kind] for kind in ("missing", "extra_forbidden"))
    path, form = _place(odd[0], values)
    told = f" (with {form})" if form else ""
    if len(odd) > 1:
        lists = [f"{kind} keys: {', '.join(names)}" for kind, names in (("missing", missing), ("unknown", unknown)) if names]
        mend = [word for word, names in (("add the missing", missing), ("remove the unknown or correct their spelling", unknown)) if names]
        return f"{_dotted(path[:-1])}{told}: {'; '.join(lists)}; {', '.join(mend)} ({_says(path)} each means)"
    if missing:
        return f"{_dotted(path)}: this key is missing{told}; add it ({_says(path)} it means)"
    return f"{_dotted(path)}: unknown key{told}; remove it or correct its spelling"


def _choice(fault: Fault, values: Any, schema: type[BaseModel]) -> str:
    """A key that chooses the form of its block, left out or with a value that chooses none."""
    path, form = _place(fault, values)
    key = fault["ctx"]["discriminator"].strip("'")
    told = f" (with {form})" if form else ""
    if fault["type"] == "union_tag_invalid":
        expected, found = fault["ctx"]["expected_tags"], _short(fault["input"][key])
        return f"{_dotted([*path, key])}: Input should be one of {expected}, found {found}{told}"
    choices = _choices(fault, [*path, key], values, schema)
    return f"{_dotted([*path, key])}: this key is missing; add it, one of {choices}{told} ({_says(path)} they mean)"


def _choices(fault: Fault, path: Sequence[Any], values: Any, schema: type[BaseModel]) -> str:
    """The values that a key may have which was left out. Pydantic names them where a value is wrong, so it is given one."""
    changed = copy.deepcopy(values)
    _at(changed, path[:-1])[path[-1]] = None
    try:
        schema.model_validate(changed)
    except ValidationError as error:
        return next(other["ctx"]["expected_tags"] for other in error.errors() if other["loc"] == fault["loc"])
    raise AssertionError(f"{_dotted(path)}: null chooses a form")


def _value(fault: Fault, values: Any) -> str:
    path, form = _place(fault, values)
    found, place = fault["input"], f"{_dotted(path)}: " if path else ""
    if fault["type"] == "value_error":  # of a validator of the schema, which says what it found
        return f"{place}{fault['ctx']['error']}"
    if isinstance(found, str) and re.fullmatch(r"[-+]?\d+[eE][-+]?\d+", found):
        mantissa, exponent = re.split("[eE]", found)
        return f"{place}YAML reads {found} as text, expected a number; write {mantissa}.0e{int(exponent):+d}"
    if fault["type"] != "literal_error" or not form:
        return f"{place}{fault['msg']}, found {_short(found)}"
    if path[-1] not in form:
        return f"{place}{fault['msg']}, found {_short(found)} (with {form})"
    key, (other, choice), expected = path[-1], list(form.items())[-1], fault["ctx"]["expected"]
    return (
        f"{_dotted(path[:-1])}: {key} {found!r} does not go with {other} {choice!r}, which expects {key} {expected}; change one of the two"
    )


class _Form(dict[str, str]):
    """Keys that chose the form of a block, outermost first, and their values."""

    def __str__(self) -> str:
        return ", ".join(f"{key} {value!r}" for key, value in self.items())


def _place(fault: Fault, values: Any) -> tuple[list[Any], _Form]:
    """The keys that lead to the faulty value, and the form of the block that it lies in."""
    loc = list(fault["loc"])
    absent = loc[-1:] if fault["type"] == "missing" else []  # its block is the input
    found = _followed(loc[: len(loc) - len(absent)], values, fault["input"])
    if found is None:
        return loc, _Form()
    path, tags = found
    block = fault["input"] if absent or fault["type"].startswith("union_tag") else _at(values, path[:-1])
    items = block.items() if isinstance(block, Mapping) else ()
    return path + absent, _Form((key, value) for tag in tags for key, value in items if isinstance(value, str) and value == tag)


def _followed(loc: Sequence[Any], value: Any, target: Any) -> tuple[list[Any], list[Any]] | None:
    """(the parts of `loc` that are keys on the way from `value` to `target`, that very object; the other parts), or None: no such way."""
    if not loc:
        return ([], []) if value is target else None
    head, *rest = loc
    is_key = head in value if isinstance(value, Mapping) else isinstance(value, list | tuple) and head in range(len(value))
    if is_key and (found := _followed(rest, value[head], target)):
        return [head, *found[0]], found[1]
    found = _followed(rest, value, target)
    return found and (found[0], [head, *found[1]])


def _at(values: Any, path: Sequence[Any]) -> Any:
    for part in path:
        values = values[part]
    return values


def _dotted(path: Sequence[Any]) -> str:
    return ".".join(map(str, path)) or "(top level)"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
