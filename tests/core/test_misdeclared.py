"""What an author reads whose plugin declares a place that is not there, or not the right one."""

import sys
from types import ModuleType

import attrs
import lens_gpt2
import pytest
import torch
from lens_gpt2._architecture import GPT2
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP

import lens_core as lens
from lens_core import errors
from lens_core.plugin import Attention, ModuleOutput, hookimpl
from lens_core.testing import isolated_registry

CONFIG = GPT2Config(vocab_size=29, n_positions=16, n_embd=12, n_layer=1, n_head=2)
TOKENS = torch.arange(4)[None]


@pytest.fixture
def moved(monkeypatch):
    """Return a function that reads a hook point of GPT-2 after its place was moved."""

    def read(name, place, names=None):
        def declare(config):
            declaration = GPT2(config)
            seam = ModuleOutput(path=place) if isinstance(place, str) else place
            points = [attrs.evolve(p, seam=seam) if p.name == name else p for p in declaration.points]
            return attrs.evolve(declaration, points=tuple(points))

        module = ModuleType("lens_moved")
        module.declare = declare
        monkeypatch.setitem(sys.modules, "lens_moved", module)

        class Plugin:
            @hookimpl
            def lens_architectures(self):
                record = lens_gpt2.lens_architectures()[0]
                return [attrs.evolve(record, implementation="lens_moved:declare")]

        with isolated_registry(Plugin()):
            model = lens.load(GPT2LMHeadModel(CONFIG).eval())
            with torch.no_grad():
                model.run_with_cache(TOKENS, names_filter=names or [name])

    return read


def test_a_module_that_is_not_there_is_named_with_what_is(moved):
    """Whose place it is, the path, the module that lacks it, and the nearest name."""
    with pytest.raises(errors.UnsupportedHookError) as told:
        moved("blocks.0.mlp.hook_pre", "transformer.h.0.mlp.c_fcc")
    assert str(told.value) == (
        "'blocks.0.mlp.hook_pre' is declared at the module 'transformer.h.0.mlp.c_fcc', and GPT2MLP at "
        "'transformer.h.0.mlp' has no 'c_fcc'; did you mean 'c_fc'? It has: c_fc, c_proj, act, dropout"
    )


def test_a_base_that_is_not_there_is_named(moved):
    """The first part that is missing may be the first of all."""
    with pytest.raises(
        errors.UnsupportedHookError, match="GPT2LMHeadModel has no 'model'. It has: transformer, lm_head"
    ):
        moved("blocks.0.mlp.hook_pre", "model.layers.0.mlp")


def test_a_module_that_is_called_several_times_is_no_place(moved, monkeypatch):
    """It is said that the module may be the wrong one."""
    forward = GPT2MLP.forward
    monkeypatch.setattr(GPT2MLP, "forward", lambda self, x: self.act(forward(self, x)))
    with pytest.raises(errors.HookDidNotFireError, match="reached 2 times .* is no place for a hook point"):
        moved("blocks.0.mlp.hook_post", "transformer.h.0.mlp.act")


def test_two_hook_points_at_one_place_of_an_attention_are_named(moved):
    """Only one of them is served: the other one's error names it."""
    both = ["blocks.0.attn.hook_attn_scores", "blocks.0.attn.hook_pattern"]
    with pytest.raises(errors.HookDidNotFireError, match="declared at the place of 'blocks.0.attn.hook_pattern'"):
        moved(
            both[0], Attention(path="transformer.h.0.attn", part="pattern", method="_upcast_and_reordered_attn"), both
        )
