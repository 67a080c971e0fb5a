"""Every file of an export can be read by whom the umask allows."""

import os

from torch import nn

from lightning_compress import QuantizationModifier, compress, save


def test_all_files_have_the_mode_of_any_new_file(tmp_path):
    model = nn.Sequential(nn.Linear(128, 16))
    compress(model, QuantizationModifier(scheme="W4A16"))
    before = os.umask(0o027)
    try:
        folder = save(model, tmp_path / "compressed", recipe={"modifiers": {}})
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in folder.iterdir()}
    assert set(modes.values()) == {0o640}, modes
    assert {"model.safetensors", "config.json"} <= modes.keys()
