"""The table of merge rules agrees with the functions of aggregation/rules.py and with the config."""

import inspect

import pytest

from ubsmoe_ds.aggregation import rules
from ubsmoe_ds.config.merge_rules import RULES, names
from ubsmoe_ds.config.sections import MergeConfig

# kind -> annotations of (updates or factors, weights) -> result
SIGNATURES = {
    "elementwise": inspect.signature(rules.fedavg),
    "factors": inspect.signature(rules.zero_pad),
}


@pytest.mark.parametrize("name", RULES)
def test_the_function_takes_what_the_row_says(name):
    row = RULES[name]
    signature, plain = inspect.signature(getattr(rules, row.function)), SIGNATURES[row.kind]
    parameters, inputs = list(signature.parameters.values()), list(plain.parameters.values())
    assert [p.annotation for p in parameters[:2]] == [p.annotation for p in inputs]
    assert signature.return_annotation == plain.return_annotation
    assert [p.name for p in parameters[2:]] == list(row.options)


@pytest.mark.parametrize("name", RULES)
def test_options_are_numbers_of_the_config(name):
    row = RULES[name]
    section = MergeConfig(rule=name)
    assert section.row is row
    assert all(option in MergeConfig.model_fields for option in row.options)
    parameters = inspect.signature(getattr(rules, row.function)).parameters
    assert all(isinstance(getattr(section, option), parameters[option].annotation) for option in row.options)


def test_only_the_weighted_mean_is_linear_and_only_factors_are_stacked():
    assert {row.function for row in RULES.values() if row.linear} == {"fedavg"}
    assert all(row.kind == "factors" for row in RULES.values() if row.stacking)
    assert all(row.kind == "elementwise" for row in RULES.values() if row.linear or row.by_utilisation)


def test_messages_name_each_rule_once():
    elementwise, factors = names(elementwise=True).split(", "), names(elementwise=False).split(", ")
    assert sorted(elementwise + factors) == sorted(RULES)
    assert "fedavg" in elementwise and "flora" in factors
