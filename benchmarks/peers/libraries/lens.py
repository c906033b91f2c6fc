"""lens itself."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

import lens_core as lens
from benchmarks.peers.adapter import Metric
from lens_core.analysis.patching import patch_sweep

__all__ = ["IMPORT", "LOAD", "Model"]

IMPORT = "import lens_core"
LOAD = "model = lens_core.load(folder)"


class Model:
    """A `LensModel`."""

    def __init__(self, folder: str) -> None:
        self.model = lens.load(folder)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model(tokens)

    def hook(self, tokens: Tensor, layer: int) -> Tensor:
        read: list[Tensor] = []

        def note(value: Tensor, hook: Any) -> None:
            read.append(value)

        self.model.run_with_hooks(tokens, fwd_hooks=[(("resid_post", layer), note)])
        return read[0]

    def cache(self, tokens: Tensor) -> Sequence[Tensor]:
        return list(self.model.run_with_cache(tokens)[1].values())

    def residuals(self, tokens: Tensor) -> Sequence[Tensor]:
        return list(self.model.run_with_cache(tokens, names_filter="resid_post")[1].values())

    def generate(self, tokens: Tensor, new_tokens: int, layer: int, vector: Tensor) -> Tensor:
        def add(value: Tensor, hook: Any) -> Tensor:
            return value + vector

        with self.model.hooks(fwd_hooks=[(("resid_post", layer), add)]):
            return self.model.generate(tokens, max_new_tokens=new_tokens, do_sample=False, stop_at_eos=False)

    def sweep(self, clean: Tensor, corrupted: Tensor, metric: Metric) -> Tensor:
        _, cache = self.model.run_with_cache(clean, names_filter="resid_pre")
        return patch_sweep(self.model, corrupted, cache, metric, "resid_pre", positions=-1).values

    def harvest(self, batches: Iterable[Tensor], layers: Sequence[int], folder: Path) -> None:
        from lens_core.store import harvest

        batches = list(batches)
        names = [("resid_post", layer) for layer in layers]
        batch, context = batches[0].shape
        harvest(self.model, torch.cat(batches), folder / "store", names, context=context, pack=False, batch_size=batch)

    def harvested(self, folder: Path, layer: int, count: int) -> Tensor:
        """Read the first shard with safetensors' own reader: what is stored is judged, not how lens reads it."""
        shard = min(folder.glob("**/*.safetensors"))
        with safe_open(shard, framework="pt") as tensors:
            return tensors.get_slice(f"blocks.{layer}.hook_resid_post")[:count]

    def state(self, tokens: Tensor) -> Sequence[Tensor]:
        _, state = self.model(tokens, return_state=True)
        return [state.cache.get_recurrent_state(layer) for layer in range(self.model.cfg.n_layers)]

    def states(self, tokens: Tensor) -> Sequence[Tensor]:
        return list(self.model.run_with_cache(tokens, names_filter="ssm_state")[1].values())
