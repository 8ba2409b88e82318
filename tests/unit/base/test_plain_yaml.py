"""YAML of experiments is read within bounds, and nothing of it is dropped silently."""

import pytest
import yaml

from ubsmoe_ds.base.plain_yaml import parse_yaml


def test_plain_values_are_read():
    assert parse_yaml("a: [1, 2.5, yes]\nb: {c: text}\n") == {"a": [1, 2.5, True], "b": {"c": "text"}}
    assert parse_yaml("") is None
    assert parse_yaml("a: &x [1]\nb: *x\n") == {"a": [1], "b": [1]}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a: 1\nb: 2\na: 3\n", "the key 'a' stands twice, again in line 3"),
        ("a: {b: 1, b: 1}\n", "the key 'b' stands twice, again in line 1"),
        ("a: &x [*x]\n", "an alias contains itself in line 1"),
        ("[" * 5000, "nested too deeply"),
        ("when: !!timestamp 2026-02-30\n", "day"),
        (
            "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n"
            + "".join(f"a{n + 1}: &a{n + 1} [{', '.join([f'*a{n}'] * 10)}]\n" for n in range(8)),
            "more than 50000 values",
        ),
    ],
)
def test_what_cannot_be_kept_whole_is_refused(text, reason):
    with pytest.raises(ValueError, match=reason):
        parse_yaml(text)


@pytest.mark.parametrize("text", ["a: !!python/object/apply:os.getpid []\n", "a: [1\n", "a: 1\n---\nb: 2\n"])
def test_objects_and_what_is_no_document_are_refused(text):
    with pytest.raises(yaml.YAMLError):
        parse_yaml(text)
