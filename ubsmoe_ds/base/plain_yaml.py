"""Parse YAML of experiments: PyYAML's safe loader, within bounds, and nothing dropped silently."""

from typing import Any

import yaml

MOST_BYTES = 256 * 2**10  # the loader takes seconds for that many
MOST_NODES = 50_000


def parse_yaml(text: str) -> Any:
    """Return the value of a YAML document.

    Raises:
        ValueError: for a key that stands twice, aliases that expand to more than `MOST_NODES` values or contain
            themselves, nesting that is too deep, and values that do not exist, such as a 30th of February.
        yaml.YAMLError: for a text that is not YAML, and for tags that would make objects.
    """
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _count(node, {})
        return loader.construct_document(node)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
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
