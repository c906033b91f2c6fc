"""nnsight: a trace over HF's modules."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import nnsight
import torch
from nnsight import TransformersModel
from torch import Tensor

from benchmarks.peers.adapter import Metric
from benchmarks.peers.libraries.files import first_rows, write_batch

__all__ = ["IMPORT", "LOAD", "Model"]

IMPORT = "from nnsight import TransformersModel"
LOAD = "model = TransformersModel(folder, task='text-generation', dispatch=True)"


class Model:
    """A `TransformersModel`."""

    def __init__(self, folder: str) -> None:
        self.model = TransformersModel(folder, task="text-generation", dispatch=True)
        kind = self.model.config.model_type
        base = {"gpt2": "transformer", "mamba": "backbone"}.get(kind, "model")
        self.layers: Any = getattr(getattr(self.model, base), "h" if kind == "gpt2" else "layers")

    def forward(self, tokens: Tensor) -> Tensor:
        with self.model.trace(tokens, use_cache=False):
            logits = self.model.output.logits.save()
        return logits

    def hook(self, tokens: Tensor, layer: int) -> Tensor:
        with self.model.trace(tokens, use_cache=False):
            value = self.layers[layer].output.save()
        return value

    def cache(self, tokens: Tensor) -> Sequence[Tensor]:
        with self.model.trace(tokens, use_cache=False) as tracer:
            cache = tracer.cache()
        values = (cache[key].output for key in cache.keys())
        return [value for found in values for value in _tensors(found)]

    def residuals(self, tokens: Tensor) -> Sequence[Tensor]:
        with self.model.trace(tokens, use_cache=False):
            found = nnsight.save([])
            for layer in self.layers:
                found.append(layer.output)
        return found

    def generate(self, tokens: Tensor, new_tokens: int, layer: int, vector: Tensor) -> Tensor:
        block = self.layers[layer]
        with self.model.generate(
            tokens, max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False
        ) as tracer:
            for _ in tracer.iter[:new_tokens]:
                block.output = block.output + vector
            ids = tracer.result.save()
        return ids

    def sweep(self, clean: Tensor, corrupted: Tensor, metric: Metric) -> Tensor:
        """One forward for each layer, with a row for each position, as nnsight batches its invokes."""
        with self.model.trace(clean, use_cache=False):
            entering = nnsight.save([])
            for layer in self.layers:
                entering.append(layer.input)
        cells: list[Tensor] = []
        for layer, value in zip(self.layers, entering, strict=True):
            with self.model.trace(use_cache=False) as tracer:
                row = nnsight.save([])
                for position in range(corrupted.shape[1]):
                    with tracer.invoke(corrupted):
                        layer.input[:, position] = value[:, position]
                        row.append(metric(self.model.output.logits))
            cells.append(torch.cat(row))
        return torch.stack(cells)

    def harvest(self, batches: Iterable[Tensor], layers: Sequence[int], folder: Path) -> None:
        for number, tokens in enumerate(batches):
            with self.model.trace(tokens, use_cache=False) as tracer:
                found = nnsight.save([])
                for layer in layers:
                    found.append(self.layers[layer].output)
                tracer.stop()
            write_batch(folder, number, layers, found)

    def harvested(self, folder: Path, layer: int, count: int) -> Tensor:
        return first_rows(folder, layer, count)

    def state(self, tokens: Tensor) -> Sequence[Tensor]:
        with self.model.trace(tokens, use_cache=True):
            cache = self.model.output.cache_params.save()
        return [cache.get_recurrent_state(layer) for layer in range(len(self.layers))]

    def states(self, tokens: Tensor) -> Sequence[Tensor]:
        """Read the variable of HF's own loop, as often as it is bound; its number is of this transformers release."""
        with self.model.trace(tokens, use_cache=False) as tracer:
            found = nnsight.save([])
            for layer in self.layers:
                scan = layer.mixer.source.mamba_selective_scan_0.source.implementation_0.source
                for _ in tracer.iter[: tokens.shape[1]]:
                    found.append(scan.ssm_state_3.output)
        length = tokens.shape[1]
        return [torch.stack(found[start : start + length], 1) for start in range(0, len(found), length)]


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [tensor for part in value for tensor in _tensors(part)] if isinstance(value, tuple | list) else []
