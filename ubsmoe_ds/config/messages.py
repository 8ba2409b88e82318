"""Turn the mistakes that pydantic finds into one line: key, value, remedy. Imports no torch."""

from collections.abc import Iterable, Iterator, Sequence
from difflib import get_close_matches
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

BRANCHES = ("float", "str", "int")  # of a union in pydantic's path to a value; they are not part of the key
NAME_RULE = "it may hold letters, digits, '.', '_' and '-', at most 100, and begins with a letter or a digit"


class BelowKeyError(ValueError):
    """A mistake below the key that is being checked: its message begins with the rest of the key."""


def check(section: type[BaseModel], value: Any, key: str) -> dict[str, Any]:
    """Return the keys that a mapping gives, checked and with their types as `section` declares them.

    Args:
        section: declares the keys.
        value: the mapping.
        key: where it stands, below the key that is being validated.

    Raises:
        BelowKeyError: for the first mistake.
    """
    try:
        return section.model_validate(value).model_dump(exclude_unset=True)
    except ValidationError as error:
        raise BelowKeyError(one_line(error, section, within=key, listed=True)) from error


def one_line(error: ValidationError, root: type[BaseModel], within: str = "", *, listed: bool = False) -> str:
    """Return one problem as a line, with key, value and remedy, and the number of further problems.

    Args:
        error: what pydantic found. An unknown key comes first: where a key is misspelt, another is missing.
        root: the class that was validated.
        within: the key under which the value stands.
        listed: name the keys that are known, of a section that docs/configuration.md does not list.
    """
    problems = error.errors(include_url=False)
    first = next((p for p in problems if p["type"] == "extra_forbidden"), problems[0])
    *above, last = [str(part) for part in first["loc"]] or ["["]
    parts = [part for part in above if not _is_branch(part)]
    if first["type"] == "extra_forbidden" or not _is_branch(last):  # a user's key may look like a branch
        parts.append(last)
    key = ".".join(([within] if within else []) + parts)
    if first["type"] == "value_error":
        found = first["ctx"]["error"]
        line = f"{key}{'.' if isinstance(found, BelowKeyError) else ': '}{found}" if key else str(found)
    elif first["type"] == "extra_forbidden":
        help_ = one_of(parts[-1], root.model_fields) if listed else f"see docs/configuration.md{_meant(parts, root)}"
        line = f"{key}: unknown key (value {short(first['input'])}); {help_}"
    elif first["type"] == "missing":
        line = f"{key}: is missing and must be given"
    else:
        line = f"{key}: {short(first['input'])} is not valid: {_reason(first, parts, root)}"
    return line + (f" (and {len(problems) - 1} more)" if len(problems) > 1 else "")


def _is_branch(part: str) -> bool:
    """Return whether a part of pydantic's path names a type in a union."""
    return "[" in part or part in BRANCHES


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Return the known name that is most like a misspelt one; None if none is."""
    by_lower = {other.lower(): other for other in known}
    found = get_close_matches(name[:100].lower(), by_lower, n=1, cutoff=0.6)
    return by_lower[found[0]] if found else None


def did_you_mean(name: Any, known: Iterable[str]) -> str:
    """Return `; did you mean ...?` for a message, or nothing."""
    found = nearest(name, known) if isinstance(name, str) else None
    return f"; did you mean {found!r}?" if found else ""


def one_of(name: Any, known: Iterable[str]) -> str:
    """Return `use one of ...` with the nearest name, for a message."""
    names = list(known)
    return f"use one of {', '.join(names)}{did_you_mean(name, names)}"


def section_of(field: FieldInfo) -> type[BaseModel] | None:
    """Return the class of a section, or of the items of a list of sections; None for a plain key."""
    kinds: list[Any] = [field.annotation]
    for kind in kinds:  # grows: a section may be in a list, and that may be left out
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return kind
        kinds += get_args(kind)
    return None


def keys_of(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Yield the keys of a section and of those in it, such as `clients.0.budget`."""
    for name, field in section.model_fields.items():
        yield prefix + name
        inner = section_of(field)
        if inner is not None:
            yield from keys_of(inner, f"{prefix}{name}.{'0.' if field.annotation is not inner else ''}")


def short(value: Any) -> str:
    """Return a value as text of at most 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _meant(parts: Sequence[str], root: type[BaseModel]) -> str:
    """Return a hint at the key that is meant: of the same name in a section, else one of the same section."""
    elsewhere = [key for key in keys_of(root) if len(parts) == 1 and key.endswith(f".{parts[0]}")]
    if elsewhere:
        return f"; did you mean {elsewhere[0]!r}?"
    siblings = _section_at(parts[:-1], root)
    return did_you_mean(parts[-1], siblings.model_fields if siblings else ())


def _section_at(parts: Sequence[str], root: type[BaseModel]) -> type[BaseModel] | None:
    section: type[BaseModel] | None = root
    for part in parts:
        if section is not None and not part.isdecimal():  # a number is the place of a list item
            section = section_of(section.model_fields[part]) if part in section.model_fields else None
    return section


def _reason(problem: Any, parts: Sequence[str], root: type[BaseModel]) -> str:
    """Return what is wrong with a value, and what to write instead."""
    kind, value = problem["type"], problem["input"]
    if value == "auto":
        return "only Hugging Face's Trainer fills in 'auto'; write a value, or leave the key out"
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        return _not_a_section(parts, root)
    if kind == "string_pattern_mismatch":
        return NAME_RULE
    if kind == "literal_error":
        section = _section_at(parts[:-1], root)
        field = section.model_fields.get(parts[-1]) if section else None
        known = [str(choice) for choice in _choices(field.annotation)] if field else []
        return problem["msg"] + did_you_mean(value, known)
    return problem["msg"] + _remedy(kind, value)


def _remedy(kind: str, value: Any) -> str:
    if kind == "string_type":
        read = " (YAML reads yes, no, on and off as true and false)" if isinstance(value, bool) else ""
        return f"; write it in quotes{read}" if isinstance(value, bool | int | float) else ""
    if kind == "int_type" and isinstance(value, float) and value.is_integer():
        return f"; write {int(value)}"
    if kind in ("int_type", "float_type") and isinstance(value, str):
        return "; write digits, without quotes or zeros in front"
    return "; write true or false" if kind == "bool_type" else ""


def _not_a_section(parts: Sequence[str], root: type[BaseModel]) -> str:
    section = _section_at(parts, root)
    names = list(section.model_fields) if section else ["enabled"] if parts[-1:] in (["bf16"], ["fp16"]) else []
    if not names:
        return "it must hold key: value pairs"
    if "enabled" in names:
        return f"it is a section; write {'.'.join(parts)}.enabled=true, or {parts[-1]}: {{enabled: true}}"
    return f"it is a section, which holds {', '.join(names[:6])}{', ...' if len(names) > 6 else ''}"


def _choices(annotation: Any) -> Iterator[Any]:
    """Yield the literal values in a type."""
    for inner in get_args(annotation):
        if isinstance(inner, str):
            yield inner
        else:
            yield from _choices(inner)
