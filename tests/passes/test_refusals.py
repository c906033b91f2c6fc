"""Where a pass does not hold: it says why, raises, and changes nothing."""

import attrs
import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from golden.tiny import random_tokens, tiny_gpt2
from golden.tiny_llama import tiny_llama
from golden.tiny_ssm import tiny_ssm
from torch import nn

import lens_core as lens
from lens_core.passes import (
    PASSES,
    center_unembed,
    center_writing_weights,
    fold_ln,
    fold_value_biases,
    refactor_factored_attn_matrices,
)

ARCHITECTURES = {
    "RMSNorm": (center_writing_weights, "llama", "is an RMSNorm, which does not subtract the mean"),
    "soft cap": (center_unembed, "gemma2", r"logits are soft-capped \(cap \* tanh\(logits / cap\), cap = 5.0\)"),
    "sinks": (fold_value_biases, "gpt_oss", r"rows of the pattern do not sum to 1 \(attention sinks\)"),
    "rotary": (refactor_factored_attn_matrices, "llama", "queries and keys are rotated by position"),
    "experts without biases": (
        fold_ln,
        "phimoe",
        "has a bias, and .* which would take it on, can have none in HF's code",
    ),
}


@pytest.mark.parametrize("case", ARCHITECTURES)
def test_an_architecture_on_which_it_would_be_wrong(case):
    """The reason is that of the architecture, also in the record of what was left out."""
    one, variant, reason = ARCHITECTURES[case]
    refused(lens.load(tiny_llama(variant, attn="eager")), one, reason)


def test_no_attention():
    """In Mamba there is nothing to fold a value bias of."""
    refused(lens.load(tiny_ssm("mamba")), fold_value_biases, "mamba has no attention")


def refused(model, one, reason):
    """Assert that a pass raises with this reason, and that no bit changes."""
    before = {name: value.clone() for name, value in model.state_dict().items() if not value.is_meta}
    with pytest.raises(lens.WeightError, match=f"{one.name} does not hold for this model: .*{reason}"):
        one(model)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    assert model.passes == ()


class Quantised(nn.Linear):
    """A linear map whose weight is integers, as bitsandbytes has it."""

    def __init__(self, given):
        super().__init__(given.in_features, given.out_features, bias=False)
        self.weight = nn.Parameter((given.weight.detach() * 10).to(torch.int8), requires_grad=False)


class Adapted(nn.Module):
    """A linear map with low-rank weights beside it, as peft has it."""

    def __init__(self, given):
        super().__init__()
        self.base_layer, self.lora_A = given, nn.Linear(given.in_features, 2, bias=False)

    @property
    def weight(self):
        """The map's own."""
        return self.base_layer.weight


@pytest.mark.parametrize("kind", [Quantised, Adapted])
def test_weights_that_are_not_plain(kind):
    """Quantised weights cannot be scaled, and an adapter's part would be missed."""
    hf = tiny_llama()
    hf.model.layers[1].mlp.up_proj = kind(hf.model.layers[1].mlp.up_proj)
    refused(lens.load(hf), fold_ln, "up_proj.weight of .* quantised, adapted or spread over processes")


def test_weights_in_eight_bits_of_floating_point():
    """They have scales beside them, which a gain would not reach."""
    hf = tiny_llama()
    weight = hf.model.layers[0].self_attn.o_proj.weight
    hf.model.layers[0].self_attn.q_proj.weight = nn.Parameter(weight.detach().to(torch.float8_e4m3fn))
    refused(lens.load(hf), fold_ln, "q_proj.weight of Linear is Parameter of torch.float8_e4m3fn")


def test_offloaded_weights():
    """Accelerate holds them elsewhere: what is written here would be lost."""
    hf = tiny_gpt2(tie_word_embeddings=False)
    cpu_offload(hf)
    model = lens.load(hf)
    for one in PASSES:
        assert "is offloaded, where nothing can be written" in one.why_not(model)
    model.process_weights()
    assert all(record.skipped for record in model.passes)


def test_weights_placed_without_offload():
    """Where accelerate moves activations alone, passes hold."""
    hf = tiny_gpt2(tie_word_embeddings=False)
    expected = lens.load(tiny_gpt2(tie_word_embeddings=False)).process_weights()
    model = lens.load(dispatch_model(hf, device_map={"": "cpu"}, main_device="cpu", force_hooks=True)).process_weights()
    tokens = random_tokens()
    assert torch.equal(model(tokens), expected(tokens))


def test_a_weight_used_twice():
    """What is right behind one norm is wrong behind another."""
    hf = tiny_llama()
    hf.model.layers[1].self_attn.k_proj = hf.model.layers[0].self_attn.k_proj
    refused(lens.load(hf), fold_ln, "model.layers.0.self_attn.k_proj.weight is used at 2 places")
    hf = tiny_llama()
    hf.model.layers[1].input_layernorm = hf.model.layers[0].input_layernorm
    refused(lens.load(hf), fold_ln, "model.layers.0.input_layernorm.weight is used at 2 places")


def declared(model, **changes):
    """Give a model whose architecture declares something else."""
    model.declaration = attrs.evolve(model.declaration, **changes)
    return model


def test_an_architecture_that_does_not_say_what_reads_a_norm():
    """Neither none at all, nor one norm, nor one reader may be missing."""
    model = lens.load(tiny_llama())
    readers = model.declaration.readers
    refused(declared(model, readers=()), fold_ln, "does not say what reads .* \\(Declaration.readers\\)")
    refused(declared(model, readers=readers[:-1]), fold_ln, "does not say what reads model.norm")
    gone = attrs.evolve(readers[0], readers=("model.layers.0.self_attn.nothing",))
    told = "the architecture declares model.layers.0.self_attn.nothing, which is not there"
    refused(declared(model, readers=(gone, *readers[1:])), fold_ln, told)
    one = attrs.evolve(readers[0], readers=readers[0].readers[:2])
    told = "nobody declares model.layers.0.self_attn.v_proj.weight, which has the width of the residual stream"
    refused(declared(model, readers=(one, *readers[1:])), fold_ln, told)


def test_an_architecture_that_does_not_say_what_writes_or_how_a_norm_keeps_its_gain():
    """A plugin of a third party that was written before passes refuses them."""
    model = lens.load(tiny_gpt2())
    refused(declared(model, writing_weights=()), center_writing_weights, "does not say what writes to the stream")
    readers = model.declaration.readers
    norm = attrs.evolve(readers[0].norm, kind=attrs.evolve(readers[0].norm.kind, gain=None))
    changed = (attrs.evolve(readers[0], norm=norm), *readers[1:])
    refused(declared(model, readers=changed), fold_ln, "nobody says where transformer.h.0.ln_1 keeps its gain")
