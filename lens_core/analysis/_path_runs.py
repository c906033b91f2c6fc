"""Runs in which some readers read something else: what path patching does, many patches in one forward."""

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING, Any

import attrs
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lens_core.analysis._runs import Prompt, position_mask
from lens_core.analysis.graph import Graph, Node, contributions
from lens_core.cache import ActivationCache
from lens_core.errors import ArgumentError

if TYPE_CHECKING:
    from lens_core.model import LensModel

__all__ = ["Cell", "PathRuns", "path_runs"]


@attrs.frozen(kw_only=True)
class Cell:
    """One patch: what of the graph's writers is taken from the other run, for which of its readers."""

    senders: tuple[int, ...]
    receivers: tuple[int, ...]
    position: int | None = None
    """The one position where it is taken; None for all that may be."""


@attrs.frozen(kw_only=True, eq=False)
class PathRuns:
    """A model, an input, and what writers wrote differently in another run.

    Attributes:
        graph: Writers and readers.
        prompt: The input.
        cache: The plain run: `blocks.L.hook_resid_pre`, and what branches added where MLPs are live.
        streams: What the receivers read in it, by hook point.
        shifts: What each sender wrote in the other run less what it wrote in this one, by writer.
        live_mlps: Whether MLPs between hear the senders.
    """

    graph: Graph
    prompt: Prompt
    cache: ActivationCache
    logits: Float[Tensor, "batch pos d_vocab"]
    streams: Mapping[str, Float[Tensor, "batch pos d_model"]]
    shifts: Mapping[int, Float[Tensor, "batch pos d_model"]]
    live_mlps: bool

    @torch.no_grad()
    def run(self, cells: Sequence[Cell]) -> Float[Tensor, "rows pos d_vocab"]:
        """Run one copy of the rows for each cell, from the first block that has a receiver."""
        readers = sorted({index for cell in cells for index in cell.receivers})
        moved = self._live(cells, readers) if self.live_mlps else self._frozen(cells, readers)
        n_layers, copies = self.prompt.model.cfg.n_layers, len(cells)
        start = min(self._layer(self.graph.readers[index]) for index in readers)
        if start == n_layers:  # the logits alone: nothing but the final norm and the unembedding is run
            (name,) = moved
            residual = _rows(self.streams[name] + moved[name], self.streams[name].dtype)
            return self.prompt.run(copies=copies, start=start, residual=residual)
        hooks: list[Any] = []
        for name, group in groupby(readers, key=lambda index: self.graph.readers[index].hook):
            edit = _Reading(self, cells, tuple(group), moved[name])
            hooks.append((name, edit.edited))
        stream = self.cache[f"blocks.{start}.hook_resid_pre"].repeat(copies, 1, 1)
        return self.prompt.run(hooks, copies=copies, start=start, residual=stream)

    def _layer(self, node: Node) -> int:
        return self.prompt.model.cfg.n_layers if node.layer is None else node.layer

    def _shift(self, cells: Sequence[Cell], writers: Sequence[int]) -> Float[Tensor, "cell batch pos d_model"] | None:
        """Add up what these writers send in each cell; None where none of them does."""
        used = [index for index in writers if any(index in cell.senders for cell in cells)]
        if not used:
            return None
        stacked = torch.stack([self.shifts[index] for index in used])  # writer batch pos d_model
        sends = torch.zeros(len(cells), len(used), stacked.shape[2], dtype=stacked.dtype, device=stacked.device)
        for row, cell in enumerate(cells):
            at = slice(None) if cell.position is None else cell.position
            for column, index in enumerate(used):
                if index in cell.senders:
                    sends[row, column, at] = 1
        return torch.einsum("cwp,wbpd->cbpd", sends, stacked)

    def _frozen(self, cells: Sequence[Cell], readers: Sequence[int]) -> dict[str, Tensor]:
        """Give what the receivers' inputs change by: the senders' own differences."""
        found: dict[str, Tensor] = {}
        for index in readers:
            name, reach = self.graph.readers[index].hook, self.graph.reach[index]
            if name not in found:
                shift = self._shift(cells, range(reach))
                stream = self.streams[name]
                found[name] = stream.new_zeros(len(cells), *stream.shape) if shift is None else shift
        return found

    # ------------------------------------------------------------------ MLPs between live

    def _live(self, cells: Sequence[Cell], readers: Sequence[int]) -> dict[str, Tensor]:
        """Find the same by a run in which everything but the MLPs is held, up to the last receiver."""
        model, copies = self.prompt.model, len(cells)
        nodes = [self.graph.readers[index] for index in readers]
        senders = {index for cell in cells for index in cell.senders}
        start = min(self.graph.writers[index].layer or 0 for index in senders)
        last = max(map(self._layer, nodes))
        hooks = [*self._held(cells, range(start, min(last + 1, model.cfg.n_layers)))]
        if start == 0:
            hooks += self._embedded(cells)
        seen: dict[str, Tensor] = {}
        names = dict.fromkeys(node.hook for node in nodes)
        hooks += [(name, partial(_keep, seen)) for name in names]
        stream = self.cache[f"blocks.{start}.hook_resid_pre"].repeat(copies, 1, 1) if start else None
        stop = None if last >= model.cfg.n_layers - 1 else last + 1
        self.prompt.run(hooks, copies=copies, start=start or None, residual=stream, stop=stop)
        batch = self.prompt.shape[0]
        return {name: seen[name].view(copies, batch, *seen[name].shape[1:]) - self.streams[name] for name in names}

    def _embedded(self, cells: Sequence[Cell]) -> list[Any]:
        hooks: list[Any] = []
        for index, node in enumerate(self.graph.writers):
            shift = self._shift(cells, [index]) if node.layer is None else None
            if shift is not None:
                hooks.append((node.hook, partial(_moved, shift)))
        return hooks

    def _held(self, cells: Sequence[Cell], layers: Sequence[int]) -> list[Any]:
        """Hold what attention, mixers and sending MLPs add at what they added, the senders' differences apart."""
        hooks: list[Any] = []
        for name, group in groupby(range(len(self.graph.writers)), key=lambda index: self.graph.writers[index].writes):
            writers = list(group)
            node = self.graph.writers[writers[0]]
            if name is None or node.layer not in layers:
                continue
            shift = self._shift(cells, writers)
            held = torch.ones(len(cells), dtype=torch.bool)
            if node.kind == "mlp":
                held = torch.tensor([writers[0] in cell.senders for cell in cells])
            if held.any():
                hooks.append((name, _Holding(self.cache[name], shift, held).edited))
        return hooks


@attrs.frozen(eq=False)
class _Holding:
    """Puts the plain run's value in place, with a difference, in some cells."""

    plain: Float[Tensor, "batch pos d_model"]
    shift: Float[Tensor, "cell batch pos d_model"] | None
    held: Bool[Tensor, " cell"]

    def edited(self, value: Tensor, hook: Any) -> Tensor:
        """Give what the branch adds."""
        own = value.view(len(self.held), -1, *value.shape[1:])
        new = self.plain.expand_as(own) if self.shift is None else (self.plain + self.shift).to(value.dtype)
        return torch.where(self.held.to(value.device).view(-1, 1, 1, 1), new, own).flatten(0, 1)


@attrs.frozen(eq=False)
class _Reading:
    """Puts what receivers read in place, in the cells that have them."""

    runs: PathRuns
    cells: Sequence[Cell]
    readers: tuple[int, ...]
    """At one hook point."""
    moved: Float[Tensor, "cell batch pos d_model"]

    def edited(self, value: Tensor, hook: Any) -> Tensor:
        """Give what is read; logits hear the receivers before them too, and so start from what they read now."""
        nodes = [self.runs.graph.readers[index] for index in self.readers]
        own = value.view(len(self.cells), -1, *value.shape[1:])  # cell batch pos (head) d_model
        if nodes[0].kind == "logits":
            return (own + self.moved).to(value.dtype).flatten(0, 1)
        new = (self.runs.streams[nodes[0].hook] + self.moved).to(value.dtype)
        chosen = torch.zeros(len(self.cells), own.shape[3] if own.ndim == 5 else 1, dtype=torch.bool)
        for row, cell in enumerate(self.cells):
            for index, node in zip(self.readers, nodes, strict=True):
                if index in cell.receivers:
                    chosen[row, slice(None) if node.head is None else node.head] = True
        chosen = chosen.to(value.device)
        if own.ndim == 5:
            return torch.where(chosen[:, None, None, :, None], new.unsqueeze(3), own).flatten(0, 1)
        return torch.where(chosen[:, :, None, None], new, own).flatten(0, 1)


def _rows(value: Float[Tensor, "cell batch pos d_model"], dtype: torch.dtype) -> Float[Tensor, "rows pos d_model"]:
    return value.to(dtype).flatten(0, 1)


def _moved(shift: Float[Tensor, "cell batch pos d_model"], value: Tensor, hook: Any) -> Tensor:
    """Add what the cells' senders send."""
    return (value + shift.flatten(0, 1)).to(value.dtype)


def _keep(seen: dict[str, Tensor], value: Tensor, hook: Any) -> None:
    """Keep what is read at a place; all heads' copies are the same stream."""
    seen[hook.name] = value[:, :, 0].clone() if value.ndim == 4 else value


@torch.no_grad()
def path_runs(
    model: "LensModel",
    graph: Graph,
    input: Any,
    source: Any,
    cells: Sequence[Cell],
    *,
    positions: Any,
    live_mlps: bool,
    options: Mapping[str, Any],
) -> PathRuns:
    """Run the input, and the other one unless its cache is given, and take the senders' differences.

    Raises:
        ArgumentError: Rows or positions of the two do not fit.
        CacheError: The cache lacks what the senders wrote.
    """
    prompt = Prompt.read(model, input, options)
    senders = sorted({index for cell in cells for index in cell.senders})
    readers = [graph.readers[index] for index in sorted({index for cell in cells for index in cell.receivers})]
    streams: dict[str, Tensor] = {}
    hooks: list[Any] = [(name, partial(_keep, streams)) for name in dict.fromkeys(one.hook for one in readers)]
    branches = dict.fromkeys(node.writes for node in graph.writers if node.writes is not None) if live_mlps else ()
    entries = [f"blocks.{layer}.hook_resid_pre" for layer in range(model.cfg.n_layers)]
    logits, cache = prompt.cached(list(dict.fromkeys((*graph.writer_names, *branches, *entries))), hooks)
    other = source if isinstance(source, ActivationCache) else None
    if other is None:
        prompt_of_other = Prompt.read(model, source, options)
        _check_shape(prompt_of_other.shape, prompt)
        _, other = prompt_of_other.cached(graph.writer_names)
    nodes = [graph.writers[index] for index in senders]
    there, here = contributions(other, nodes), contributions(cache, nodes)
    _check_shape(tuple(there.shape[1:-1]), prompt)
    shift = there.to(here.device) - here
    mask = position_mask(positions, prompt)
    if mask is not None:
        shift = shift * mask[None, :, :, None].to(shift.device)
    return PathRuns(
        graph=graph,
        prompt=prompt,
        cache=cache,
        logits=logits,
        streams=streams,
        shifts=dict(zip(senders, shift, strict=True)),
        live_mlps=live_mlps,
    )


def _check_shape(shape: tuple[int, ...], prompt: Prompt) -> None:
    if shape != prompt.shape:
        raise ArgumentError(
            f"senders are taken from the same row and position of the other run, {list(shape)}, which is to be of the "
            f"input's shape, {list(prompt.shape)} (rows, positions)"
        )
