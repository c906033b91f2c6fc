"""Plain HF: what every row is measured against, and what the values must be."""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from benchmarks.peers.adapter import Metric

__all__ = ["IMPORT", "LOAD", "Reference"]

IMPORT = "import torch; from transformers import AutoModelForCausalLM"
LOAD = "model = AutoModelForCausalLM.from_pretrained(folder)"


class Reference:
    """HF's own model, loaded by HF alone, with torch's own hooks where values are needed."""

    def __init__(self, folder: str) -> None:
        self.model: Any = AutoModelForCausalLM.from_pretrained(folder).eval()
        self.blocks: nn.ModuleList = getattr(self.model.base_model, _list_name(self.model))

    def forward(self, tokens: Tensor) -> Tensor:
        """Run the model; no KV cache."""
        return self.model(tokens, use_cache=False).logits

    def until(self, n_layers: int) -> Callable[[Tensor], Any]:
        """Give a forward that ends after some blocks: the same modules, the others left out."""
        short = copy.copy(self.model.base_model)
        short._modules = {**short._modules, _list_name(self.model): self.blocks[:n_layers]}
        return lambda tokens: short(tokens, use_cache=False).last_hidden_state

    def residuals(self, tokens: Tensor) -> list[Tensor]:
        """Give what each block returns."""
        found: list[Tensor] = []
        handles = [block.register_forward_hook(lambda *args: found.append(args[2])) for block in self.blocks]
        with _until_done(handles):
            self.forward(tokens)
        return found

    def generate(self, tokens: Tensor, new_tokens: int) -> Tensor:
        """Choose the likeliest tokens."""
        mask = torch.ones_like(tokens)
        return self.model.generate(
            tokens, attention_mask=mask, max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False
        )

    def generate_edited(self, tokens: Tensor, new_tokens: int, layer: int, vector: Tensor) -> Tensor:
        """Do the same with a vector added to what a block returns."""
        with _until_done([self.blocks[layer].register_forward_hook(lambda *args: args[2] + vector)]):
            return self.generate(tokens, new_tokens)

    def patched(self, clean: Tensor, corrupted: Tensor, layer: int, position: int, metric: Metric) -> Tensor:
        """Give one cell of the sweep."""
        entering: list[Tensor] = []
        read = self.blocks[layer].register_forward_pre_hook(lambda _, args: entering.append(args[0].clone()))
        with _until_done([read]):
            self.forward(clean)

        def patch(_: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
            value = args[0].clone()
            value[:, position] = entering[0][:, position]
            return (value, *args[1:])

        with _until_done([self.blocks[layer].register_forward_pre_hook(patch)]):
            return metric(self.forward(corrupted))

    def state(self, tokens: Tensor) -> list[Tensor]:
        """Give each layer's state after the last token, from HF's cache."""
        cache = self.model(tokens, use_cache=True).cache_params
        return [cache.get_recurrent_state(layer) for layer in range(len(self.blocks))]


def _list_name(model: Any) -> str:
    return "h" if model.config.model_type == "gpt2" else "layers"


@contextmanager
def _until_done(handles: Sequence[Any]) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
