"""Parse YAML of experiments: PyYAML's safe loader, within bounds, and nothing dropped silently.

Numbers are those of YAML 1.2. PyYAML's are of 1.1, where 1e-4 is a text, 010 is 8, 1:30 is 90, and 2026-01-31 a date.
"""

import re
from typing import Any

import yaml

MOST_BYTES = 256 * 2**10
MOST_NODES = 50_000  # with aliases written out
MOST_WRITTEN = 15_000  # as they stand in the text: the loader takes 0.1 ms for each
DEEPEST = 100

TAG = "tag:yaml.org,2002:"
NUMBERS = {
    "int": r"[-+]?(0|[1-9][0-9_]*|0x[0-9a-fA-F]+)",
    "float": r"[-+]?((\.[0-9]+|[0-9][0-9_]*\.[0-9_]*)([eE][-+]?[0-9]+)?|[0-9][0-9_]*[eE][-+]?[0-9]+)"
    r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
}
OTHERS = ("timestamp", *NUMBERS)


class _Loader(yaml.SafeLoader):
    """The safe loader with the numbers of YAML 1.2; a date is a text. It stops at the bounds, before it reads on."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._nodes = self._depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Compose the next node and those in it; raise ValueError beyond the bounds."""
        self._nodes, self._depth = self._nodes + 1, self._depth + 1
        if self._nodes > MOST_WRITTEN:
            raise ValueError(f"more than {MOST_WRITTEN} values")
        if self._depth > DEEPEST:
            raise ValueError("nested too deeply")
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in found if tag.removeprefix(TAG) not in OTHERS]
    for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
}

for _kind, _pattern in NUMBERS.items():
    _Loader.add_implicit_resolver(TAG + _kind, re.compile(f"(?:{_pattern})$"), list("-+.0123456789"))


def parse_yaml(text: str) -> Any:
    """Return the value of a YAML document.

    Raises:
        ValueError: for a key that stands twice, too many values, aliases that expand to more than `MOST_NODES` values
            or contain themselves, nesting that is too deep, and tags that do not fit their values.
        yaml.YAMLError: for a text that is not YAML, and for tags that would make objects.
    """
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _count(node, {})
        return loader.construct_document(node)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    except (ArithmeticError, AttributeError, LookupError, TypeError) as error:  # PyYAML's, for `!!bool 3` and the like
        raise ValueError("a tag does not fit its value") from error
    finally:
        loader.dispose()


def _count(node: yaml.Node, counts: dict[int, int]) -> int:
    """Return how many nodes this one stands for with its aliases expanded; `counts` is by identity, 0 while inside."""
    if id(node) in counts:
        if counts[id(node)] == 0:
            raise ValueError(f"an alias contains itself in line {node.start_mark.line + 1}")
        return counts[id(node)]
    counts[id(node)] = 0
    inner: list[yaml.Node] = []
    if isinstance(node, yaml.MappingNode):
        _refuse_repeats(node)
        inner = [part for pair in node.value for part in pair]
    elif isinstance(node, yaml.SequenceNode):
        inner = node.value
    count = 1 + sum(_count(part, counts) for part in inner)
    if count > MOST_NODES:
        raise ValueError(f"more than {MOST_NODES} values, aliases written out")
    counts[id(node)] = count
    return count


def _refuse_repeats(node: yaml.MappingNode) -> None:
    """Raise ValueError if a key stands twice."""
    seen = set()
    for key, _ in node.value:
        name = (key.tag, key.value) if isinstance(key, yaml.ScalarNode) else id(key)
        if name in seen:
            raise ValueError(f"the key {key.value[:80]!r} stands twice, again in line {key.start_mark.line + 1}")
        seen.add(name)
