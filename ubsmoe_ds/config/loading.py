"""Read an experiment: YAML by the safe loader, overrides, the DeepSpeed JSON, and one-line errors."""

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from ubsmoe_ds.base.errors import UserError
from ubsmoe_ds.base.files import parse_json, read_text
from ubsmoe_ds.base.plain_yaml import MOST_BYTES, parse_yaml
from ubsmoe_ds.config.experiment import Experiment
from ubsmoe_ds.config.messages import one_line, short
from ubsmoe_ds.config.paths import expand
from ubsmoe_ds.config.sections import ModelConfig
from ubsmoe_ds.models.families import read_facts
from ubsmoe_ds.models.hub import model_folder

DEEPEST = 20  # levels of nesting


def load_experiment(path: str | Path, overrides: Sequence[str] = ()) -> Experiment:
    """Read, complete and validate an experiment.

    Args:
        path: the YAML file. Its `deepspeed` key names a JSON beside it. Other paths are relative to the working folder.
        overrides: texts `key.sub=value`, the value in YAML; list items by position (`clients.0.budget=0.5`).

    Raises:
        UserError: one line with key, value and remedy.
    """
    path = Path(path)
    raw = _read_mapping(path, "YAML")
    whole_file = [text for text in overrides if text.startswith("deepspeed=")]  # applied before overrides of its keys
    for text in whole_file:
        _override(raw, text)
    if isinstance(raw.get("deepspeed"), str):
        raw["deepspeed"] = _read_mapping(path.parent / _expanded(raw["deepspeed"], "deepspeed"), "JSON")
    for text in overrides:
        if text not in whole_file:
            _override(raw, text)
    _check_plain(raw)
    for derived in ("num_experts", "k_max"):
        if derived in raw:
            raise UserError(f"{derived}: is read from the model's folder and cannot be set; use model.k_max")
    try:
        model = ModelConfig.model_validate(raw.get("model", {}))
    except ValidationError as error:
        raise UserError(one_line(error, ModelConfig, within="model")) from error
    _check_model_name(model.path)
    family, facts = read_facts(model_folder(model.path))
    raw["num_experts"] = facts[family.num_experts]
    raw["k_max"] = model.k_max or facts["num_experts_per_tok"]
    try:
        return Experiment.model_validate(raw)
    except ValidationError as error:
        raise UserError(one_line(error, Experiment)) from error


def _read_mapping(path: Path, kind: str) -> dict[str, Any]:
    """Read a YAML or JSON file whose top level is a mapping."""
    try:
        value = parse_yaml(read_text(path, MOST_BYTES)) if kind == "YAML" else parse_json(read_text(path))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check the path") from error
    except (yaml.YAMLError, ValueError) as error:  # UnicodeDecodeError is a ValueError
        raise UserError(f"{path}: is not valid {kind} ({' '.join(str(error).split())})") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: must hold key: value pairs, not a {type(value).__name__}")
    return value


def _expanded(path: str, key: str) -> str:
    try:
        return expand(path)
    except ValueError as error:
        raise UserError(f"{key}: {error}") from error


def _check_model_name(path: str) -> None:
    """Refuse a name of the hub without `hub:`, which is not meant as a folder."""
    if re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w.-]+)?", path) and not _exists(path):
        raise UserError(
            f"model.path: {path!r} is no folder here; write hub:{path} if it is a model of the Hugging Face hub"
        )


def _exists(path: str) -> bool:
    try:
        return Path(path).exists()
    except OSError:  # a name that is too long
        return False


def _override(raw: dict[str, Any], text: str) -> None:
    """Apply one `key.sub=value`; create missing sections, so that the schema alone decides which keys exist."""
    key, equals, value_text = text.partition("=")
    if not equals or not key:
        raise UserError(f"override {text!r}: must read key.sub=value, such as train.rounds=3")
    try:
        value = parse_yaml(value_text)
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"override {short(text)}: the value is not valid YAML") from error
    *parents, last = key.split(".")
    node: Any = raw
    try:
        for part in parents:
            node = node[_position(part)] if isinstance(node, list) else node.setdefault(part, {})
        if isinstance(node, list):
            node[_position(last)] = value
        else:
            node[last] = value
    except (ValueError, IndexError, TypeError, AttributeError) as error:
        raise UserError(f"override {text!r}: {key!r} does not lead to a setting of this experiment") from error


def _position(part: str) -> int:
    """Return the position of a list item; negative ones are refused."""
    if not part.isdecimal():
        raise ValueError(part)
    return int(part)


def _check_plain(value: Any, key: str = "", depth: int = 0) -> None:
    """Check that the experiment holds only JSON types: it is saved as JSON, and parts of it go to DeepSpeed as is."""
    problem = None
    if depth > DEEPEST:
        problem = f"is nested more than {DEEPEST} levels deep"
    elif isinstance(value, dict):
        for name, inner in value.items():
            if not isinstance(name, str):
                raise UserError(f"{key}{'.' if key else ''}{short(name)}: a key must be a string; write it in quotes")
            _check_plain(name, key or name, depth + 1)
            _check_plain(inner, f"{key}.{name}" if key else name, depth + 1)
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            _check_plain(inner, f"{key}.{number}", depth + 1)
    elif isinstance(value, str):
        problem = None if _is_text(value) else f"{short(value)} holds a character that is not text"
    elif isinstance(value, float):
        problem = None if math.isfinite(value) else f"{value} is not valid: it must be a finite number"
    elif isinstance(value, int):
        problem = None if abs(value) < 2**63 else "is not valid: the number is too large"
    elif value is not None:
        problem = f"{short(value)} is a {type(value).__name__}; use a string in quotes, a number, true, false or null"
    if problem:
        raise UserError(f"{key}: {problem}")


def _is_text(value: str) -> bool:
    """Return whether other programs accept the string: it has no NUL and no lone surrogate."""
    return "\0" not in value and not any(0xD800 <= ord(c) <= 0xDFFF for c in value)
