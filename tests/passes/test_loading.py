"""`lens.load(..., process=)`: HF's numbers by default, TransformerLens' habits by name, passes by choice."""

import pytest
import torch
from golden.tiny import random_tokens, tiny_gpt2

import lens_core as lens
from lens_core.passes import center_unembed, fold_ln


def test_nothing_is_processed_unless_asked():
    """The default is HF's own numbers."""
    model = lens.load("toy:gpt2")
    assert model.passes == ()
    assert model.default_prepend_bos is None


def test_transformerlens_habits():
    """Every pass that holds, BOS before each text in each method, float32; originals are not kept."""
    model = lens.load("toy:gpt2", process="transformerlens")
    names = ["fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases"]
    assert [record.name for record in model.passes] == names
    assert not any(record.skipped or record.kept_bytes for record in model.passes)
    assert model.cfg.dtype == torch.float32
    assert "BOS before every text, weights after fold_ln" in repr(model)
    bos = model.tokenizer.bos_token_id
    ids = model.to_tokens("the cat sat")
    assert ids[0].tolist().count(bos) == 1
    assert ids[0, 0] == bos
    assert len(model.to_str_tokens("the cat sat")) == ids.shape[1]
    assert model.get_token_position(int(ids[0, -1]), "the cat sat", mode="last") == ids.shape[1] - 1
    assert torch.equal(model("the cat sat"), model(ids))
    assert torch.equal(model.to_tokens("the cat sat", prepend_bos=False), ids[:, 1:])
    assert torch.equal(model.to_tokens(model.to_string(ids[0, 1:])), ids)
    generated = model.generate("the cat sat", 2, return_type="tokens", do_sample=False)
    assert torch.equal(generated[:, : ids.shape[1]], ids)
    with pytest.raises(lens.WeightError, match="load the model again"):
        model.undo_passes()


def test_a_text_that_goes_on_has_no_second_bos():
    """A sequence has one beginning, whatever the rule."""
    model = lens.load("toy:gpt2", process="transformerlens")
    _, state = model("the cat", return_state=True)
    _, longer = model(" sat", past_key_values=state, return_state=True)
    assert torch.equal(longer.tokens, model.to_tokens("the cat sat"))


def test_a_tokenizer_without_bos_takes_its_eos():
    """As TransformerLens has it; the tokenizer that was given stays as it was."""
    tokenizer = lens.load("toy:gpt2").tokenizer
    tokenizer.bos_token = None
    model = lens.load("toy:gpt2", tokenizer=tokenizer, process="transformerlens")
    assert model.to_tokens("the cat")[0, 0] == tokenizer.eos_token_id
    assert tokenizer.bos_token_id is None


def test_the_prediction_is_hf_s_own():
    """On the same ids, BOS included."""
    raw, model = lens.load("toy:llama"), lens.load("toy:llama", process="transformerlens")
    ids = model.to_tokens("the cat sat on the mat")
    assert torch.allclose(model(ids).log_softmax(-1), raw(ids).log_softmax(-1), atol=1e-4)


def test_a_model_in_memory_is_left_as_it_is():
    """A copy is processed."""
    hf = tiny_gpt2()
    before = {name: value.clone() for name, value in hf.state_dict().items()}
    model = lens.load(hf, process=[fold_ln, "center_unembed"])
    assert [record.name for record in model.passes] == ["fold_ln", "center_unembed"]
    assert model.hf_model is not hf
    assert all(torch.equal(hf.state_dict()[name], value) for name, value in before.items())
    tokens = random_tokens()
    assert torch.allclose(model(tokens).log_softmax(-1), hf(tokens).logits.log_softmax(-1), atol=1e-4)
    assert model.default_prepend_bos is None


def test_half_precision_stays_if_it_is_asked_for():
    """float32 is the habit, not a rule; one pass alone keeps the checkpoint's dtype."""
    model = lens.load("toy:gpt2", process="transformerlens", dtype="bfloat16")
    assert model.cfg.dtype == torch.bfloat16
    assert lens.load("toy:gpt2", process=center_unembed).cfg.dtype == lens.load("toy:gpt2").cfg.dtype


def test_wrong_processes():
    """Each says what is right; a pass that does not hold is refused when it was asked for."""
    with pytest.raises(
        lens.ArgumentError, match="process is None, 'transformerlens' or a sequence of passes; got 'all'"
    ):
        lens.load("toy:gpt2", process="all")
    with pytest.raises(lens.ArgumentError, match="no weight pass 'fold'; there are fold_ln, center_writing_weights"):
        lens.load("toy:gpt2", process=["fold"])
    with pytest.raises(
        lens.WeightError, match="center_writing_weights does not hold for this model: ln1 is an RMSNorm"
    ):
        lens.load("toy:llama", process=["center_writing_weights"])
