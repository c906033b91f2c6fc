"""The golden state space models against HF just as it is, in float32: nothing about HF is changed here."""

import pytest
import torch
from golden.tiny import random_tokens
from golden.tiny_ssm import tiny_ssm
from lens_conformance.golden import mamba, mamba2


@pytest.mark.parametrize("kind", ["mamba", "falcon_mamba", "mamba2"])
def test_float32_logits_equal_hf_to_rounding(kind):
    """Golden is as far from HF's float32 logits as float32 rounds, and much closer than any edit moves them."""
    for seed in range(3):
        model, tokens = tiny_ssm(kind, seed=seed), random_tokens(3, 11, seed=seed)
        oracle = mamba2 if kind == "mamba2" else mamba
        with torch.no_grad():
            logits, _ = oracle.golden(model.state_dict(), model.config, tokens)
            theirs = model(tokens).logits
        assert theirs.dtype == torch.float32
        torch.testing.assert_close(logits, theirs.double(), atol=2e-5, rtol=0)
