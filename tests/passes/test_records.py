"""What a model tells of its passes, that they are applied once and taken back, and who is told that weights differ."""

import copy
import pickle

import pytest
import torch
from golden.tiny import random_tokens, tiny_gpt2
from golden.tiny_llama import tiny_llama

import lens_core as lens
from lens_core import _pass_log
from lens_core.passes import PASSES, center_unembed, center_writing_weights, fold_ln, fold_value_biases

TOKENS = random_tokens()
NAMES = ("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases")


@pytest.fixture
def model():
    """A tiny GPT-2, its embeddings tied."""
    return lens.load(tiny_gpt2())


def bits(model):
    """Copy the state."""
    return {name: value.clone() for name, value in model.state_dict().items()}


def is_as(model, before):
    """Whether the state is what it was."""
    now = model.state_dict()
    return now.keys() == before.keys() and all(torch.equal(now[name], before[name]) for name in before)


def test_a_record_says_what_was_done(model):
    """Blocks, parameters, the untied embedding, and bytes."""
    embedding = 29 * 21 * 4
    fold_ln(model)
    (record,) = model.passes
    assert (record.name, record.layers, record.untied) == ("fold_ln", (0, 1, 2), True)
    assert record.added_bytes == embedding + 29 * 4  # W_U of its own, and b_U
    changed = {"transformer.h.0.ln_1.weight", "transformer.h.0.attn.c_attn.bias", "lm_head.weight", "lm_head.bias"}
    assert changed <= set(record.changed)
    sizes = dict(model.named_parameters())
    kept = [name for name in record.changed if not name.startswith("lm_head")]
    assert record.kept_bytes == sum(sizes[name].nbytes for name in kept)
    assert "transformer.wte.weight" not in record.changed
    assert "in 3 blocks and around them, the unembedding untied" in str(record)
    told = str(lens.load(tiny_llama()).process_weights().passes[-1])
    assert told == "fold_value_biases: there was nothing to change"
    assert "weights after fold_ln)" in repr(model)
    assert model.cfg.normalization_type == "LNPre"


def test_an_original_is_kept_once(model):
    """However many passes change it: a second copy would be of no use."""
    model.process_weights()
    log = _pass_log.log_of(model.hf_model)
    assert sum(record.kept_bytes for record in model.passes) == sum(
        value.nbytes for value in log.originals.values() if value is not None
    )


def test_all_is_put_back(model):
    """Bits, missing biases, the tie, the config, and nothing of ours stays on the HF model."""
    before, config = bits(model), model.hf_model.config.to_dict()
    own = set(model.hf_model.__dict__)
    model.process_weights(refactor_factored_attn_matrices=True)
    assert model.hf_model.config.tie_word_embeddings is False
    assert model.undo_passes() is model
    assert is_as(model, before)
    assert model.hf_model.lm_head.weight is model.hf_model.transformer.wte.weight
    assert model.hf_model.lm_head.bias is None
    assert model.hf_model.config.to_dict() == config
    assert set(model.hf_model.__dict__) == own
    assert model.passes == ()
    assert model.cfg.normalization_type == "LN"
    model.undo_passes()
    assert is_as(model, before)


def test_a_second_application_changes_nothing_and_says_so(model):
    """By one pass, and by all of them."""
    model.process_weights()
    before, records = bits(model), model.passes
    with pytest.warns(lens.PassWarning, match="fold_ln was applied before: nothing was changed"):
        fold_ln(model)
    with pytest.warns(lens.PassWarning) as told:
        model.process_weights()
    assert len(told) == 4
    assert is_as(model, before)
    assert model.passes == records


def test_what_does_not_hold_is_left_out_or_refused():
    """By default it is recorded with the reason, once; asked for by name it is an error, before anything is changed."""
    model = lens.load(tiny_llama())
    before = bits(model)
    with pytest.raises(
        lens.WeightError, match="center_writing_weights does not hold for this model: ln1 is an RMSNorm"
    ):
        model.process_weights(center_writing_weights=True)
    assert is_as(model, before)
    model.process_weights(fold_ln=False)
    model.process_weights(fold_ln=False, center_unembed=False, fold_value_biases=False)
    told = {record.name: record.skipped for record in model.passes}
    assert list(told) == ["center_unembed", "fold_value_biases", "center_writing_weights"]
    assert "RMSNorm" in told["center_writing_weights"]
    assert "left out, since ln1 is an RMSNorm" in str(model.passes[-1])


def test_without_originals_nothing_is_undone(model):
    """It says what to do, and the passes stay."""
    center_writing_weights(model, keep=False)
    assert model.passes[0].kept_bytes == 0
    fold_ln(model)
    with pytest.raises(lens.WeightError, match="center_writing_weights, fold_ln cannot be undone: the original"):
        model.undo_passes()
    assert len(model.passes) == 2


def test_an_interrupted_pass_leaves_the_original(model, monkeypatch):
    """Where originals are kept; without them the model says that it is lost."""
    before, calls = bits(model), []

    def stop(editor, norm):
        calls.append(norm)
        if len(calls) % 3 == 0:
            raise KeyboardInterrupt

    center_unembed(model)
    monkeypatch.setattr("lens_core._pass_steps.neutralise", stop)
    with pytest.raises(KeyboardInterrupt):
        fold_ln(model)
    assert is_as(model, before)
    assert model.passes == ()
    with pytest.raises(lens.WeightError, match="interrupted, and the original weights were not kept"):
        fold_ln(model, keep=False)


def test_copies_and_pickles_know_their_passes(model):
    """And can take them back; another lens model over the same HF model sees the same."""
    before = bits(model)
    model.process_weights()
    for other in (copy.copy(model), copy.deepcopy(model), pickle.loads(pickle.dumps(model)), lens.load(model.hf_model)):
        assert [record.name for record in other.passes] == list(NAMES)
        assert is_as(other, bits(model))
    copied = copy.deepcopy(model).undo_passes()
    assert is_as(copied, before)
    assert len(model.passes) == 4


def test_a_cache_of_other_weights_is_refused(model, tmp_path):
    """On disk and in memory, wherever it would be computed with this model's weights; its entries can still be read."""
    _, cache = model.run_with_cache(TOKENS)
    cache.save(tmp_path / "raw.safetensors")
    fold_ln(model)
    with pytest.raises(
        lens.CacheError, match="the cache is of weights after no pass, and the model's are now after fold_ln"
    ):
        copy.copy(cache).decompose_resid()
    assert cache["resid_post", 0].shape == (2, 5, 21)
    with pytest.raises(lens.CacheFileError, match="is of weights after no pass, and this model's are after fold_ln"):
        lens.ActivationCache.load(tmp_path / "raw.safetensors", model=model)
    assert "resid_post0" in lens.ActivationCache.load(tmp_path / "raw.safetensors")
    _, folded = model.run_with_cache(TOKENS)
    folded.save(tmp_path / "folded.safetensors")
    read = lens.ActivationCache.load(tmp_path / "folded.safetensors", model=model)
    assert torch.equal(read.decompose_resid(), folded.decompose_resid())
    assert read.metadata["passes"] == "fold_ln"
    model.undo_passes()
    cache.decompose_resid()


def test_a_state_of_other_weights_is_refused(model):
    """Its values hold the bias that has moved."""
    _, state = model(TOKENS, return_state=True)
    fold_value_biases(model)
    with pytest.raises(lens.StateError, match="passes is"):
        model(TOKENS, past_key_values=state)
    model.undo_passes()
    model(TOKENS, past_key_values=state)


def test_every_pass_tells_its_law():
    """As text that one can read."""
    for one in PASSES:
        assert all(isinstance(text, str) and text.strip() for text in (one.law, one.after, one.holds))
        assert one.name in repr(one)


def test_wrong_arguments(model):
    """Each is an ArgumentError that says what is right."""
    with pytest.raises(lens.ArgumentError, match="a pass takes a model that lens.load gave; got GPT2LMHeadModel"):
        center_writing_weights(model.hf_model)
    with pytest.raises(lens.ArgumentError, match="keep is True or False; got 'cpu'"):
        fold_ln(model, keep="cpu")
    with pytest.raises(lens.ArgumentError, match="fold_ln is True, False, or None for where it holds; got 'yes'"):
        model.process_weights(fold_ln="yes")
    with pytest.raises(lens.ArgumentError, match="center_unembed is True, False, or None for where it holds; got 0"):
        model.process_weights(center_unembed=0)
    with pytest.raises(lens.ArgumentError, match="copy is True or False; got None"):
        model.process_weights(copy=None)
    assert model.passes == ()
