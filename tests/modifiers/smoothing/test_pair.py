"""A pair under other names is the same pair."""

import torch

from lightning_compress.modifiers.smoothing.pair import Consumer, Pair


def test_renaming_changes_the_names_alone():
    consumer = Consumer({"weight": 1}, torch.tensor([0, 1, -1]))
    pair = Pair("0.norm", "weight", torch.arange(2), {"0.fc1": consumer, "0.fc2": consumer})
    renamed = pair.renamed(lambda name: name.replace("0.", "1."))
    assert (renamed.source, list(renamed.consumers)) == ("1.norm", ["1.fc1", "1.fc2"])
    assert renamed.consumers["1.fc2"] is consumer
    assert (renamed.form, renamed.channels_J) == (pair.form, pair.channels_J)
    assert pair.source == "0.norm"
