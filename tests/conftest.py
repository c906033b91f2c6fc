"""Put `tests` on the import path, so that any test can say `from golden.tiny import tiny_gpt2`."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def _default_dtype():
    """Fail the test that leaves torch's default dtype changed, and not those that come after it."""
    yield
    left = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    assert left == torch.float32, f"the test left {left} as torch's default dtype"
