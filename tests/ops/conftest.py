"""Settings of Triton for the tests that compile kernels, and memory full of NaN for those that interpret them."""

import pytest
import torch


@pytest.fixture
def triton_cache(monkeypatch, tmp_path_factory):
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")  # Triton 3.9 warns where it is not chosen
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))


@pytest.fixture
def poisoned(monkeypatch):
    """Memory that a kernel forgets to write shows: NaN, or the lowest integer."""
    torch.manual_seed(0)

    def full(*size, dtype=torch.float32, **options):
        shape = size[0] if isinstance(size[0], tuple | list | torch.Size) else size
        worst = torch.nan if dtype.is_floating_point else dtype == torch.bool or torch.iinfo(dtype).min
        return torch.full(shape, worst, dtype=dtype, **options)

    monkeypatch.setattr(torch, "empty", full)
    monkeypatch.setattr(torch, "empty_like", lambda x, dtype=None: full(x.shape, dtype=dtype or x.dtype))
