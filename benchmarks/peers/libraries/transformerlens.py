"""What both worlds of TransformerLens write alike."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from transformer_lens import patching

from benchmarks.peers.adapter import Metric
from benchmarks.peers.libraries.files import first_rows, write_batch

__all__ = ["Shared"]


class Shared:
    """The rows, over a model with TransformerLens' methods."""

    model: Any

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model(tokens)

    def hook(self, tokens: Tensor, layer: int) -> Tensor:
        read: list[Tensor] = []

        def note(value: Tensor, hook: Any) -> None:
            read.append(value)

        self.model.run_with_hooks(tokens, fwd_hooks=[(f"blocks.{layer}.hook_resid_post", note)])
        return read[0]

    def cache(self, tokens: Tensor) -> Sequence[Tensor]:
        return [value for value in self.model.run_with_cache(tokens)[1].values() if isinstance(value, Tensor)]

    def residuals(self, tokens: Tensor) -> Sequence[Tensor]:
        names = [f"blocks.{layer}.hook_resid_post" for layer in range(self.model.cfg.n_layers)]
        _, cache = self.model.run_with_cache(tokens, names_filter=names)
        return [cache[name] for name in names]

    def generate(self, tokens: Tensor, new_tokens: int, layer: int, vector: Tensor) -> Tensor:
        def add(value: Tensor, hook: Any) -> Tensor:
            return value + vector

        with self.model.hooks(fwd_hooks=[(f"blocks.{layer}.hook_resid_post", add)]):
            return self.model.generate(
                tokens,
                max_new_tokens=new_tokens,
                do_sample=False,
                stop_at_eos=False,
                verbose=False,
                return_type="tokens",
            )

    def sweep(self, clean: Tensor, corrupted: Tensor, metric: Metric) -> Tensor:
        names = [f"blocks.{layer}.hook_resid_pre" for layer in range(self.model.cfg.n_layers)]
        _, cache = self.model.run_with_cache(clean, names_filter=names)
        return patching.get_act_patch_resid_pre(self.model, corrupted, cache, lambda logits: metric(logits).mean())

    def harvest(self, batches: Iterable[Tensor], layers: Sequence[int], folder: Path) -> None:
        names = [f"blocks.{layer}.hook_resid_post" for layer in layers]
        for number, tokens in enumerate(batches):
            _, cache = self.model.run_with_cache(tokens, names_filter=names, stop_at_layer=max(layers) + 1)
            write_batch(folder, number, layers, [cache[name] for name in names])

    def harvested(self, folder: Path, layer: int, count: int) -> Tensor:
        return first_rows(folder, layer, count)
