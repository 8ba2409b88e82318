"""Differences of two configs, by hand."""

from ubsmoe_ds.config.differences import MAY_CHANGE_ON_RESUME, WITHOUT_EFFECT, differences, flatten


def test_a_config_is_flattened_to_one_key_per_value():
    nested = {"a": 1, "clients": [{"name": "x"}, {"name": "y", "hosts": []}], "empty": {}}
    assert flatten(nested) == {"a": 1, "clients.0.name": "x", "clients.1.name": "y", "clients.1.hosts": [], "empty": {}}


def test_differences_are_sorted_and_name_both_values():
    recorded = {"seed": 1, "lora": {"rank": 8}, "clients": [{"budget": 0.5}]}
    asked = {"seed": 2, "lora": {"rank": 8}, "clients": [{"budget": 0.5}, {"budget": 1.0}]}
    assert differences(recorded, asked, ()) == [("clients.1.budget", None, 1.0), ("seed", 1, 2)]


def test_a_key_that_may_differ_covers_what_is_below_it_and_nothing_else():
    recorded = {"clients": [{"hosts": ["a"], "ranks": 1}], "train": {"rounds": 2}, "name": "x", "names": 1}
    asked = {"clients": [{"hosts": ["a", "b"], "ranks": 2}], "train": {"rounds": 3}, "name": "y", "names": 2}
    assert [key for key, *_ in differences(recorded, asked, MAY_CHANGE_ON_RESUME)] == ["names"]
    keys = [key for key, *_ in differences(recorded, asked, WITHOUT_EFFECT)]
    assert keys == ["clients.0.hosts.1", "clients.0.ranks", "names", "train.rounds"]


def test_the_former_default_of_the_format_is_the_present_one():
    """Runs of an earlier version recorded `instruction` where now the fields of rows decide."""
    assert differences({"data": {"format": "instruction"}}, {"data": {"format": "auto"}}, ()) == []
    assert len(differences({"data": {"format": "instruction"}}, {"data": {"format": "cloze"}}, ())) == 1
