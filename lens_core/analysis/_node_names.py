"""How users name the writers and readers of a graph: labels, heads, hook points."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, cast

from lens_core.analysis.graph import Graph, Node
from lens_core.errors import ArgumentError, UnknownHookError

if TYPE_CHECKING:
    from lens_core.hook_points import HookTable

__all__ = ["find_readers", "find_writers", "read_keys"]


def find_writers(graph: Graph, table: "HookTable", given: Any) -> tuple[int, ...]:
    """Find writers by label (`L3H5`, `L3.mlp`), node, head `(3, 5)`, or hook point, in the order of computation.

    A hook point stands for all that write there: `("attn_out", 3)` or `blocks.3.attn.hook_z` for all heads of a layer.

    Raises:
        ArgumentError: No such writer, or nothing given.
    """
    return _found(graph.writers, table, given, "senders")


def find_readers(graph: Graph, table: "HookTable", given: Any) -> tuple[int, ...]:
    """Find readers by label (`L3H5.q`, `L3.mlp`, `logits`), node, head, or hook point, in the order of computation.

    `(3, 5, "q")` is a head's queries, `(3, 5)` and `L3H5` all that it reads by itself, a hook point such as
    `("q_input", 3)` all that read there.

    Raises:
        ArgumentError: No such reader, or nothing given.
    """
    return _found(graph.readers, table, given, "receivers")


def read_keys(given: Any) -> list[Any]:
    """List what is given, where one may be given by itself: also as a tuple, if that is a head or a short form."""
    if isinstance(given, str | Node) or not isinstance(given, Iterable):
        return [given]
    listed = list(cast("Iterable[Any]", given))
    is_one = 2 <= len(listed) <= 3 and (listed[1] is None or type(listed[1]) is int)
    return [given] if isinstance(given, tuple) and is_one else listed


def _found(nodes: tuple[Node, ...], table: "HookTable", given: Any, role: str) -> tuple[int, ...]:
    keys = read_keys(given)
    if not keys:
        raise ArgumentError(f"no {role} are given; name some, such as {nodes[-1].label!r}")
    return tuple(sorted({index for key in keys for index in _indices(nodes, table, key, role)}))


def _indices(nodes: tuple[Node, ...], table: "HookTable", key: Any, role: str) -> list[int]:
    if isinstance(key, Node):
        found = [index for index, node in enumerate(nodes) if node == key]
    else:
        label = _label(key)
        found = [index for index, node in enumerate(nodes) if label in (node.label, node.component)]
        if not found:
            name = _hook(table, key)
            found = [index for index, node in enumerate(nodes) if name is not None and name in _places(node, table)]
    if not found:
        labels = [node.label for node in nodes]
        shown = ", ".join(labels if len(labels) <= 12 else (*labels[:5], "...", *labels[-5:]))
        raise ArgumentError(
            f"{key!r} is none of the {role} that there can be: {shown}. A label, a head (layer, head), for readers "
            "(layer, head, 'q'), or a hook point that holds what they write or read"
        )
    return found


def _label(key: object) -> str:
    """Give the label of a head; anything else is its own."""
    form: tuple[Any, ...] = cast("tuple[Any, ...]", key) if isinstance(key, tuple) else ()
    if 2 <= len(form) <= 3 and all(isinstance(bit, int) for bit in form[:2]):
        return f"L{form[0]}H{form[1]}" + (f".{form[2]}" if len(form) == 3 else "")
    return str(cast("object", key))


def _hook(table: "HookTable", key: Any) -> str | None:
    try:
        return table.canonical(key)
    except (UnknownHookError, ArgumentError):
        return None


def _places(node: Node, table: "HookTable") -> set[str]:
    """Name the hook points that hold what a writer writes or a reader reads."""
    names = {node.hook, node.writes}
    if node.role == "writer" and node.kind == "attn":
        names |= {f"blocks.{node.layer}.attn.hook_{part}" for part in ("z", "result", "out")}
    return {name for name in names if name is not None and name in table}
