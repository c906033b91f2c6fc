"""What passes did to a model's weights, kept with the HF model, and how it is taken back."""

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from lens_core._pass_weights import Matrix, find_parameter, is_tied, wide
from lens_core.errors import WeightError

__all__ = ["Editor", "PassLog", "PassRecord", "applied_passes", "log_of", "row_pieces", "undo"]

ATTRIBUTE = "_lens_passes"
TIED = "tie_word_embeddings"
CHUNK = 2**20
"""Numbers of a weight that are worked on at once."""


@attrs.frozen(kw_only=True)
class PassRecord:
    """What one pass did to a model, or why it did nothing.

    Attributes:
        name: The pass.
        skipped: Why it was left out; empty where it was applied.
        layers: Blocks whose weights it changed, 0-based; the ends of the model are not counted.
        changed: Paths of the parameters that it changed or made.
        untied: Whether it gave the unembedding a weight of its own, where it shared the embedding's.
        added_bytes: Bytes of the parameters that it made: missing biases, and the unembedding where it was tied.
        kept_bytes: Bytes of the originals that it kept for `undo_passes`.
    """

    name: str
    skipped: str = ""
    layers: tuple[int, ...] = ()
    changed: tuple[str, ...] = ()
    untied: bool = False
    added_bytes: int = 0
    kept_bytes: int = 0

    def __str__(self) -> str:
        """Tell it in a line."""
        if self.skipped:
            return f"{self.name}: left out, since {self.skipped}"
        if not self.changed:
            return f"{self.name}: there was nothing to change"
        count = f"{len(self.changed)} parameter{'s' if len(self.changed) > 1 else ''}"
        where = f"in {len(self.layers)} blocks and around them" if self.layers else "outside of the blocks"
        untied = ", the unembedding untied from the embedding" if self.untied else ""
        sizes = f"{_mib(self.added_bytes)} added, {_mib(self.kept_bytes)} kept to undo"
        return f"{self.name}: {count} {where}{untied}; {sizes}"


def _mib(count: int) -> str:
    return f"{count / 2**20:.1f} MiB"


@attrs.define(kw_only=True, eq=False)
class PassLog:
    """The passes of an HF model, in order, and what its parameters were before."""

    records: list[PassRecord] = attrs.field(factory=list[PassRecord])
    originals: dict[str, Tensor | None] = attrs.field(factory=dict[str, Tensor | None])
    """Path to value before the first pass; None for a parameter that was not there."""
    tied: tuple[str, str] | None = None
    """Paths of the embedding's and the unembedding's modules, where a pass untied them."""
    said_tied: tuple[bool, ...] = ()
    """Which of HF's configs, the text model's last, said so."""
    is_kept: bool = True
    """Whether all that changed can be put back."""

    @property
    def applied(self) -> tuple[str, ...]:
        """Names of the passes that were applied, in order."""
        return tuple(record.name for record in self.records if not record.skipped)


def log_of(hf_model: Any) -> PassLog:
    """Give the log of an HF model; an empty one where no pass was applied."""
    return getattr(hf_model, ATTRIBUTE, None) or PassLog()


def applied_passes(hf_model: Any) -> tuple[str, ...]:
    """Name the passes that an HF model went through."""
    return log_of(hf_model).applied


class Editor:
    """Changes the parameters of one model for one pass, and remembers what they were."""

    def __init__(self, model: Any, log: PassLog, *, keep: bool) -> None:
        self.root: nn.Module = model.bare_model
        self.model, self.log, self.keep = model, log, keep
        self.changed: dict[str, None] = {}
        self.added_bytes = self.kept_bytes = 0
        self.untied = False

    def parameter(self, path: str) -> nn.Parameter | None:
        """Give a parameter, to look at."""
        return find_parameter(self.root, path)

    def touched(self, path: str) -> nn.Parameter:
        """Give a parameter that is about to be written to."""
        parameter = find_parameter(self.root, path)
        assert parameter is not None
        self.changed.setdefault(path)
        is_made = self.log.tied is not None and path == f"{self.log.tied[1]}.weight"
        if path not in self.log.originals and not is_made:
            if self.keep:
                original = parameter.detach().clone()
                self.log.originals[path] = original
                self.kept_bytes += original.nbytes
            else:
                self.log.is_kept = False
        return parameter

    def fill(self, path: str, value: float) -> None:
        """Set every number of a parameter."""
        self.touched(path).fill_(value)

    def map_rows(self, path: str, axis: int, function: Callable[[Tensor], Tensor]) -> None:
        """Put `function(rows)` in place of the rows along an axis, some at a time, each rounded once."""
        for rows in row_pieces(self.touched(path), axis):
            rows.copy_(function(wide(rows)))

    def add_to_bias(self, matrix: Matrix, addend: Tensor) -> None:
        """Add to a linear map's bias, which is made where it has none."""
        assert matrix.bias is not None
        bias = self.parameter(matrix.bias)
        if bias is not None:
            bias = self.touched(matrix.bias)
            bias.copy_(wide(bias) + addend.to(bias.device))
            return
        weight = self.parameter(matrix.weight)
        assert weight is not None
        self.make(matrix.bias, addend.to(weight), requires_grad=weight.requires_grad)

    def make(self, path: str, value: Tensor, *, requires_grad: bool) -> None:
        """Make a parameter where there was none."""
        owner, _, name = path.rpartition(".")
        setattr(self.root.get_submodule(owner), name, nn.Parameter(value, requires_grad=requires_grad))
        self.log.originals.setdefault(path, None)
        self.changed.setdefault(path)
        self.added_bytes += value.nbytes

    def untie(self) -> None:
        """Give the unembedding a weight of its own, where it shares the embedding's."""
        embed, unembed = self.model.declaration.embed, self.model.declaration.unembed
        if not is_tied(self.root, embed, unembed):
            return
        shared = self.parameter(f"{embed}.weight")
        assert shared is not None
        own = nn.Parameter(shared.detach().clone(), requires_grad=shared.requires_grad)
        self.root.get_submodule(unembed).weight = own
        self.log.tied, self.untied = (embed, unembed), True
        self.added_bytes += own.nbytes
        configs = _configs(self.root)
        self.log.said_tied = tuple(bool(getattr(config, TIED, False)) for config in configs)
        for config, said in zip(configs, self.log.said_tied, strict=True):
            if said:  # or HF ties them again, when it saves or resizes
                setattr(config, TIED, False)


def row_pieces(parameter: Tensor, axis: int) -> list[Tensor]:
    """Cut a parameter into pieces `[rows, width]`, with the axis last; views."""
    moved = parameter.detach().movedim(axis, -1)
    matrices = moved.unbind(0) if moved.ndim == 3 else (moved if moved.ndim == 2 else moved[None],)
    rows = max(1, CHUNK // moved.shape[-1])
    return [matrix[start : start + rows] for matrix in matrices for start in range(0, len(matrix), rows)]


def _configs(root: Any) -> tuple[Any, Any]:
    return root.config, root.config.get_text_config(decoder=True)


def undo(model: Any) -> None:
    """Put every parameter back as it was before the first pass.

    Raises:
        WeightError: Originals were not kept.
    """
    root = model.bare_model
    log = log_of(root)
    if not log.is_kept:
        raise WeightError(
            f"{', '.join(log.applied)} cannot be undone: the original weights were not kept (keep=False, or "
            "lens.load(..., process=)); load the model again"
        )
    with torch.no_grad():
        for path, original in log.originals.items():
            owner, _, name = path.rpartition(".")
            module, parameter = root.get_submodule(owner), find_parameter(root, path)
            if original is None:
                setattr(module, name, None)
            elif parameter is not None:
                parameter.copy_(original)
        if log.tied is not None:
            embed, unembed = log.tied
            root.get_submodule(unembed).weight = root.get_submodule(embed).weight
            for config, said in zip(_configs(root), log.said_tied, strict=True):
                if said:
                    setattr(config, TIED, True)
    with suppress(AttributeError):
        delattr(root, ATTRIBUTE)
