"""Models with PEFT adapters: what lens shows and edits is what the adapted model computes, as PEFT itself runs it."""

import copy

import pytest
import torch
from golden.tiny import random_tokens, tiny_gpt2
from golden.tiny_llama import tiny_llama
from golden.tiny_ssm import tiny_ssm
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model

import lens_core as lens
from lens_core.errors import UnsupportedConfigError, WeightError

TOKENS = random_tokens()


def tiny_mamba():
    """Build Mamba."""
    return tiny_ssm("mamba")


# How it is made, what is adapted, the blocks' path; of a projection among the adapted its path, hook point and view.
FAMILIES = {
    "gpt2": (tiny_gpt2, ["c_attn", "c_proj", "c_fc"], "transformer.h", "mlp.c_fc", "mlp.hook_pre", "W_in"),
    "llama": (tiny_llama, ["q_proj", "v_proj", "o_proj"], "model.layers", "self_attn.o_proj", "attn.hook_out", "W_O"),
    "mamba": (tiny_mamba, ["in_proj", "x_proj"], "backbone.layers", "mixer.in_proj", "mixer.hook_in_proj", "W_in_proj"),
}
pytestmark = pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing.:FutureWarning",  # of HF, about PEFT
    "ignore::lens_core.errors.CostWarning",
)


class Subject:
    """One family's tiny model, adapted."""

    def __init__(self, family):
        self.family = family
        make, targets, self.blocks, self.path, point, self.view = FAMILIES[family]
        self.plain = make()
        self.point = f"blocks.1.{point}"
        self.config = LoraConfig(
            r=2, lora_alpha=6, target_modules=targets, task_type="CAUSAL_LM", fan_in_fan_out=family == "gpt2"
        )
        self.peft = self.adapted()
        self.model = lens.load(self.peft)

    def adapted(self):
        """Give a PEFT model of its own, with noise in both halves of every adapter."""
        model = get_peft_model(copy.deepcopy(self.plain), self.config).eval()
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        return model

    def module(self, peft):
        """Give the projection of the second block."""
        return peft.get_base_model().get_submodule(f"{self.blocks}.1.{self.path}")

    def by_hand(self):
        """Give a plain HF model whose weights hold the sums: W + (alpha / r) B A."""
        plain = copy.deepcopy(self.plain)
        for path, module in self.peft.get_base_model().named_modules():
            if hasattr(module, "lora_A"):
                delta = 3 * module.lora_B["default"].weight @ module.lora_A["default"].weight
                plain.get_submodule(path).weight.data += delta.T if self.family == "gpt2" else delta
        return plain


@pytest.fixture(params=FAMILIES)
def subject(request):
    """Give each family."""
    return Subject(request.param)


def everything(name):
    """Choose every hook point."""
    return True


def square(value, hook=None):
    """Edit."""
    return value * value * 0.3 + 0.1


def put(module, change):
    """Change a module's output by a torch hook."""
    return module.register_forward_hook(lambda module, args, output: change(output))


@torch.no_grad()
def test_values_are_those_of_the_adapted_model(subject):
    """Every hook point fires; no bit of the logits moves; values are those of a plain model with the sums."""
    logits, cache = subject.model.run_with_cache(TOKENS, names_filter=everything)
    assert torch.equal(logits, subject.adapted()(TOKENS).logits)
    assert set(cache) == {point.name for point in subject.model.hook_points()}
    assert (logits - subject.plain(TOKENS).logits).abs().max() > 0.1
    _, expected = lens.load(subject.by_hand()).run_with_cache(TOKENS, names_filter=everything)
    for name, value in expected.items():
        torch.testing.assert_close(
            cache[name], value, rtol=1e-3, atol=1e-4, msg=lambda told, name=name: f"{name}{told}"
        )
    assert subject.model.hf_model is subject.peft


@torch.no_grad()
def test_edits_are_those_of_torch_hooks(subject):
    """At an adapted projection and at a block, called through lens, through PEFT's model and through HF's."""
    reference = subject.adapted()
    block = reference.get_base_model().get_submodule(f"{subject.blocks}.1")
    for name, module in ((subject.point, subject.module(reference)), ("blocks.1.hook_resid_post", block)):
        handle = put(module, square)
        expected = reference(TOKENS).logits
        handle.remove()
        assert (expected - reference(TOKENS).logits).abs().max() > 1e-2
        entry = (name, square)
        assert torch.equal(subject.model.run_with_hooks(TOKENS, fwd_hooks=[entry]), expected), name
        with subject.model.hooks(fwd_hooks=[entry, ("hook_logits", lambda value, hook: value * 2)]):
            for call in (subject.peft, subject.peft.get_base_model()):
                assert torch.equal(call(TOKENS).logits, expected * 2), name


@torch.no_grad()
def test_generation_is_that_of_the_adapted_model(subject):
    """PEFT's own generate, with and without a hook."""
    options = {"max_new_tokens": 4, "do_sample": False}
    reference, mask = subject.adapted(), torch.ones_like(TOKENS)
    for is_edited in (False, True):
        with subject.model.hooks(fwd_hooks=[(subject.point, square)] if is_edited else []):
            ours = subject.model.generate(TOKENS, return_type="tokens", stop_at_eos=False, **options)
        if is_edited:
            put(subject.module(reference), square)
        theirs = reference.generate(input_ids=TOKENS, attention_mask=mask, eos_token_id=None, **options)
        assert torch.equal(ours, theirs)


@torch.no_grad()
def test_an_adapter_turned_off_or_merged(subject):
    """disable_adapter() shows the model below; merge_adapter() shows the sums, and gives views of them."""
    model, name = subject.model, subject.view
    adapted = model(TOKENS)
    below = lens.load(subject.plain)
    with pytest.raises(WeightError, match=f"{name} is under an adapter .Linear.*merge_adapter"):
        model.weight(name, 1)
    with subject.peft.disable_adapter():
        logits, cache = model.run_with_cache(TOKENS)
        expected, known = below.run_with_cache(TOKENS)
        assert torch.equal(logits, expected)
        assert all(torch.equal(cache[name], known[name]) for name in known)
        assert torch.equal(model.weight(name, 1), below.weight(name, 1))
    subject.peft.merge_adapter()
    torch.testing.assert_close(model(TOKENS), adapted, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(model.weight(name, 1), lens.load(subject.by_hand()).weight(name, 1))
    with subject.peft.disable_adapter(), pytest.raises(WeightError, match="under an adapter"):
        model.weight(name, 1)
    subject.peft.unmerge_adapter()
    with pytest.raises(WeightError, match="under an adapter"):
        model.weight(name, 1)
    merged = lens.load(subject.peft.merge_and_unload())
    torch.testing.assert_close(merged(TOKENS), adapted, rtol=1e-3, atol=1e-4)


def test_a_training_step_under_hooks_is_one_under_torch_hooks(subject):
    """Gradients reach the adapter through an edit, and only the adapter; so does the optimiser."""
    reference = subject.adapted()
    put(subject.module(reference), square)
    seen = []
    for peft, is_ours in ((subject.peft, True), (reference, False)):
        optimiser = torch.optim.AdamW((p for p in peft.parameters() if p.requires_grad), lr=0.1)
        for _ in range(2):
            optimiser.zero_grad()
            if is_ours:
                with subject.model.hooks(
                    fwd_hooks=[(subject.point, square)],
                    bwd_hooks=[("blocks.0.hook_resid_pre", lambda gradient, hook: seen.append(gradient))],
                ):
                    loss = peft(TOKENS, labels=TOKENS).loss
            else:
                loss = peft(TOKENS, labels=TOKENS).loss
            loss.backward()
            optimiser.step()
    assert len(seen) == 2
    before = dict(subject.adapted().named_parameters())
    theirs = dict(reference.named_parameters())
    for name, parameter in subject.peft.named_parameters():
        assert torch.equal(parameter, theirs[name]), name
        assert ("lora_" in name) == (parameter.grad is not None), name
        if parameter.grad is not None:
            assert torch.equal(parameter.grad, theirs[name].grad), name
            assert not torch.equal(parameter, before[name]), name


@torch.no_grad()
def test_passes_refuse_what_an_adapter_is_on(subject):
    """A gain folded under an adapter would not reach what the adapter adds."""
    before = subject.model(TOKENS)
    with pytest.raises(WeightError, match="adapted"):
        lens.load(subject.peft, process=["fold_ln"])
    if subject.family == "gpt2":
        with pytest.raises(WeightError, match="adapted"):
            lens.load(subject.peft, process=["fold_value_biases"])
    assert torch.equal(subject.model(TOKENS), before)
    subject.peft.merge_and_unload()
    lens.load(subject.peft.get_base_model(), process=["fold_ln"])


@torch.no_grad()
def test_an_adapter_of_hfs_own_methods():
    """add_adapter on a model that lens has already: it is seen, and can be switched."""
    hf = tiny_llama()
    model = lens.load(hf)
    plain = model(TOKENS)
    hf.add_adapter(LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    hf.eval()
    logits, cache = model.run_with_cache(TOKENS)
    assert torch.equal(logits, hf(TOKENS).logits)
    assert (logits - plain).abs().max() > 1e-2
    own = []
    hf.model.layers[1].self_attn.q_proj.register_forward_hook(lambda module, args, output: own.append(output))
    hf(TOKENS)
    assert torch.equal(cache["q", 1].flatten(-2), own[0])
    with pytest.raises(WeightError, match="under an adapter"):
        model.weight("W_Q", 1)
    hf.disable_adapters()
    assert torch.equal(model.run_with_cache(TOKENS)[0], plain)


@torch.no_grad()
def test_modules_that_an_adapter_trains_whole_are_shown():
    """modules_to_save: the copy in use is what runs and what the view shows."""
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    peft = get_peft_model(tiny_llama(), config).eval()
    peft.get_base_model().lm_head.modules_to_save["default"].weight.mul_(2)
    model = lens.load(peft)
    logits, cache = model.run_with_cache(TOKENS)
    assert torch.equal(logits, peft(TOKENS).logits)
    torch.testing.assert_close(cache["unembed.hook_in"] @ model.weight("W_U"), logits)


@pytest.mark.parametrize("kind", [PromptTuningConfig, PrefixTuningConfig])
def test_virtual_tokens_are_refused(kind):
    """Positions would not be those of the caller's tokens."""
    peft = get_peft_model(tiny_llama(), kind(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    with pytest.raises(UnsupportedConfigError, match="virtual tokens"):
        lens.load(peft)
    assert lens.load(peft.get_base_model())(TOKENS).shape == (2, 5, 29)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore::lens_core.errors.CompileWarning")
def test_compiled_around_the_adapter_and_copied():
    """A wrapper around a wrapper."""
    one = Subject("llama")
    expected = one.peft(TOKENS).logits
    torch._dynamo.reset()
    model = lens.load(torch.compile(one.peft, backend="eager"))
    for _ in range(2):
        assert torch.equal(model.run_with_cache(TOKENS)[0], expected)
    torch._dynamo.reset()
    assert torch.equal(copy.deepcopy(one.model).run_with_cache(TOKENS)[0], expected)
