"""What memory the passes take beside the weights: counted, tensor by tensor."""

import weakref

import pytest
import torch
from golden.tiny_llama import tiny_llama
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import GPT2Config, GPT2LMHeadModel

import lens_core as lens
from lens_core import _pass_log


class Counted(TorchDispatchMode):
    """Counts the bytes of all storages that operations make and that are still there."""

    def __init__(self, known):
        super().__init__()
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.alive, self.now, self.peak = {}, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Run an operation, and take note of what it made."""
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._note(tensor)
        self.peak = max(self.peak, self.now)
        return out

    def _note(self, tensor):
        storage = tensor.untyped_storage()
        at = storage.data_ptr()
        if not at or at in self.known:
            return
        if at not in self.alive:
            self.alive[at] = [0, storage.nbytes()]
            self.now += storage.nbytes()
        self.alive[at][0] += 1
        weakref.finalize(tensor, self._drop, at)

    def _drop(self, at):
        self.alive[at][0] -= 1
        if not self.alive[at][0]:
            self.now -= self.alive.pop(at)[1]


def wide_gpt2():
    """A model whose layers and embedding are much larger than a piece."""
    config = GPT2Config(vocab_size=1500, n_positions=16, n_embd=64, n_layer=6, n_head=4)
    return GPT2LMHeadModel(config).to(torch.bfloat16).eval()


def peak(model, **options):
    """Process a model, and give the most bytes beside its weights."""
    counted = Counted(model.parameters())
    with counted:
        model.process_weights(refactor_factored_attn_matrices=None, **options)
    return counted.peak


def test_the_most_memory_is_one_layer_and_the_untied_embedding(monkeypatch):
    """Without originals: what was made, and less than one layer in float32."""
    monkeypatch.setattr(_pass_log, "CHUNK", 2**12)
    model = lens.load(wide_gpt2())
    layer = 2 * sum(parameter.nbytes for parameter in model.hf_model.transformer.h[0].parameters())
    total = sum(parameter.nbytes for parameter in model.parameters())
    embedding = model.hf_model.transformer.wte.weight.nbytes
    most = peak(model, keep=False)
    added = sum(record.added_bytes for record in model.passes)
    assert embedding <= added < embedding + 1500 * 2 * 2
    assert most < added + layer
    assert most < total


def test_originals_cost_what_the_records_say(monkeypatch):
    """kept_bytes, and one layer."""
    monkeypatch.setattr(_pass_log, "CHUNK", 2**12)
    model = lens.load(wide_gpt2())
    layer = 2 * sum(parameter.nbytes for parameter in model.hf_model.transformer.h[0].parameters())
    most = peak(model)
    told = sum(record.added_bytes + record.kept_bytes for record in model.passes)
    assert told < most < told + layer


@pytest.mark.parametrize("variant", ["mixtral"])
def test_experts_are_taken_one_by_one(variant, monkeypatch):
    """A stack of experts is never there twice."""
    monkeypatch.setattr(_pass_log, "CHUNK", 2**8)
    model = lens.load(tiny_llama(variant))
    stack = model.hf_model.model.layers[0].mlp.experts.gate_up_proj.nbytes
    assert peak(model, keep=False) < stack
