"""Nodes of a model's graph: what writes to the residual stream, what reads it, and what each contributed in a run.

See `lens_core.analysis.graph`, which makes the graph of them.
"""

from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Literal, TypeAlias

import attrs
import torch
from jaxtyping import Float
from torch import Tensor

from lens_core._arguments import checks_arguments
from lens_core._components import onward_of
from lens_core._decomposition import Decomposition, model_of, read_values
from lens_core.errors import ArgumentError

if TYPE_CHECKING:
    from lens_core.cache import ActivationCache
    from lens_core.model import LensModel

__all__ = ["SPLITS", "Edge", "Kind", "Node", "Split", "contributions", "n_heads_at", "reader_input", "split_of"]

Kind: TypeAlias = Literal["embed", "attn", "mlp", "mixer", "logits"]


@attrs.frozen(kw_only=True)
class Node:
    """A writer to the residual stream, or a reader of it.

    Attributes:
        label: `embed`, `L3H5` (a head; `L3S5` of a mixer that attention stands beside), `L3.attn`, `L3.mlp`,
            `L3.mixer`, `logits`; a head's readers are `L3H5.q`, `L3H5.k` and `L3H5.v`, of a group of heads that share
            keys and values `L3KV1.k`.
        role: `"writer"`, `"reader"`, or `"constant"` for a bias that the heads of a layer share.
        kind: What part of the model it is.
        hook: The hook point that holds what a writer computes, or what a reader reads.
        writes: For a writer inside a block, the hook point of what its whole branch adds to the stream.
        layer: 0-based block; None outside of the blocks.
        head: Index along the hook point's axis of heads (in `mixer.hook_gated` the heads' channels follow each other);
            None for all of it.
        part: `"q"`, `"k"` or `"v"` for what attention reads.
    """

    label: str
    role: Literal["writer", "reader", "constant"]
    kind: Kind
    hook: str
    writes: str | None = None
    layer: int | None = None
    head: int | None = None
    part: Literal["q", "k", "v"] | None = None

    @property
    def component(self) -> str:
        """The label without the part: what reads and writes as one thing."""
        return self.label if self.part is None else self.label.removesuffix(f".{self.part}")


@attrs.frozen
class Edge:
    """A writer, and a reader that comes after it.

    Example:
        >>> import lens_core as lens
        >>> from lens_core.analysis.graph import graph
        >>> graph(lens.load("toy:gpt2")).edge("L0H3 -> L1H2.k").target.hook
        'blocks.1.hook_k_input'
    """

    source: Node
    target: Node

    @property
    def label(self) -> str:
        """Such as `L0H3 -> L1H2.k`."""
        return f"{self.source.label} -> {self.target.label}"


@attrs.frozen(kw_only=True)
class Split:
    """How the output of a branch is a sum over heads; hook names are below the block."""

    hook: str
    """What is a head's own."""
    reads: str
    """What the linear map of the heads reads."""
    weight: str
    bias: str
    counts: str
    """A hook point whose shape has an axis of heads, if the branch has heads."""


SPLITS = {
    "hook_attn_out": Split(
        hook="attn.hook_result", reads="attn.hook_z", weight="W_O", bias="b_O", counts="attn.hook_z"
    ),
    "hook_mixer_out": Split(
        hook="mixer.hook_gated",
        reads="mixer.hook_gated",
        weight="W_out_proj",
        bias="b_out_proj",
        counts="mixer.hook_ssm_output",
    ),
}


def n_heads_at(model: "LensModel", name: str) -> int:
    """Give the length of a hook point's axis of heads; 0 where it has none."""
    axes = model.table[name].shape.split()
    axis = next((axis for axis in ("n_heads", "n_kv_heads", "ssm_heads") if axis in axes), None)
    return 0 if axis is None else model.cfg.sizes[axis]


def split_of(node: Node) -> Split:
    """Say how the branch of a head, or of a constant, is a sum."""
    return SPLITS[_writer_of(node)]


def _writer_of(node: Node) -> str:
    return (node.writes or node.hook).rsplit(".", 1)[-1]


@checks_arguments
def contributions(cache: "ActivationCache", nodes: Sequence[Node]) -> Float[Tensor, "node *batch pos d_model"]:
    """Give what some writers, or constants, added to the residual stream.

    A head's part is computed from what its output projection read (`attn.hook_z`, `mixer.hook_gated`) and its rows of
    the weight, or taken from `attn.hook_result` where that is cached. The result is a residual stream for each node.

    Args:
        cache: Holds `Graph.writer_names`, for all or some positions; with its model.
        nodes: `Graph.writers`, or some of them, or `Graph.constants`.

    Returns:
        In the order of the nodes, in at least float32, on the first one's device; a new tensor, on autograd's graph
        where the cached values are.

    Raises:
        CacheError: A value was not cached, or the cache has no model.
        ArgumentError: No nodes, or one that reads.

    Example:
        >>> import lens_core as lens
        >>> from lens_core.analysis.graph import graph
        >>> model = lens.load("toy:gpt2")
        >>> found = graph(model)
        >>> _, cache = model.run_with_cache("the cat sat", names_filter=[*found.writer_names, "blocks.1.hook_mlp_in"])
        >>> parts = contributions(cache, found.before("L1.mlp", constants=True))
        >>> bool(torch.allclose(parts.sum(0), reader_input(cache, found.reader("L1.mlp")), atol=1e-4))
        True
    """
    wrong = [node.label for node in nodes if node.role == "reader"]
    if wrong or not nodes:
        raise ArgumentError(f"{wrong[0]} reads, and contributes nothing" if wrong else "no nodes are given")
    parts = Decomposition(cache, None)
    together = groupby(nodes, key=lambda node: (node.hook, node.role, node.head is None))
    each = [_contributed(parts, list(group)) for _, group in together]
    return torch.cat([one.to(each[0].device) for one in each])


def _contributed(parts: Decomposition, nodes: Sequence[Node]) -> Tensor:
    """Give what nodes of one hook point added, `[node, ..., d_model]`."""
    first, model = nodes[0], model_of(parts.cache)
    if first.head is None and first.role == "writer":
        (value,) = parts.values(first.hook)
        return parts.measure.part(value).expand(len(nodes), *value.shape)
    layer, how = first.layer or 0, split_of(first)
    onward = onward_of(parts, layer, _writer_of(first))
    name = f"blocks.{layer}.{how.reads}"
    n_heads = n_heads_at(model, f"blocks.{layer}.{how.counts}")
    heads = [node.head or 0 for node in nodes]
    if first.role == "writer" and first.hook.endswith("hook_result") and first.hook in parts.cache:
        (results,) = parts.values(first.hook)
        return onward.scaled(onward.rows(results[..., heads, :]).movedim(-2, 0))
    (value,) = parts.values(name)
    if "d_inner" in model.table[name].shape.split():
        value = value.reshape(*value.shape[:-1], n_heads, -1)
    if first.role == "constant":
        bias = onward.rows(model.weight(how.bias, layer).detach()).to(value.device)
        return onward.scaled(bias.expand(*value.shape[:-2], -1))[None].expand(len(nodes), *value.shape[:-2], -1)
    weight = onward.rows(model.weight(how.weight, layer).detach())
    weight = weight.reshape(n_heads, -1, weight.shape[-1])
    dtype = torch.promote_types(value.dtype, weight.dtype)
    added = torch.einsum("...he,hed->h...d", value[..., heads, :].to(dtype), weight[heads].to(value.device, dtype))
    return onward.scaled(added)


@checks_arguments
def reader_input(cache: "ActivationCache", reader: Node) -> Float[Tensor, "*batch pos d_model"]:
    """Give the residual stream that a reader read: of a head its own copy, of whole attention the first head's.

    Raises:
        CacheError: Its hook point was not cached; name `Graph.reader_names`.
        ArgumentError: A node that does not read.

    Example:
        >>> import lens_core as lens
        >>> from lens_core.analysis.graph import graph
        >>> model = lens.load("toy:gpt2")
        >>> found = graph(model)
        >>> _, cache = model.run_with_cache("the cat", names_filter=list(found.reader_names))
        >>> reader_input(cache, found.readers[0]).shape[-1] == model.cfg.d_model
        True
    """
    if reader.role != "reader":
        raise ArgumentError(f"{reader.label} is a {reader.role}; a reader has an input, such as those of graph.readers")
    (value,) = read_values(cache, [reader.hook])
    return value if reader.part is None else value[..., reader.head or 0, :]
