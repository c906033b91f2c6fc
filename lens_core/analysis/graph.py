"""The computational graph of a model's residual stream: who writes to it, who reads it, and in which order.

Every part of a block reads the sum of what was written before it. So a model is a graph: its *writers* are the
embeddings, each attention head (or attention as a whole), each MLP and each SSM mixer (or each of its heads); its
*readers* are the queries, keys and values of each head, each MLP, each mixer, and the logits; an *edge* leads from
every writer to every reader that comes after it. All of it is derived from the hook points that the architecture
declares, so parallel blocks, blocks of one branch, grouped queries, post-norms and hybrids come out as they are
computed.

What a writer contributes is what it *adds* to the stream: behind the post-norm (at the scale that the run had) or the
factor of its branch. Heads share their output's bias, which no one head writes: it is a constant of the graph, no node.
A reader's input is the sum of its writers' contributions and of the constants before it, exactly.

Source: Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits"; the graph as in Conmy et al. 2023
(ACDC, arXiv 2304.14997) and Syed, Rager and Conmy 2023 (arXiv 2310.10348).
"""

import difflib
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Literal

import attrs
import torch
from jaxtyping import Bool
from torch import Tensor

from lens_core._arguments import checks_arguments
from lens_core.analysis.nodes import SPLITS, Edge, Kind, Node, Split, contributions, n_heads_at, reader_input, split_of
from lens_core.errors import ArgumentError, UnsupportedHookError
from lens_core.hook_points import HookTable

if TYPE_CHECKING:
    from lens_core.model import LensModel

__all__ = ["Edge", "Graph", "Node", "contributions", "graph", "reader_input"]

_READERS: Mapping[str, Kind] = {"hook_mixer_in": "mixer", "hook_mlp_in": "mlp"}
_HEAD_READERS: Mapping[str, Literal["q", "k", "v"]] = {"hook_q_input": "q", "hook_k_input": "k", "hook_v_input": "v"}
_WRITERS: Mapping[str, Kind] = {"hook_mixer_out": "mixer", "hook_attn_out": "attn", "hook_mlp_out": "mlp"}


@attrs.frozen(kw_only=True, slots=False)
class Graph:
    """Writers and readers of one model's residual stream, each in the order of computation.

    Attributes:
        writers: What writes; they never change their order, so they can be an axis of a tensor.
        readers: What reads, likewise.
        constants: Biases that the heads of a layer share; part of what readers read, not of the graph's edges.
        reach: For each reader, how many of the writers come before it.
        constant_reach: For each reader, how many of the constants do.
        writer_names: The hook points that `contributions` needs in a cache.
    """

    writers: tuple[Node, ...] = attrs.field(repr=False)
    readers: tuple[Node, ...] = attrs.field(repr=False)
    constants: tuple[Node, ...] = attrs.field(repr=False)
    reach: tuple[int, ...] = attrs.field(repr=False)
    constant_reach: tuple[int, ...] = attrs.field(repr=False)
    writer_names: tuple[str, ...] = attrs.field(repr=False)

    def __repr__(self) -> str:
        """Say how large it is."""
        return f"Graph({len(self.writers)} writers, {len(self.readers)} readers, {len(self)} edges)"

    def __len__(self) -> int:
        """Count the edges."""
        return sum(self.reach)

    @cached_property
    def edges(self) -> tuple[Edge, ...]:
        """All edges: reader by reader, and for each the writers before it; the order of `mask.T`'s true cells."""
        return tuple(
            Edge(writer, reader)
            for reader, reach in zip(self.readers, self.reach, strict=True)
            for writer in self.writers[:reach]
        )

    @property
    def mask(self) -> Bool[Tensor, "writer reader"]:
        """Where there is an edge; a new tensor on the CPU."""
        return torch.arange(len(self.writers))[:, None] < torch.tensor(self.reach)[None]

    @property
    def components(self) -> tuple[str, ...]:
        """What reads or writes, each once: the nodes of the graph as ACDC counts them, and the logits."""
        return tuple(dict.fromkeys(node.component for node in (*self.writers, *self.readers)))

    @property
    def reader_names(self) -> tuple[str, ...]:
        """The hook points of what the readers read, each once."""
        return tuple(dict.fromkeys(reader.hook for reader in self.readers))

    def before(self, reader: "Node | str", *, constants: bool = False) -> tuple[Node, ...]:
        """Give the writers that a reader reads; with the constants, all that its input is the sum of."""
        index = self.readers.index(self.reader(reader))
        held = self.constants[: self.constant_reach[index]] if constants else ()
        return self.writers[: self.reach[index]] + held

    def after(self, writer: "Node | str") -> tuple[Node, ...]:
        """Give the readers that come after a writer."""
        index = self.writers.index(self.writer(writer))
        return tuple(reader for reader, reach in zip(self.readers, self.reach, strict=True) if index < reach)

    def writer(self, label: "Node | str") -> Node:
        """Find a writer by its label.

        Raises:
            ArgumentError: There is none.
        """
        return _found(label, self.writers, "writer")

    def reader(self, label: "Node | str") -> Node:
        """Find a reader by its label.

        Raises:
            ArgumentError: There is none.
        """
        return _found(label, self.readers, "reader")

    def edge(self, label: str) -> Edge:
        """Find an edge by its label, such as `L0H3 -> L1H2.k`.

        Raises:
            ArgumentError: No such writer or reader, or the writer does not come before the reader.
        """
        source, _, target = (bit.strip() for bit in label.partition("->"))
        edge = Edge(self.writer(source), self.reader(target))
        if edge.source not in self.before(edge.target):
            raise ArgumentError(f"{label!r} is no edge: {source} is not written before {target} reads")
        return edge


def _found(label: Node | str, nodes: tuple[Node, ...], role: str) -> Node:
    found = next((node for node in nodes if label in (node, node.label)), None)
    if found is None:
        text = label.label if isinstance(label, Node) else str(label)
        near = difflib.get_close_matches(text, [node.label for node in nodes], n=3, cutoff=0.4)
        hint = f"did you mean {', '.join(near)}?" if near else f"there are {nodes[0].label} to {nodes[-1].label}"
        raise ArgumentError(f"this graph has no {role} {text!r}; {hint}")
    return found


@checks_arguments
def graph(
    model: "LensModel", heads: bool = True, *, merge_embeddings: bool = False, per_query_head: bool = False
) -> Graph:
    """Derive the computational graph of a model.

    Args:
        model: The model. Only what its architecture declares is read; nothing is run.
        heads: Whether each head writes and reads by itself: attention's, and Mamba-2's as writers (its heads share the
            gated norm, whose scale is taken as the run had it). A Mamba mixer stays one node: its heads would be the
            `d_inner` channels; attribute these at `mixer.hook_gated`. False takes attention and mixers whole; attention
            still reads by queries, keys and values.
        merge_embeddings: Whether token and position embeddings are one writer, `embed`, as in ACDC and EAP.
        per_query_head: Under grouped-query attention, whether each query head reads its keys and values by itself
            (`hook_k_input_rep`), or each group of heads does, as they are computed.

    Raises:
        UnsupportedHookError: A branch of a block has no hook point for what it reads.

    Example:
        >>> import lens_core as lens
        >>> found = graph(lens.load("toy:gpt2"))
        >>> found
        Graph(12 writers, 27 readers, 137 edges)
        >>> [writer.label for writer in found.before("L0.mlp")]
        ['embed', 'pos_embed', 'L0H0', 'L0H1', 'L0H2', 'L0H3']
    """
    table, writers = model.table, _embeddings(model, merged=merge_embeddings)
    readers, constants = list[Node](), list[Node]()
    reach, constant_reach = list[int](), list[int]()
    held = held_constants = 0  # the last so many were written by this block, and nothing has read them yet

    def read(nodes: Sequence[Node]) -> None:
        readers.extend(nodes)
        reach.extend([len(writers) - held] * len(nodes))
        constant_reach.extend([len(constants) - held_constants] * len(nodes))

    for layer in range(table.n_layers):
        block = f"blocks.{layer}."
        held = held_constants = 0
        for name in (name for name in table if name.startswith(block)):
            part = name.removeprefix(block)
            if part == "hook_resid_mid":
                held = held_constants = 0
            elif part in _READERS:
                kind = _READERS[part]
                read([Node(label=f"L{layer}.{kind}", role="reader", kind=kind, hook=name, layer=layer)])
            elif part in _HEAD_READERS:
                read(_head_readers(model, name, split=heads, per_query_head=per_query_head))
            elif part in model.declaration.writers:
                _check_read(readers, name, layer)
                new, shared = _branch(model, layer, part, split=heads)
                writers, constants = writers + new, constants + shared
                held, held_constants = held + len(new), held_constants + len(shared)
    held = held_constants = 0
    read([Node(label="logits", role="reader", kind="logits", hook=f"blocks.{table.n_layers - 1}.hook_resid_post")])
    return Graph(
        writers=tuple(writers),
        readers=tuple(readers),
        constants=tuple(constants),
        reach=tuple(reach),
        constant_reach=tuple(constant_reach),
        writer_names=_needed(table, writers),
    )


def _embeddings(model: "LensModel", *, merged: bool) -> list[Node]:
    if merged:
        return [Node(label="embed", role="writer", kind="embed", hook="blocks.0.hook_resid_pre")]
    names = model.declaration.embeddings
    return [Node(label=name.removeprefix("hook_"), role="writer", kind="embed", hook=name) for name in names]


def _head_readers(model: "LensModel", name: str, *, split: bool, per_query_head: bool) -> list[Node]:
    """Give what reads at one of a block's three copies of the stream."""
    point = model.table[name]
    layer, part, repeated = point.layer, _HEAD_READERS[point.part], f"{name}_rep"
    sign = "H"
    if repeated in model.table:
        name, sign = (repeated, "H") if per_query_head else (name, "KV")
    if not split:
        return [Node(label=f"L{layer}.attn.{part}", role="reader", kind="attn", hook=name, layer=layer, part=part)]
    return [
        Node(
            label=f"L{layer}{sign}{head}.{part}",
            role="reader",
            kind="attn",
            hook=name,
            layer=layer,
            head=head,
            part=part,
        )
        for head in range(n_heads_at(model, name))
    ]


def _branch(model: "LensModel", layer: int, part: str, *, split: bool) -> tuple[list[Node], list[Node]]:
    """Give the writers of one branch, and the constant that they share."""
    writes, kind = f"blocks.{layer}.{part}", _WRITERS[part]
    how = SPLITS.get(part)
    count = 0 if how is None or not split else _heads_that_write(model, layer, how)
    if how is None or not count:
        return [Node(label=f"L{layer}.{kind}", role="writer", kind=kind, hook=writes, writes=writes, layer=layer)], []
    hook = f"blocks.{layer}.{how.hook}"
    sign = "S" if kind == "mixer" and f"blocks.{layer}.hook_attn_out" in model.table else "H"  # else two have one name
    nodes = [
        Node(label=f"L{layer}{sign}{head}", role="writer", kind=kind, hook=hook, writes=writes, layer=layer, head=head)
        for head in range(count)
    ]
    bias = Node(label=f"L{layer}.{kind}.bias", role="constant", kind=kind, hook=writes, writes=writes, layer=layer)
    return nodes, [bias] if how.bias in model.weight_names else []


def _heads_that_write(model: "LensModel", layer: int, how: Split) -> int:
    """Count the heads that a branch's output is a sum over; 0 where it is none, as in Mamba."""
    reads, counts = (f"blocks.{layer}.{part}" for part in (how.reads, how.counts))
    has_sum = {reads, counts} <= set(model.table) and how.weight in model.weight_names
    return n_heads_at(model, counts) if has_sum else 0


def _check_read(readers: Sequence[Node], name: str, layer: int) -> None:
    """See that what a branch reads has a name, too."""
    kind = _WRITERS.get(name.rsplit(".", 1)[-1])
    if not any(reader.layer == layer and reader.kind == kind for reader in readers):
        raise UnsupportedHookError(
            f"{name!r} writes to the residual stream, and no hook point before it holds what its branch reads: edges "
            "into it cannot be told apart. The architecture would have to declare one, such as hook_mlp_in"
        )


def _needed(table: HookTable, writers: Sequence[Node]) -> tuple[str, ...]:
    """Give the names that hold what the writers contribute."""
    found: set[str] = set()
    for node in writers:
        if node.head is None:
            found.add(node.hook)
        else:
            block = f"blocks.{node.layer}."
            found |= {block + split_of(node).reads, block + "ln1_post.hook_scale"}
    return tuple(name for name in table if name in found)
