"""Write docs/configuration.md from the fields of the sections, where every key has its type, default and meaning.

    python -m ubsmoe_ds.config.reference          # prints the page
    python -m ubsmoe_ds.config.reference --write  # writes it

`tests/unit/test_docs.py` checks that the page is up to date.
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from ubsmoe_ds.base.terminal import say
from ubsmoe_ds.config.experiment import Experiment
from ubsmoe_ds.config.formats import AUTO, CLOZE, FORMATS
from ubsmoe_ds.config.merge_rules import RULES
from ubsmoe_ds.config.messages import section_of
from ubsmoe_ds.config.methods import PRESETS
from ubsmoe_ds.config.population import GroupConfig
from ubsmoe_ds.config.sections import ClientConfig
from ubsmoe_ds.moe.estimators import ESTIMATORS

PAGE = Path(__file__).resolve().parents[2] / "docs" / "configuration.md"
DERIVED = ("num_experts", "k_max")  # read from the model folder
# names in tables, which a type does not list
CHOICES = {
    "method": tuple(PRESETS),
    "merge.rule": tuple(RULES),
    "data.format": (AUTO, CLOZE, *FORMATS),
    "pseudo_gradient.estimator": ("none", *ESTIMATORS),
}
LIMITS = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤"}
KINDS = {
    int: "whole number",
    float: "number",
    str: "text",
    dict: "mapping",
    bool: "`true`, `false`",
    NoneType: "`null`",
}

HEAD = """# Configuration

<!-- Written by `python -m ubsmoe_ds.config.reference --write` from ubsmoe_ds/config/. Edit the fields there. -->

An experiment is one YAML file, such as `ds_configs/tiny.yaml`. It is checked once, before any process starts. An
unknown key, a wrong type or a value out of range ends the command with one line (key, value, remedy) and exit code 2.

- **Only `name`, `clients` and `deepspeed` must be given.** Every other key has a default.
- **Any key can be overridden** on the command line: `train.rounds=20`, `clients.0.budget=0.5`. The value is YAML;
  items of a list go by position.
- **Paths** are relative to the working folder. Only the name of the DeepSpeed JSON is relative to the YAML. `~`,
  `$NAME` and `${NAME}` are replaced, as in a shell.
- **Numbers** are those of YAML 1.2: `1e-4` is one. `010`, `1:30` and `2026-01-31` are texts.
- **`method` is a preset** that is laid under everything else ([methods](methods.md)). Where presets set a key, the
  table gives the value of the default method. A key that you set yourself wins; leave such keys out of a YAML that
  you compare methods with.
- `num_experts` and `k_max` are read from the model folder and cannot be set; use `model.k_max`.
"""


def page() -> str:
    """Return the whole page: the keys of the top level, then one table for each section."""
    top, tables = {}, []
    for name, field in Experiment.model_fields.items():
        section = section_of(field)
        if name in DERIVED:
            continue
        if section is None:
            top[name] = field
        else:
            item = f"{name}[]" if section in (ClientConfig, GroupConfig) else name
            text = " ".join((section.__doc__ or "").split())
            tables.append(f"## `{item}`\n\n{text}\n\n{_table(section.model_fields, f'{name}.')}")
    return "\n".join([HEAD, f"## Top level\n\n{_table(top, '')}", *tables])


def _table(fields: Mapping[str, FieldInfo], prefix: str) -> str:
    rows = ["| key | values | default | meaning |", "|---|---|---|---|"]
    for name, field in fields.items():
        kind = Literal[*CHOICES[prefix + name]] if prefix + name in CHOICES else field.annotation
        values = _values(kind, field.metadata)
        meaning = " ".join((field.description or "").split()).replace("|", r"\|")
        rows.append(f"| `{name}` | {values} | {_default(prefix + name, field)} | {meaning} |")
    return "\n".join(rows) + "\n"


def _values(kind: Any, limits: Sequence[Any] = ()) -> str:
    """Return what a key may be: its literals, or its type with limits."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _values(inner[0], [limit for part in inner[1:] for limit in getattr(part, "metadata", [part])])
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in inner)
    if origin in (Union, UnionType):
        return ", ".join(_values(part) for part in inner)
    if origin in (list, tuple):
        return f"list of {_values(inner[0])}".replace("text", "texts").replace("number", "numbers")
    signs = [f"{sign} {getattr(part, key)}" for part in limits for key, sign in LIMITS.items() if hasattr(part, key)]
    return " ".join([KINDS[origin or kind], ", ".join(signs)]).strip()


def _default(key: str, field: FieldInfo) -> str:
    """Return the default, or the default method's value where presets set the key."""
    presets = [_setting(preset, key) for preset in PRESETS.values()]
    method = Experiment.model_fields["method"].default
    if any(value is not None for value in presets):
        value = _setting(PRESETS[method], key)
        return f"preset; `{method}`: {_text(field.default if value is None else value)}"
    if field.default is PydanticUndefined:
        return "must be given"
    return _text(field.default)


def _setting(preset: Mapping[str, Any], key: str) -> Any:
    value: Any = preset
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _text(value: Any) -> str:
    words = {None: "`null`", True: "`true`", False: "`false`"}
    known = value is None or isinstance(value, bool)
    return words[value] if known else f"`{list(value) if isinstance(value, tuple) else value}`"


def main() -> None:
    """Print the page, or write it."""
    if sys.argv[1:] == ["--write"]:
        PAGE.write_text(page(), encoding="utf-8")
    else:
        say(page().rstrip())


if __name__ == "__main__":
    main()
