"""Weights in few bits: refused by a view, and turned into full ones on request; each recomputes what the model does."""

import copy

import pytest
import torch
from golden.tiny import random_tokens
from golden.tiny_llama import tiny_llama
from torch import nn

import lens_core as lens
from lens_core.errors import WeightError

TOKENS = random_tokens(2, 5)
pytestmark = pytest.mark.filterwarnings("ignore:.*deprecated")  # torch's own quantised tensors


class Eighths(torch.Tensor):
    """A tensor as quantisation libraries make them: it says float32, holds int8, and knows `dequantize`."""

    @staticmethod
    def __new__(cls, weight):
        """Round to multiples of one 64th."""
        made = torch.Tensor._make_wrapper_subclass(cls, weight.shape, dtype=weight.dtype, requires_grad=False)
        made.kept = (weight * 64).round().clamp(-128, 127).to(torch.int8)
        return made

    def dequantize(self):
        """Give the full weight."""
        return self.kept.float() / 64

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        """Serve a linear map."""
        if func is nn.functional.linear:
            return func(args[0], args[1].dequantize(), *args[2:], **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        """Serve no other operator: transposing raises, as with torchao's tensors."""
        if func is torch.ops.aten.detach.default:
            return args[0]
        raise NotImplementedError(f"{func} of {types}")


def by_tensor(hf):
    """Quantise q_proj, v_proj and o_proj as torchao does: the module stays, its weight is a tensor of another kind."""
    for block in hf.model.layers:
        for name in ("q_proj", "v_proj", "o_proj"):
            module = getattr(block.self_attn, name)
            module.weight = nn.Parameter(Eighths(module.weight.data), requires_grad=False)
    return hf


def by_module(hf):
    """Quantise by torch's own dynamic quantisation: modules of another kind, whose weight is a method."""
    return torch.ao.quantization.quantize_dynamic(hf, {nn.Linear}, dtype=torch.qint8)


class Rounding(nn.Linear):
    """A module as optimum-quanto's before freezing: a plain weight, of which the forward uses another."""

    @property
    def qweight(self):
        """The weight that counts."""
        return Eighths(self.weight.data)

    def forward(self, x):
        """Compute with it."""
        return nn.functional.linear(x, self.qweight.dequantize(), self.bias)


def by_forward(hf):
    """Let the forward of q_proj, v_proj and o_proj quantise."""
    for block in hf.model.layers:
        for name in ("q_proj", "v_proj", "o_proj"):
            getattr(block.self_attn, name).__class__ = Rounding
    return hf


KINDS = {"tensor": by_tensor, "module": by_module, "forward": by_forward}


@pytest.fixture(params=KINDS)
def models(request):
    """Give a quantised model and the plain one."""
    plain = tiny_llama("llama-biases")
    model = lens.load(KINDS[request.param](copy.deepcopy(plain)))
    return model, lens.load(plain), request.param != "module"


@torch.no_grad()
def test_dequantised_weights_recompute_what_the_model_does(models):
    """Queries, values and outputs of attention, to the rounding of the activations; the plain weights do not."""
    model, plain, is_exact = models
    _, cache = model.run_with_cache(TOKENS)
    for part in "QV":
        bias = model.weight(f"b_{part}", 1)
        made = cache[part.lower(), 1]
        errors = [
            float((torch.einsum("bpd,hde->bphe", cache["ln1.hook_out", 1], weight) + bias - made).abs().max())
            for weight in (model.weight(f"W_{part}", 1, dequantize=True), plain.weight(f"W_{part}", 1))
        ]
        assert errors[0] < (1e-5 if is_exact else errors[1])  # torch's rounds activations too
        assert model.weight(f"W_{part}", 1, dequantize=True).shape == plain.weight(f"W_{part}", 1).shape
        difference = model.weight(f"W_{part}", 1, dequantize=True) - plain.weight(f"W_{part}", 1)
        assert 0 < float(difference.abs().max()) < 0.02
    OV = model.factored_weight("OV", 1, dequantize=True)
    layers, stack = model.stacked_weight("OV", dequantize=True)
    assert layers == (0, 1, 2)
    torch.testing.assert_close(stack[1].AB, OV.AB)
    torch.testing.assert_close(OV.AB, plain.OV[1].AB, rtol=0.1, atol=0.1)


def test_a_view_of_quantised_bits_is_refused_and_told_how_to_get_them(models):
    """A view would show no weight, or one that the model does not use."""
    model = models[0]
    for ask in (
        lambda: model.weight("W_Q", 0),
        lambda: model.W_Q,
        lambda: model.QK,
        lambda: model.factored_weight("OV", 0),
        lambda: model.all_composition_scores("V"),
    ):
        with pytest.raises(WeightError, match="W_[QV] of .*quantised.*dequantize=True"):
            ask()
    assert model.weight("b_Q", 0).shape == (4, 8)
    assert model.weight("W_E").shape == (29, 32)  # plain, as it was
    assert model(TOKENS).shape == (2, 5, 29)


def test_bits_that_nobody_turns_back_are_refused_by_name():
    """FP8 with scales of its own, and packed integers: a plain view of them would be wrong by the scale."""
    for dtype in (torch.float8_e4m3fn, torch.int32):
        hf = tiny_llama("llama")
        module = hf.model.layers[0].self_attn.q_proj
        module.weight = nn.Parameter(module.weight.data.to(dtype), requires_grad=False)
        model = lens.load(hf)
        for options, told in (({}, "dequantize=True. gives"), ({"dequantize": True}, "nothing here dequantises it")):
            with pytest.raises(WeightError, match=told):
                model.weight("W_Q", 0, **options)


def test_plain_weights_stay_views_when_asked_to_dequantise():
    """Nothing is copied where nothing is quantised."""
    model = lens.load(tiny_llama("llama"))
    view = model.weight("W_Q", 0, dequantize=True)
    assert view.data_ptr() == model.hf_model.model.layers[0].self_attn.q_proj.weight.data_ptr()


def test_a_weight_under_an_adapter_is_refused():
    """It is not what the module computes with."""
    hf = tiny_llama("llama")
    attention = hf.model.layers[0].self_attn

    class Adapter(nn.Module):
        """What peft puts in a linear module's place."""

        def __init__(self, base):
            super().__init__()
            self.base_layer = base

        @property
        def weight(self):
            """The weight below."""
            return self.base_layer.weight

    attention.q_proj = Adapter(attention.q_proj)
    with pytest.raises(WeightError, match="W_Q is under an adapter .Adapter."):
        lens.load(hf).weight("W_Q", 0)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore::lens_core.errors.CostWarning")
def test_every_hook_point_is_served_where_a_weight_is_a_tensor_of_another_kind():
    """Heads apart (result, per-head inputs) are computed by the module, since such a weight need not transpose."""
    model = lens.load(by_tensor(tiny_llama("llama")))
    expected = by_tensor(tiny_llama("llama"))(TOKENS).logits
    logits, cache = model.run_with_cache(TOKENS, names_filter=lambda name: True)
    assert torch.equal(logits, expected)
    torch.testing.assert_close(cache["result", 1].sum(-2), cache["blocks.1.attn.hook_out"], rtol=1e-4, atol=1e-5)
