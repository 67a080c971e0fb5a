"""Pairs under other names; pairs given by hand: notations, several sources for one pattern, no match."""

import pytest
import torch
from torch import nn

from lightning_compress.modifiers.smoothing.pair import Consumer, Mapped, Pair, parse, resolve, shared_prefix, unmatched

MODULES = {name: nn.Linear(2, 2) for i in "01" for name in (f"experts.{i}.up", f"experts.{i}.down", f"{i}.norm")}


@pytest.mark.parametrize(("entry", "message"), [
    ("fc1", "expected"),
    ({"smooth_layer": "fc1"}, "balance_layers"),
    ({"smooth_layer": "fc1", "balance_layers": []}, "expected"),
    ({"smooth_layer": "fc1", "balance_layer": ["fc2"]}, "expected"),
    ([["fc2"], "re:("], "not a valid regular expression"),
])  # fmt: skip
def test_a_mapping_that_is_malformed(entry, message):
    with pytest.raises(ValueError, match=r"mappings\[0\].*" + message):
        parse([entry])


def test_both_notations_say_the_same():
    by_dict = {"smooth_layer": "re:.*norm", "balance_layers": ["fc1", "fc2"]}
    assert parse([by_dict, [["fc1", "fc2"], "re:.*norm"], ["fc1", "norm"]]) == [
        Mapped("re:.*norm", ("fc1", "fc2")),
        Mapped("re:.*norm", ("fc1", "fc2")),
        Mapped("norm", ("fc1",)),
    ]


def test_each_source_of_a_pattern_gets_the_consumers_that_share_most_of_its_name():
    assert resolve(parse([["re:.*down", "re:.*up"]]), MODULES) == {
        "experts.0.up": ["experts.0.down"],
        "experts.1.up": ["experts.1.down"],
    }
    assert resolve(parse([["re:.*down", "re:.*missing"]]), MODULES) == {}
    assert [shared_prefix("a.b.c", other) for other in ("a.b.d", "b.b.c", "a.b.c.d")] == [2, 0, 3]


def test_patterns_that_match_nothing_are_named_with_the_number_of_their_mapping():
    mappings = parse([["re:.*down", "re:.*up"], [["re:.*down", "fc9"], "re:.*gate"]])
    assert unmatched(mappings, MODULES) == [(1, "re:.*gate"), (1, "fc9")]


def test_renaming_changes_the_names_alone():
    consumer = Consumer({"weight": 1}, torch.tensor([0, 1, -1]))
    pair = Pair("0.norm", "weight", torch.arange(2), {"0.fc1": consumer, "0.fc2": consumer})
    renamed = pair.renamed(lambda name: name.replace("0.", "1."))
    assert (renamed.source, list(renamed.consumers)) == ("1.norm", ["1.fc1", "1.fc2"])
    assert renamed.consumers["1.fc2"] is consumer
    assert (renamed.form, renamed.channels_J) == (pair.form, pair.channels_J)
    assert pair.source == "0.norm"
