"""What is particular: every config field has an answer, Pythia's old names of two of them, dropouts in the branches."""

from dataclasses import fields

import lens_core as lens
import pytest
import torch
from lens_core import errors
from lens_core.testing import isolated_registry
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedConfig

import lens_gpt_neox
from lens_gpt_neox.family import FAMILY

TOKENS = torch.arange(12).view(2, 6)


def tiny(**overrides):
    """Build a model of the family's sizes."""
    return GPTNeoXForCausalLM(GPTNeoXConfig(**{**FAMILY.config, **overrides})).eval()


def test_the_installed_plugin_is_found():
    """Pip wrote its entry point, and lens takes it."""
    with isolated_registry(discover=True) as registry:
        (record,) = (one for one in registry.records if "gpt_neox" in one.model_types)
        assert (record.status, record.reason) == ("ok", "")


def test_every_field_of_the_config_is_handled_or_ignored():
    """No field that HF's config class adds is left open, and none is named that HF does not have."""
    (record,) = lens_gpt_neox.lens_architectures()
    known = {field.name for field in fields(GPTNeoXConfig)}
    own = known - {field.name for field in fields(PreTrainedConfig)}
    assert own <= {*record.config_handled, *record.config_ignored} <= known


def test_pythias_config_loads_without_a_warning(recwarn):
    """Its files name the rotated share and the base in their old way."""
    model = lens.load(tiny(rotary_pct=0.25, rotary_emb_base=100))
    assert not [one for one in recwarn if issubclass(one.category, errors.LensWarning)]
    _, cache = model.run_with_cache(TOKENS)
    moved = (cache["rot_k", 0] != cache["k", 0])[:, 1:]  # position 0 is not turned
    assert moved.flatten(0, 2).any(0).tolist() == [True] * 2 + [False] * 6  # a quarter of 8 channels


@pytest.mark.parametrize("is_parallel", [True, False])
def test_what_is_added_to_the_stream_has_been_through_dropout(is_parallel):
    """In training, so that the stream is still the sum of what is added to it."""
    hf = tiny(use_parallel_residual=is_parallel, hidden_dropout=0.4).train()
    _, cache = lens.load(hf).run_with_cache(TOKENS)
    assert torch.equal(cache["hook_embed"], cache["resid_pre", 0])
    for layer in range(2):
        added = cache["resid_pre", layer] + cache["attn_out", layer] + cache["mlp_out", layer]
        torch.testing.assert_close(added, cache["resid_post", layer])
        assert (cache["attn_out", layer] == 0).float().mean() > 0.2
