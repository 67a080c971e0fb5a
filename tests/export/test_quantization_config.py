"""quantization_config selects the quantized modules and no others."""

import json

from torch import nn

from lightning_compress.export.save import save


def test_subclasses_and_unquantized_modules_are_ignored_by_name(tmp_path, quantize, scheme_of):
    class Router(nn.Linear):
        pass

    model = nn.Sequential(nn.Linear(32, 32), Router(32, 32), nn.Linear(32, 32), nn.Embedding(4, 4)).eval()
    quantize(model, scheme_of("", num_bits=4, group_size=32), ["1", "2"])
    save(model, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert sorted(config["ignore"]) == ["1", "2"]
