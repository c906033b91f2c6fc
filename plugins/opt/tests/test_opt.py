"""What is particular to OPT and BioGPT, beside what the conformance kit holds them to."""

import pytest
import torch
from lens_conformance.families import known_families
from lens_conformance.oracle import new_pair, tiny_model

import lens_core as lens
from lens_core import errors

IDS = torch.randint(0, 28, (2, 6), generator=torch.Generator().manual_seed(0))
DROPOUT = {"opt": "dropout", "biogpt": "hidden_dropout_prob"}


@pytest.mark.parametrize("name", ["hook_attn_out", "hook_mlp_out"])
@pytest.mark.parametrize("model_type", DROPOUT)
def test_what_a_dropout_of_no_module_changes_refuses_in_training(model_type, name):
    """The rest is there, and in evaluation so are these."""
    one = new_pair(known_families()[model_type], overrides={DROPOUT[model_type]: 0.2})
    full = f"blocks.1.{name}"
    one.model.run_with_cache(IDS, names_filter=[full])
    one.model.train()
    one.model.run_with_cache(IDS, names_filter=["blocks.1.attn.hook_out", "blocks.1.hook_resid_post"])
    with pytest.raises(errors.UnsupportedHookError, match=name):
        one.model.run_with_cache(IDS, names_filter=[full])
    one.model.eval()
    with torch.no_grad():
        assert torch.equal(one.model(IDS), one.reference(IDS, use_cache=False).logits)


@pytest.mark.parametrize("model_type", DROPOUT)
def test_positions_are_rows_of_their_weight(model_type):
    """HF keeps two rows before them, which no position reads."""
    model = new_pair(known_families()[model_type]).model
    with torch.no_grad():
        _, cache = model.run_with_cache(IDS, names_filter=["hook_pos_embed"])
    assert torch.equal(cache["hook_pos_embed"][0], model.W_pos[: IDS.shape[1]])


def test_opt_350m_is_refused_by_what_sets_it_apart():
    """Norms after the sums, and embeddings of a width of their own."""
    for fields, told in (
        ({"do_layer_norm_before": False}, "do_layer_norm_before"),
        ({"word_embed_proj_dim": 16}, "16"),
    ):
        with pytest.raises(errors.UnsupportedConfigError, match=told):
            lens.load(tiny_model(known_families()["opt"], fields))
