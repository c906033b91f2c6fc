"""What only this plugin has: how many scans a state edit costs, kernels under HF's names, fused training, refusals."""

from unittest.mock import patch

import pytest
import torch
from golden.tiny_ssm import tiny_ssm
from lens_mamba2 import lens_architectures
from torch import nn
from transformers import DynamicCache, PreTrainedConfig
from transformers.models.mamba2 import modeling_mamba2

import lens_core as lens
from lens_core.errors import InputError

TOKENS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6], [2, 7, 1, 8, 2, 8, 1, 8]])
STATE = "blocks.1.mixer.hook_ssm_state"
FUNCTIONS = (
    *("causal_conv1d_fn", "causal_conv1d_update"),
    *("mamba2_chunk_scan", "mamba2_selective_state_update"),
)


@pytest.fixture
def hf():
    """Give a tiny model."""
    return tiny_ssm("mamba2")


class Kernel(nn.Module):
    """A kernel as the package `kernels` puts it: a module under the function's name, with a count of its calls."""

    def __init__(self, function):
        super().__init__()
        self.function = function
        self.calls = 0

    def forward(self, *args, **options):
        """Call the function."""
        self.calls += 1
        return self.function(*args, **options)


def step_by_step(model, tokens, **options):
    """Run one position at a time on one cache; give all logits."""
    past = DynamicCache(config=model.hf_model.config)
    with torch.no_grad():
        steps = [
            model.run_with_hooks(tokens[:, t : t + 1], past_key_values=past, use_cache=True, **options)
            for t in range(tokens.shape[1])
        ]
    return torch.cat(steps, dim=1)


@torch.no_grad()
def test_an_edit_of_some_states_costs_one_scan_for_each_stretch_between_them(hf):
    """Only named positions are stopped at: two edits cut the sequence in three calls of HF's chunk scan."""
    model, lengths, seen = lens.load(hf), [], []
    real = modeling_mamba2.mamba2_chunk_scan

    def counted(x, *args, **options):
        lengths.append(x.shape[1])
        return real(x, *args, **options)

    def some(h, hook):
        return h * 0.5 if int(hook.positions[0]) in (2, 4) else h

    def named(h, hook):
        seen.append(hook.positions.tolist())
        return h * 0.5

    whole = model.run_with_hooks(TOKENS, fwd_hooks=[(STATE, some)])
    with patch.object(modeling_mamba2, "mamba2_chunk_scan", counted):
        edited = model.run_with_hooks(TOKENS, fwd_hooks=[(STATE, named, [2, 4])])
    assert seen == [[2], [4]]
    assert sorted(lengths) == [2, 3, 3, 8, 8]  # layers 0 and 2 whole; layer 1 up to 2, up to 4, the rest
    torch.testing.assert_close(edited, whole, rtol=0, atol=2e-5)
    assert (whole - model(TOKENS)).abs().max() > 1e-3


@torch.no_grad()
def test_kernels_that_are_modules_are_read_and_edited_as_functions_are(hf):
    """Modules in the place of HF's functions: the same values, the kernels' own logits, and the edit holds."""
    model = lens.load(hf)
    names = list(model.table)
    expected, values = model.run_with_cache(TOKENS, names_filter=names)
    entries = [(f"blocks.1.mixer.hook_{part}", lambda x, hook: x * 0.5) for part in ("conv", "delta", "y")]
    edited = model.run_with_hooks(TOKENS, fwd_hooks=entries)
    modules = {name: Kernel(getattr(modeling_mamba2, name)) for name in FUNCTIONS}
    with patch.multiple(modeling_mamba2, **modules):
        logits, cache = model.run_with_cache(TOKENS, names_filter=names)
        assert torch.equal(logits, expected)
        assert modules["mamba2_chunk_scan"].calls >= hf.config.num_hidden_layers
        for name in names:
            torch.testing.assert_close(cache[name], values[name], rtol=0, atol=1e-6)
        torch.testing.assert_close(model.run_with_hooks(TOKENS, fwd_hooks=entries), edited, rtol=0, atol=1e-6)
        torch.testing.assert_close(step_by_step(model, TOKENS, fwd_hooks=entries), edited, rtol=0, atol=2e-5)
        assert modules["mamba2_selective_state_update"].calls > 0


def test_a_fused_training_kernel_stands_unless_its_inside_is_asked_for(hf):
    """In training without a cache HF may call one kernel for all; the gate leaves it, the state takes it apart."""
    model, calls = lens.load(hf.train()), []

    def fused(projected, *args, **options):
        calls.append(projected.shape)
        return projected.new_zeros(2, 8, hf.config.hidden_size)

    with patch.object(modeling_mamba2, "mamba2_split_conv1d_scan_combined", fused):
        model.run_with_cache(TOKENS, names_filter=["blocks.1.mixer.hook_gate"])
        assert len(calls) == 3
        calls.clear()
        model.run_with_cache(TOKENS, names_filter=[STATE])
        assert len(calls) == 2


@torch.no_grad()
def test_several_positions_continue_a_cache_exactly(hf):
    """Unlike Mamba's, this scan starts from the cache's state: chunks have the states of the whole."""
    model, past = lens.load(hf), DynamicCache(config=hf.config)
    _, whole = model.run_with_cache(TOKENS, names_filter=STATE)
    with model.caching(STATE) as cache:
        for part in (slice(0, 3), slice(3, 6), slice(6, 8)):
            model(TOKENS[:, part], past_key_values=past, use_cache=True)
    torch.testing.assert_close(cache[STATE], whole[STATE], rtol=0, atol=2e-5)


@torch.no_grad()
def test_decoding_with_limited_steps_is_refused():
    """HF leaves time_step_limit out of decoding: prompt and continuation would differ from the whole."""
    hf = tiny_ssm("mamba2", time_step_limit=(0.3, 0.6))
    past = DynamicCache(config=hf.config)
    whole = hf(TOKENS, use_cache=False).logits
    hf(TOKENS[:, :7], cache_params=past, use_cache=True)
    assert (hf(TOKENS[:, 7:], cache_params=past, use_cache=True).logits[:, 0] - whole[:, 7]).abs().max() > 1e-3
    model = lens.load(hf)
    assert torch.equal(model(TOKENS), whole)
    with pytest.raises(InputError, match="time_step_limit"):
        model(TOKENS, past_key_values=DynamicCache(config=hf.config), use_cache=True)
    with pytest.raises(InputError, match="use_past_kv_cache=False"):
        model.generate(TOKENS, 2, do_sample=False)


@torch.no_grad()
def test_padding_that_a_cache_would_go_on_from_wrongly_is_refused(hf):
    """Right padding before a continuation, and any padding where in_proj has a bias."""
    mask = torch.ones_like(TOKENS)
    mask[0, -1] = 0
    model = lens.load(hf)
    with pytest.raises(InputError, match="pad on the left"):
        model(TOKENS, attention_mask=mask, past_key_values=DynamicCache(config=hf.config), use_cache=True)
    assert model(TOKENS, attention_mask=mask).shape == (2, 8, 29)
    with pytest.raises(InputError, match="use_bias"):
        lens.load(tiny_ssm("mamba2", use_bias=True))(TOKENS, attention_mask=mask.flip(1))


def test_weights_are_seen_in_the_papers_terms(hf):
    """W_in_proj, W_conv, A, D and W_out_proj, stacked over layers, inputs first."""
    model, mixer = lens.load(hf), hf.backbone.layers[1].mixer
    assert torch.equal(model.A[1], -torch.exp(mixer.A_log))
    assert torch.equal(model.W_in_proj[1], mixer.in_proj.weight.T)
    assert torch.equal(model.W_conv[1], mixer.conv1d.weight[:, 0])
    assert torch.equal(model.b_dt[1], mixer.dt_bias)


@torch.no_grad()
def test_the_inner_norm_has_two_names(hf):
    """What the gated group norm returns is what W_out multiplies."""
    _, cache = lens.load(hf).run_with_cache(TOKENS, names_filter="blocks.1.mixer.hook_inner_norm")
    assert list(cache) == ["blocks.1.mixer.hook_gated"]
    assert torch.equal(cache["blocks.1.mixer.hook_inner_norm"], cache["gated", 1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision_is_read_in_the_declared_dtypes_and_stays_hfs(dtype):
    """Everything read, in prefill and decode: HF's own bits, and each value in the dtype that its point declares."""
    hf, reference = tiny_ssm("mamba2", dtype=dtype), tiny_ssm("mamba2", dtype=dtype)
    model, past, own = lens.load(hf), DynamicCache(config=hf.config), DynamicCache(config=hf.config)
    for start, stop in ((0, 5), (5, 6)):
        logits, cache = model.run_with_cache(
            TOKENS[:, start:stop], names_filter=list(model.table), past_key_values=past, use_cache=True
        )
        assert torch.equal(logits, reference(TOKENS[:, start:stop], cache_params=own, use_cache=True).logits)
        for name in model.table:
            declared = model.table[name].dtype
            assert cache[name].dtype == (dtype if declared == "model" else getattr(torch, declared)), name


def test_every_field_of_hfs_config_is_accounted_for(hf):
    """A field that neither the tables nor the list of harmless ones know would refuse to load at another value."""
    (one,) = lens_architectures()
    fields = set(vars(type(hf.config)())) - set(vars(PreTrainedConfig()))
    assert fields <= {*one.config_handled, *one.config_ignored}


@pytest.mark.parametrize(
    "part", [*("ssm_input", "delta_pre", "delta", "decay"), *("ssm_write", "ssm_state", "y", "ssm_output")]
)
def test_ready_made_edits_reach_single_heads(hf, part):
    """`heads` names a scan's heads."""
    model, name = lens.load(hf), f"blocks.1.mixer.hook_{part}"
    with torch.no_grad():
        _, plain = model.run_with_cache(TOKENS[:, :1], names_filter=name)
        with model.hooks(fwd_hooks=[(name, lens.edits.scale(0.5, heads=[1, -1]))]):
            _, edited = model.run_with_cache(TOKENS[:, :1], names_filter=name)
    changed = (edited[name] != plain[name])[:, 0].flatten(2) if plain[name].ndim > 3 else edited[name] != plain[name]
    changed = changed.any(-1) if plain[name].ndim > 3 else changed[:, 0]
    assert changed.any(0).nonzero().flatten().tolist() == [1, 5]
