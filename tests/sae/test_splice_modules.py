"""What can be spliced: one head's SAE, transcoders, any module; and what it was trained on."""

from types import SimpleNamespace
from typing import Any

import attrs
import pytest
import torch
from golden.tiny import tiny_gpt2, tiny_tokenizer
from golden.tiny_ssm import tiny_ssm
from lens_conformance.float64 import true_float64
from sae.sae_subject import TOKENS, by_hand, made
from torch import Tensor, nn

import lens_core as lens
from lens_core.errors import ArgumentError, HookFunctionError, SaeError, UnknownHookError


def test_one_head(subjects):
    """`hook_head_index`: the other heads stay."""
    subject, name = subjects["llama"], "blocks.1.attn.hook_z"
    sae, weights = made("standard", 10, hook_head_index=2)

    def edit(z: Tensor, hook: Any) -> Tensor:
        made_of = by_hand({"architecture": "standard"}, weights, z[:, :, 2])["recons"]
        return torch.stack([z[:, :, 0], z[:, :, 1], made_of, z[:, :, 3]], 2)

    expected, _ = subject.golden({name: edit})
    with true_float64(), subject.model.saes({name: sae}):
        logits, cache = subject.model.run_with_cache(TOKENS)
    assert (logits - expected).abs().max() < 1e-9
    assert cache[f"{name}.hook_sae_output"].shape == (2, 6, 10)
    with subject.model.saes({name: sae}, use_error_term=True):
        assert torch.equal(subject.model.run_with_cache(TOKENS)[0], subject.model(TOKENS))


@pytest.mark.parametrize("architecture", ["transcoder", "skip_transcoder", "jumprelu_transcoder"])
@pytest.mark.parametrize("read", ["blocks.1.ln2.hook_out", "blocks.1.hook_mlp_in", "blocks.0.hook_resid_post"])
def test_a_transcoder_reads_at_one_place_and_writes_at_another(subjects, architecture, read):
    """By hand, with an edit of what it reads; gradients reach what it reads; with the error term nothing changes."""
    subject, write = subjects["gpt2"], "blocks.1.hook_mlp_out"
    sae, weights = made(architecture, 21, hook_name=read, hook_name_out=write, d_out=21, apply_b_dec_to_input=False)
    kept: dict[str, Tensor] = {}

    def keep(value: Tensor, hook: Any) -> Tensor:
        kept["read"] = value * 1.5
        return kept["read"]

    def put(value: Tensor, hook: Any) -> Tensor:
        fields = {"architecture": architecture, "apply_b_dec_to_input": False}
        return by_hand(fields, weights, kept["read"])["recons"]

    expected, values = subject.golden({read: keep, write: put})
    expected.square().sum().backward()
    model = subject.model
    with true_float64(), model.saes([sae]):
        with model.caching([read, f"{write}.hook_sae_input", "blocks.0.hook_resid_pre"], incl_bwd=True) as cache:
            logits = model.run_with_hooks(TOKENS, fwd_hooks=[(read, lambda value, hook: value * 1.5)])
            logits.square().sum().backward()
    assert (logits - expected).abs().max() < 1e-9
    assert torch.equal(cache[read], cache[f"{write}.hook_sae_input"])
    first = "blocks.0.hook_resid_pre"
    assert torch.allclose(cache.grad[first], values[first].grad, atol=1e-7)
    plain = model(TOKENS)
    with model.saes([sae], use_error_term=True):
        assert torch.equal(model(TOKENS), plain)
        assert torch.equal(model.run_with_cache(TOKENS)[0], plain)


class Plain(nn.Module):
    """Somebody's own autoencoder: encode and decode, nothing else."""

    def __init__(self, d_in: int) -> None:
        super().__init__()
        self.dictionary = nn.Linear(d_in, 8)

    def encode(self, x: Tensor) -> Tensor:
        """Give the features."""
        return self.dictionary(x).relu()

    def decode(self, code: Tensor) -> Tensor:
        """Give the reconstruction."""
        return (code - self.dictionary.bias) @ self.dictionary.weight


def test_any_module_with_encode_and_decode(subjects):
    """In its own dtype; without pre-activations there is no hook point for them."""
    model, name = lens.load(tiny_gpt2(dtype=torch.bfloat16)), "blocks.1.hook_resid_post"
    plain, theirs = model(TOKENS), Plain(21)
    with model.saes({name: theirs}, use_error_term=True):
        points = [p for p in model.hook_points() if "hook_sae" in p.name]
        logits, cache = model.run_with_cache(TOKENS)
    assert torch.equal(logits, plain)
    assert [p.part.rsplit("_sae_")[-1] for p in points] == ["input", "acts_post", "recons", "error", "output"]
    assert [p.dtype for p in points] == ["float32"] * 4 + ["model"]
    assert {p.name: cache[p.name].dtype for p in points} == {
        p.name: torch.float32 if p.dtype == "float32" else torch.bfloat16 for p in points
    }
    with model.saes({name: theirs}):
        _, cache = model.run_with_cache(TOKENS)
    x = cache[f"{name}.hook_sae_input"]
    assert torch.equal(cache[name], theirs.decode(theirs.encode(x)).bfloat16())


def test_modules_that_keep_their_metadata_as_saelens_does(subjects):
    """The hook name below `cfg.metadata`, where what is missing is None; heads flattened here and not there."""
    model, theirs = subjects["gpt2"].model, Plain(21).double()
    metadata = SimpleNamespace(hook_name="blocks.1.attn.hook_z", hook_name_out=None, prepend_bos=True)
    theirs.cfg = SimpleNamespace(d_in=21, d_sae=8, metadata=metadata)
    theirs.hook_z_reshaping_mode = False
    with model.saes(theirs):
        _, cache = model.run_with_cache(TOKENS, names_filter="*hook_sae_*")
    assert cache["sae_acts_post", 1].shape == (2, 6, 8)
    theirs.hook_z_reshaping_mode = True
    with pytest.raises(SaeError, match="turn_off_forward_pass_hook_z_reshaping"), model.saes(theirs):
        pass
    theirs.cfg.d_in = 768
    theirs.hook_z_reshaping_mode = False
    with pytest.raises(SaeError, match="d_in=768, and 'blocks.1.attn.hook_z' is 21 wide"), model.saes(theirs):
        pass


def test_what_does_not_fit_is_refused_by_name(subjects):
    """And the model goes on."""
    model = subjects["gpt2"].model
    sae = made("standard", 21)[0]
    for place, error, message in (
        ("blocks.0.attn.hook_pattern", SaeError, "each position has a vector"),
        ("hook_tokens", SaeError, "each position has a vector"),
        ("blocks.0.mlp.hook_post", SaeError, "d_in=21, and 'blocks.0.mlp.hook_post' is 37 wide"),
        ("blocks.0.hook_resid_pots", UnknownHookError, "did you mean"),
        ("hf.transformer.h.0.output", SaeError, "each position has a vector"),
    ):
        with pytest.raises(error, match=message), model.saes({place: sae}):
            pass
    with pytest.raises(ArgumentError, match="does not say where it belongs"), model.saes(sae):
        pass
    with (
        pytest.raises(ArgumentError, match="encode and decode; got Linear"),
        model.saes({"hook_embed": nn.Linear(3, 3)}),
    ):
        pass
    for head, place, message in ((3, "blocks.0.attn.hook_z", "heads 0 to 2"), (0, "hook_embed", "with heads")):
        one = made("standard", 7, hook_head_index=head)[0]
        with pytest.raises(SaeError, match=message), model.saes({place: one}):
            pass
    backwards = made("transcoder", 21, hook_name="blocks.1.hook_mlp_out", hook_name_out="blocks.1.hook_resid_pre")[0]
    with pytest.raises(SaeError, match="is computed after"), model.saes(backwards):
        pass
    with model.saes({"hook_embed": Plain(5)}), pytest.raises(HookFunctionError, match="Plain at hook_embed"):
        model(TOKENS)
    mamba = lens.load(tiny_ssm("mamba"))
    with pytest.raises(SaeError, match="inside the recurrence"), mamba.saes({"blocks.0.mixer.hook_ssm_state": sae}):
        pass
    assert torch.equal(model(TOKENS), model(TOKENS))


# ---------------------------------------------------------------------- what it was trained on


def test_processed_weights_are_asked_for_and_refused():
    """Where they change the values at the hook point, and only there."""
    model = lens.load(tiny_gpt2())
    stream, heads = "blocks.1.hook_resid_pre", "blocks.1.attn.hook_z"
    centred = {"center_writing_weights": True}
    wants = made("standard", 21, model_from_pretrained_kwargs=centred)[0]
    raw = made("standard", 21, model_from_pretrained_kwargs={})[0]
    nobody = made("standard", 21)[0]
    with pytest.raises(SaeError, match=r"trained on a model with center_writing_weights.*'transformerlens'"):
        model.saes({stream: wants}).__enter__()
    with pytest.warns(lens.SaeWarning, match="center_writing_weights"), model.saes({stream: wants}, strict=False):
        pass
    for sae, place in ((wants, heads), (raw, stream), (nobody, stream)):
        with model.saes({place: sae}):
            pass
    lens.passes.center_writing_weights(model)
    with pytest.raises(SaeError, match="with no center_writing_weights.*undo_passes"):
        model.saes({stream: raw}).__enter__()
    for sae, place in ((wants, stream), (nobody, stream), (raw, heads)):
        with model.saes({place: sae}):
            pass
    model.undo_passes()
    with model.saes({stream: raw}):
        pass
    with pytest.raises(SaeError, match=r"gain and bias too.*'blocks.1.ln2.hook_out'"):
        model.saes({"blocks.1.ln2.hook_normalized": raw}).__enter__()


def test_texts_that_begin_otherwise_than_the_trainings_are_told(recwarn):
    """Once in a block, for the prompt only."""
    model = lens.load(tiny_gpt2(), tokenizer=tiny_tokenizer())
    name = "blocks.1.hook_resid_pre"
    for habit in (True, False):
        sae = made("standard", 21, prepend_bos=habit)[0].float()
        with model.saes({name: sae}):
            model("w1 w2 w3", prepend_bos=habit)
            model(model.to_tokens("w1 w2 w3", prepend_bos=habit))
            assert not [w for w in recwarn if issubclass(w.category, lens.SaeWarning)]
            with pytest.warns(lens.SaeWarning, match=f"pass prepend_bos={habit}"):
                model("w1 w2 w3", prepend_bos=not habit)
            model.generate("w1 w2 w3", max_new_tokens=2, prepend_bos=not habit)
        assert not [w for w in recwarn if issubclass(w.category, lens.SaeWarning)]
    silent = attrs.evolve(sae.cfg, prepend_bos=None)
    with model.saes({name: lens.saes.SparseAutoencoder(silent)}):
        model("w1 w2 w3")
    assert not [w for w in recwarn if issubclass(w.category, lens.SaeWarning)]
