"""The object under test, and beside it a fresh HF model and golden that nothing of lens has touched."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from golden.tiny import fresh, tiny_gpt2
from lens_conformance.golden.gpt2 import golden, names
from torch import Tensor

import lens_core as lens


class Subject(NamedTuple):
    """A lens model, the HF model inside it, and an untouched twin."""

    model: Any
    hf: Any
    reference: Any

    def golden(self, tokens: Tensor, **options: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Run golden with the reference's weights, without a graph."""
        with torch.no_grad():
            return golden(self.reference.state_dict(), self.reference.config, tokens, **options)

    def names(self) -> list[str]:
        """List the contract's names for this depth."""
        return names(self.reference.config.n_layer)


@pytest.fixture
def subject() -> Callable[..., Subject]:
    """Give the builder of tiny subjects: `subject(dtype=torch.float64, attn="eager", **config)`."""

    def build(**options: Any) -> Subject:
        hf = tiny_gpt2(**options)
        return Subject(model=lens.load(hf), hf=hf, reference=fresh(hf))

    return build


@pytest.fixture(params=["eager", "sdpa"])
def attn(request: pytest.FixtureRequest) -> str:
    """Name the attention implementation; each law holds under both."""
    return request.param
