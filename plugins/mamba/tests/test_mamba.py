"""What only this plugin has: how many steps a state edit costs, kernels under HF's names, fused training, refusals."""

from unittest.mock import patch

import pytest
import torch
from golden.tiny_ssm import tiny_ssm
from lens_mamba import lens_architectures
from lens_mamba._kernel import Selective, Telling
from torch import nn
from transformers import DynamicCache, PreTrainedConfig
from transformers.models.falcon_mamba import modeling_falcon_mamba
from transformers.models.mamba import modeling_mamba

import lens_core as lens
from lens_core.errors import InputError, UnsupportedHookError

TOKENS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6], [2, 7, 1, 8, 2, 8, 1, 8]])
STATE = "blocks.1.mixer.hook_ssm_state"
FILES = {"mamba": modeling_mamba, "falcon_mamba": modeling_falcon_mamba}


@pytest.fixture(params=["mamba", "falcon_mamba"])
def kind(request):
    """Give a model type of this plugin."""
    return request.param


@pytest.fixture
def hf(kind):
    """Give a tiny model of it."""
    return tiny_ssm(kind)


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


def kernels(kind):
    """Put modules in the place of all functions that the mixer calls."""
    names = ("causal_conv1d_fn", "causal_conv1d_update", "mamba_selective_scan", "mamba_selective_state_update")
    return patch.multiple(FILES[kind], **{name: Kernel(getattr(FILES[kind], name)) for name in names})


def halved(state, hook):
    """Halve a value."""
    return state * 0.5


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
def test_an_edit_of_some_states_costs_one_scan_for_each_stretch_between_them(hf, kind):
    """Only named positions are stopped at: two edits cut the sequence in three calls of HF's scan, and one more none."""  # noqa: E501
    model, lengths = lens.load(hf), []
    real = FILES[kind].mamba_selective_scan

    def counted(x, *args, **options):
        lengths.append(x.shape[-1])
        return real(x, *args, **options)

    whole = model.run_with_hooks(
        TOKENS, fwd_hooks=[(STATE, lambda h, hook: h * 0.5 if hook.positions[0] in (2, 4) else h)]
    )
    with patch.object(FILES[kind], "mamba_selective_scan", counted):
        seen = []
        edited = model.run_with_hooks(
            TOKENS, fwd_hooks=[(STATE, lambda h, hook: seen.append(hook.positions.tolist()) or h * 0.5, [2, 4])]
        )
    assert seen == [[2], [4]]
    assert lengths == [8, 3, 2, 3, 8]  # layers 0 and 2 whole; layer 1 up to 2, up to 4, the rest
    torch.testing.assert_close(edited, whole, rtol=0, atol=2e-5)
    assert (whole - model(TOKENS)).abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("also", [(), ("blocks.1.mixer.hook_y", "blocks.1.mixer.hook_decay")])
def test_states_that_are_only_kept_are_those_of_hfs_own_scan(kind, dtype, also, monkeypatch):
    """HF's scan runs once and nothing beside it; what the slow way gives is the same, and so are the logits."""
    model = lens.load(tiny_ssm(kind).to(dtype))
    monkeypatch.setattr(Selective, "telling", lambda self, take: None)
    logits, slow = model.run_with_cache(TOKENS, names_filter=[STATE, *also])
    monkeypatch.undo()
    monkeypatch.setattr("lens_core._scan.walk", lambda *_: pytest.fail("a second scan"))
    ours, cache = model.run_with_cache(TOKENS, names_filter=[STATE, *also])
    assert torch.equal(ours, logits)
    assert torch.equal(ours, model.hf_model(TOKENS).logits)
    assert cache[STATE].dtype == torch.float32
    for name in (STATE, *also):
        torch.testing.assert_close(cache[name], slow[name], rtol=1e-6, atol=1e-6)


def test_states_are_right_where_hfs_scan_does_not_tell_them(kind, hf, monkeypatch):
    """Should HF write its loop in another way, the states are computed beside it."""
    model = lens.load(hf)
    _, told = model.run_with_cache(TOKENS, names_filter=STATE)
    monkeypatch.setattr(Telling, "__mul__", lambda self, other: self.tensor * other)
    logits, cache = model.run_with_cache(TOKENS, names_filter=STATE)
    assert torch.equal(logits, hf(TOKENS).logits)
    torch.testing.assert_close(cache[STATE], told[STATE], rtol=1e-6, atol=1e-6)


def test_gradients_are_hfs_beside_a_cache_of_states(hf):
    """A detached cache overhears the scan of a training step and leaves its graph as it is."""
    model = lens.load(hf)
    log_a = model.hf_model.backbone.layers[1].mixer.A_log
    by_hf = torch.autograd.grad(hf(TOKENS).logits.square().sum(), hf.backbone.layers[1].mixer.A_log)[0]
    logits, cache = model.run_with_cache(TOKENS, names_filter=STATE)
    assert not cache[STATE].requires_grad
    assert torch.equal(torch.autograd.grad(logits.square().sum(), log_a)[0], by_hf)


@torch.no_grad()
def test_kernels_that_are_modules_are_read_and_edited_as_functions_are(hf, kind):
    """Modules in the place of HF's functions: the same values, the kernels' own logits, and the edit holds."""
    model = lens.load(hf)
    names = [name for name in model.table if not name.startswith("hf.")]
    expected, values = model.run_with_cache(TOKENS, names_filter=names)
    entries = [(f"blocks.1.mixer.hook_{part}", halved) for part in ("conv", "delta", "y")]
    edited = model.run_with_hooks(TOKENS, fwd_hooks=entries)
    with kernels(kind):
        logits, cache = model.run_with_cache(TOKENS, names_filter=names)
        assert torch.equal(logits, expected)
        assert FILES[kind].mamba_selective_scan.calls >= hf.config.num_hidden_layers
        for name in names:
            torch.testing.assert_close(cache[name], values[name], rtol=0, atol=1e-6)
        torch.testing.assert_close(model.run_with_hooks(TOKENS, fwd_hooks=entries), edited, rtol=0, atol=1e-6)
        torch.testing.assert_close(step_by_step(model, TOKENS, fwd_hooks=entries), edited, rtol=0, atol=5e-6)


def test_a_fused_training_kernel_stands_unless_its_inside_is_asked_for(hf, kind):
    """In training without a cache HF may call one kernel for all; reading the gate leaves it, the state takes it apart."""  # noqa: E501
    model, calls = lens.load(hf.train()), []
    path = FILES[kind]

    def fused(projected, *args, **options):
        calls.append(projected.shape)
        return projected.new_zeros(2, 8, hf.config.hidden_size)

    with patch.object(path, "mamba_inner_fn", fused):
        model.run_with_cache(TOKENS, names_filter=["blocks.1.mixer.hook_gate"])
        assert len(calls) == 3
        calls.clear()
        model.run_with_cache(TOKENS, names_filter=[STATE])
        assert len(calls) == 2


@torch.no_grad()
def test_calls_that_hf_would_compute_wrongly_are_refused(hf):
    """Several positions on a cache, and right padding that a cache goes on from."""
    model, past = lens.load(hf), DynamicCache(config=hf.config)
    model(TOKENS[:, :3], past_key_values=past, use_cache=True)
    with pytest.raises(InputError, match="starts its scan from zero"):
        model(TOKENS[:, 3:5], past_key_values=past, use_cache=True)
    with pytest.raises(UnsupportedHookError, match="one position at a time"), model.caching([STATE]):
        hf(TOKENS[:, 3:5], cache_params=past, use_cache=True)
    mask = torch.ones_like(TOKENS)
    mask[0, -1] = 0
    with pytest.raises(InputError, match="pad on the left"):
        model(TOKENS, attention_mask=mask, past_key_values=DynamicCache(config=hf.config), use_cache=True)
    assert model(TOKENS, attention_mask=mask).shape == (2, 8, 29)


def test_padding_with_a_bias_in_the_projection_is_refused(kind):
    """HF lets in_proj's bias into the convolution at padding: a padded row differs from the row alone."""
    hf = tiny_ssm(kind, use_bias=True)
    mask = torch.ones_like(TOKENS)
    mask[0, :2] = 0
    with torch.no_grad():
        alone, padded = hf(TOKENS[:1, 2:]).logits, hf(TOKENS, attention_mask=mask).logits[:1, 2:]
    assert (alone - padded).abs().max() > 1e-3
    with pytest.raises(InputError, match="use_bias"):
        lens.load(hf)(TOKENS, attention_mask=mask)


def test_weights_are_seen_in_the_papers_terms(hf):
    """W_in_proj, W_conv, W_x, W_dt, A, D and W_out_proj, stacked over layers, inputs first."""
    model, mixer = lens.load(hf), hf.backbone.layers[1].mixer
    assert torch.equal(model.A[1], -torch.exp(mixer.A_log))
    assert torch.equal(model.W_x[1], mixer.x_proj.weight.T)
    assert model.W_conv.shape == (3, 39, 4)
    assert [tuple(model.weight(name, 1).shape) for name in ("W_in_proj", "W_dt", "D", "W_out_proj", "b_U")[:4]] == [
        (13, 78),
        (11, 39),
        (39,),
        (39, 13),
    ]


@torch.no_grad()
def test_the_residual_stream_comes_apart_into_embedding_and_mixers(hf):
    """decompose_resid of an SSM cache sums to what enters the final norm."""
    model = lens.load(hf)
    _, cache = model.run_with_cache(TOKENS)
    parts, labels = cache.decompose_resid(return_labels=True)
    assert labels == ["embed", "0_mixer_out", "1_mixer_out", "2_mixer_out"]
    torch.testing.assert_close(parts.sum(0), cache["blocks.2.hook_resid_post"], rtol=0, atol=1e-5)
    middle = model(TOKENS, stop_at_layer=2)
    assert torch.equal(model(middle, start_at_layer=2), model(TOKENS))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision_is_read_in_the_declared_dtypes_and_stays_hfs(kind, dtype):
    """Everything read, in prefill and decode: HF's own bits, and each value in the dtype that its point declares."""
    hf, reference = tiny_ssm(kind, dtype=dtype), tiny_ssm(kind, dtype=dtype)
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
    (one,) = [a for a in lens_architectures() if hf.config.model_type in a.model_types]
    fields = set(vars(type(hf.config)())) - set(vars(PreTrainedConfig()))
    assert fields <= {*one.config_handled, *one.config_ignored}
