"""Names of hook points: the table of one model, its aliases, short forms and filters.

A canonical name is `blocks.L.PART.hook_X`, `PART.hook_X` or `hook_X`. Short forms: `("q", 3)`, `("scale", 3, "ln1")`,
`"q3"`, and `"q"` for all layers. `hf.PATH.input` and `hf.PATH.output` reach any HF module; filters never match them.
"""

import difflib
import fnmatch
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias, TypeGuard, cast

import attrs

from lens_core._arguments import checks_arguments
from lens_core.errors import ArgumentError, EmptyFilterError, UnknownHookError
from lens_core.shapes import axis_index

__all__ = ["HookPoint", "HookTable", "NameFilter", "Selection", "get_act_name", "is_short_form"]

NameFilter: TypeAlias = (
    str
    | tuple[str, int | None]
    | tuple[str, int | None, str | None]
    | Sequence[Any]
    | set[str]
    | Callable[[str], bool]
    | None
)
"""None (the default names), a name, short form or glob, a list of these, or a predicate on canonical names."""

SHORT_NAMES = {
    "attn": "pattern",
    "attn_logits": "attn_scores",
    "query": "q",
    "key": "k",
    "value": "v",
    "mlp_pre": "pre",
    "mlp_post": "post",
}
PART_NAMES = {"a": "attn", "m": "mlp", "attention": "attn", "b": "", "block": "", "blocks": ""}
LEGACY_BLOCK_NAMES = {"hook_in": "hook_resid_pre", "hook_out": "hook_resid_post"}
LEGACY_NAMES = {"embed.hook_out": "hook_embed", "pos_embed.hook_out": "hook_pos_embed"}


@attrs.frozen(kw_only=True)
class HookPoint:
    """One named place in the computation of a model.

    Example:
        >>> HookPoint(name="hook_logits", shape="batch pos d_vocab", equation="the logits", seam=None).layer is None
        True
    """

    name: str
    """Canonical name, such as `blocks.3.attn.hook_q`."""
    shape: str
    """Axes in the words of `lens_core.shapes.AXES`; `HF's own` for `hf.` names."""
    equation: str
    """What the value is, as the hook contract defines it."""
    seam: Any = attrs.field(repr=False)
    """How the place is reached; a record of `lens_core.seams`."""
    layer: int | None = None
    """0-based block, or None outside the blocks."""
    default: bool = True
    """Whether a cache that names nothing holds it; the starred names of the contract cost memory or time."""

    dtype: str = "model"
    """`model`, the model's own, or the name of the dtype that stands there whatever the model's is."""

    @property
    def position_axis(self) -> int | None:
        """Which axis an entry's positions name: `pos`, `query` in scores and patterns, else `key`."""
        found = (axis_index(self.shape, name=name) for name in ("pos", "query", "key"))
        return next((axis for axis in found if axis is not None), None)

    @property
    def part(self) -> str:
        """The name without its block: `attn.hook_q`."""
        return self.name if self.layer is None else self.name.split(".", 2)[2]


@attrs.frozen(kw_only=True)
class Selection:
    """What a filter chose: canonical names in the table's order."""

    names: tuple[str, ...]
    exact: bool
    """Whether the names were given one by one (then a place that the run leaves out is an error)."""


class HookTable(Mapping[str, HookPoint]):
    """The hook points of one model by canonical name, in the order of computation."""

    def __init__(
        self,
        points: Iterable[HookPoint],
        *,
        aliases: Mapping[str, str] | None = None,
        hf_point: Callable[[str], HookPoint | None] | None = None,
    ) -> None:
        """Index the points; `hf_point` makes the point of an `hf.` name, or None where HF has no such module."""
        self._points = {point.name: point for point in points}
        self._hf_point = hf_point
        self.n_layers = 1 + max((p.layer for p in self._points.values() if p.layer is not None), default=-1)
        self._rank = {name: index for index, name in enumerate(self._points)}
        self._parts: dict[str, list[str]] = {}  # part -> canonical names, by layer
        for point in self._points.values():
            self._parts.setdefault(point.part, []).append(point.name)
        self._aliases = dict(aliases or {})
        for alias, name in LEGACY_NAMES.items():
            self._aliases.setdefault(alias, name)
        for layer in range(self.n_layers):
            for alias, name in LEGACY_BLOCK_NAMES.items():
                self._aliases.setdefault(f"blocks.{layer}.{alias}", f"blocks.{layer}.{name}")
        seen_block = False
        self._depth: dict[str, int] = {}  # -1 embeddings, the layer, n_layers for what follows the blocks
        for point in self._points.values():
            seen_block = seen_block or point.layer is not None
            after = self.n_layers if seen_block else -1
            self._depth[point.name] = after if point.layer is None else point.layer

    def extended(self, points: Mapping[str, Sequence[HookPoint]]) -> "HookTable":
        """Give a table with further points, each list of them right after the place that it is given for."""
        ordered = [one for name, place in self._points.items() for one in (place, *points.get(name, ()))]
        return HookTable(ordered, aliases=self._aliases, hf_point=self._hf_point)

    def without(self, names: Collection[str]) -> "HookTable":
        """Give a table that lacks some points."""
        kept = [place for name, place in self._points.items() if name not in names]
        return HookTable(kept, aliases=self._aliases, hf_point=self._hf_point)

    def __getitem__(self, name: Any) -> HookPoint:
        """Give the point of a name, alias or short form."""
        canonical = self.canonical(name)
        return self._points[canonical] if canonical in self._points else self._hf(canonical)

    def __iter__(self) -> Iterator[str]:
        """Iterate over canonical names, in the order of computation."""
        return iter(self._points)

    def __len__(self) -> int:
        """Count the points, `hf.` names aside."""
        return len(self._points)

    def __contains__(self, name: object) -> bool:
        """Whether this is one of the canonical names."""
        return name in self._points

    def point(self, name: str) -> HookPoint:
        """Give the point of a canonical name."""
        found = self._points.get(name)
        return self._hf(name) if found is None else found

    def rank(self, name: str) -> int:
        """Order canonical names as they are computed, `hf.` names last."""
        return self._rank.get(name, len(self._rank))

    def depth(self, name: str) -> int | None:
        """Say where in the stack a place is: -1 before the blocks, its layer, n_layers after; None for `hf.` names."""
        return self._depth.get(name)

    @checks_arguments
    def canonical(self, name: Any) -> str:
        """Resolve a name, alias or short form to the one canonical name.

        Raises:
            UnknownHookError: No such hook point, or a short form that several share; near matches are offered.
        """
        names = self._lookup(name)
        if len(names) != 1:
            raise UnknownHookError(
                f"{name!r} stands for {len(names)} hook points, {names[0]} to {names[-1]}; "
                f"name one, such as {names[0]!r}"
            )
        return names[0]

    @checks_arguments
    def select(self, names: NameFilter) -> Selection:
        """Resolve a filter: None (the default names), a name, short form or glob, a list of these, or a predicate.

        Raises:
            UnknownHookError: A name that does not exist.
            EmptyFilterError: A filter that matches nothing.
            ArgumentError: A filter of another type.
        """
        if names is None:
            return Selection(names=tuple(n for n, p in self._points.items() if p.default), exact=False)
        if isinstance(names, str) and any(sign in names for sign in "*?["):
            return self._matching(fnmatch.filter(self._points, names), names)
        if isinstance(names, str) or is_short_form(names):
            return Selection(names=self._lookup(names), exact=True)
        if callable(names):
            return self._matching([n for n in self._points if names(n)], getattr(names, "__name__", names))
        if isinstance(names, list | tuple | set | frozenset):
            chosen = [self.select(one) for one in cast("Sequence[Any]", names) if one is not None]
            if len(chosen) != len(names) or not chosen:
                raise EmptyFilterError(
                    f"the list of hook names {names!r} is empty or holds None; name some hook points"
                )
            found = {name for selection in chosen for name in selection.names}
            ordered = [n for n in self._points if n in found]
            extra = sorted(found - set(ordered))
            return Selection(names=(*ordered, *extra), exact=all(s.exact for s in chosen))
        raise ArgumentError(
            "a names filter is a name, a list of names, a predicate on names, or None; "
            f"got {type(names).__name__}: {names!r}"
        )

    def _matching(self, found: list[str], names: object) -> Selection:
        if not found:
            raise EmptyFilterError(
                f"the filter {names!r} matches none of this model's {len(self)} hook points "
                f"(such as {', '.join(list(self)[:3])}); model.hook_points() lists them"
            )
        return Selection(names=tuple(found), exact=False)

    def find(self, name: str | tuple[Any, ...]) -> tuple[str, ...]:
        """Give the canonical names that a name, alias or short form stands for, none where there is no such point.

        Unlike `canonical` and `select`, it looks for no near matches, which take a hundred times as long as the answer.

        Raises:
            UnknownHookError: A layer that does not exist, a short form of several parts, or no such HF module.
            ArgumentError: Neither a name nor a short form.

        Example:
            >>> import lens_core as lens
            >>> table = lens.load("toy:gpt2").table
            >>> table.find("resid_mid"), table.find("hook_nowhere")
            (('blocks.0.hook_resid_mid', 'blocks.1.hook_resid_mid'), ())
        """
        if isinstance(name, str):
            if name in self._points:
                return (name,)
            if name in self._aliases:
                return (self._aliases[name],)
            if name.startswith("hf."):
                return (self._hf(name).name,)
            found = self._short(name, None, None)
            matched = re.fullmatch(r"([a-zA-Z_.]+?)(\d+)([a-z]\w*)?", name)
            if not found and matched:  # TransformerLens' "q3" and "scale4ln1"
                found = self._short(matched[1], int(matched[2]), matched[3])
            return tuple(found)
        if not is_short_form(name):
            raise ArgumentError(f"a hook name is a string or a tuple such as ('q', 3); got {name!r}")
        short, layer, *kind = name
        return tuple(self._short(short, layer, kind[0] if kind else None))

    def _lookup(self, name: Any) -> tuple[str, ...]:
        if found := self.find(name):
            return found
        raise UnknownHookError(self._unknown(name))

    def _short(self, name: str, layer: int | None, kind: str | None) -> list[str]:
        if layer is not None:
            if not -self.n_layers <= layer < self.n_layers:
                raise UnknownHookError(
                    f"layer {layer} of {name!r} does not exist: this model's layers are 0 to {self.n_layers - 1}"
                )
            layer %= self.n_layers
        short = name.removeprefix("hook_")
        short = SHORT_NAMES.get(short, short)
        kind = PART_NAMES.get(kind, kind) if kind else kind
        parts = [
            part
            for part in self._parts
            if part == name
            or (_short_of(part) == short and (not kind or part.startswith(f"{kind}.")))
            or (not kind and part.replace("hook_", "") == short)
        ]
        blocks = [part for part in parts if self._points[self._parts[part][0]].layer is not None]
        ends = [part for part in parts if part not in blocks]
        if layer is None and not kind and ends:  # TransformerLens: "scale" without a layer is the final norm's
            blocks = []
        chosen = blocks if layer is not None or not ends else ends
        if len(chosen) > 1:
            exact = [part for part in chosen if part in (f"hook_{short}", name)]
            if len(exact) != 1:
                options = ", ".join(repr(part) for part in chosen)
                raise UnknownHookError(
                    f"the short name {name!r} is shared by {options}; add the part: ({name!r}, L, 'ln1')"
                )
            chosen = exact
        names = self._parts[chosen[0]] if chosen else []
        if layer is None:
            return list(names)
        return [n for n in names if self._points[n].layer == layer]

    def _hf(self, name: str) -> HookPoint:
        point = self._hf_point(name) if self._hf_point else None
        if point is None:
            raise UnknownHookError(
                f"no HF module for {name!r}: the form is hf.MODULE_PATH.input or hf.MODULE_PATH.output, "
                "with a path of model.hf_model.named_modules()"
            )
        return point

    def _unknown(self, name: object) -> str:
        text = name if isinstance(name, str) else ".".join(str(bit) for bit in cast("tuple[object, ...]", name))
        for marker, names, what in _ELSEWHERE:
            if not any(marker in known for known in self._points) and (marker in text or _short_of(text) in names):
                return (
                    f"no hook point {name!r} in this model, which has no {what}; model.hook_points() lists what it has"
                )
        if _short_of(text).startswith("sae_") or ".hook_sae_" in text:
            return f"no hook point {name!r}: those of an SAE exist inside `with model.saes(...)`, at its place"
        pool = sorted({*self._points, *self._aliases, *(_short_of(part) for part in self._parts)})
        near = difflib.get_close_matches(text, pool, n=3, cutoff=0.5)
        hint = f"did you mean {', '.join(map(repr, near))}?" if near else "model.hook_points() lists them"
        return f"no hook point {name!r} in this model; {hint}"


_ELSEWHERE = (
    (".attn.", frozenset({"q", "k", "v", "z", "pattern", "attn_scores", "result", "attn_out"}), "attention"),
    (
        ".mixer.",
        frozenset({"mixer_in", "mixer_out", "ssm_state", "ssm_input", "ssm_write", "ssm_output", "delta", "decay"}),
        "state-space mixers",
    ),
)
"""Kinds of places that a whole model may lack: what names hold, some short forms, and what they are places of."""


def is_short_form(name: object) -> TypeGuard[tuple[Any, ...]]:
    """Whether something has the form of `("q", 3)` or `("scale", 3, "ln1")`, whatever the names are."""
    form: tuple[Any, ...] = cast("tuple[Any, ...]", name) if isinstance(name, tuple) else ()
    if not (2 <= len(form) <= 3 and isinstance(form[0], str)):
        return False
    kind_ok = len(form) == 2 or form[2] is None or isinstance(form[2], str)
    return kind_ok and (form[1] is None or (isinstance(form[1], int) and not isinstance(form[1], bool)))


def _short_of(part: str) -> str:
    return part.rsplit(".", 1)[-1].removeprefix("hook_")


_PART_OF = {
    "attn": "q k v z rot_q rot_k q_normed k_normed k_rep v_rep result pattern attn_scores",
    "mlp": "pre pre_linear post router_logits expert_weights expert_indices expert_out",
    "mixer": "in_proj gate conv_in conv ssm_input x_proj B C delta_pre delta decay ssm_write ssm_state y ssm_output "
    "gated inner_norm",
}
"""Which part of a block has a name, where no other part has it."""


def get_act_name(name: str, layer: int | str | None = None, layer_type: str | None = None) -> str:
    """Write a short form out, without a model: TransformerLens' function, and the names of state-space mixers.

    Nothing says whether a model has that hook point; `model.table.canonical(("q", 3))` does, and takes the same forms.

    Args:
        name: `"q"`, `"q3"`, `"scale4ln1"`, or a whole name, which is given back.
        layer: The block, 0-based; None for what is outside of the blocks.
        layer_type: `"attn"`, `"mlp"`, `"ln1"`, ..., or `"a"`, `"m"`, `"b"`, where the name does not say.

    Example:
        >>> get_act_name("k", 6, "a"), get_act_name("pre", 2), get_act_name("embed"), get_act_name("scale4ln1")
        ('blocks.6.attn.hook_k', 'blocks.2.mlp.hook_pre', 'hook_embed', 'blocks.4.ln1.hook_scale')
        >>> get_act_name("ssm_state", 0), get_act_name("normalized")
        ('blocks.0.mixer.hook_ssm_state', 'ln_final.hook_normalized')
    """
    if layer is None and layer_type is None:
        if "." in name or name.startswith("hook_"):
            return name
        matched = re.fullmatch(r"([a-zA-Z_]+?)(\d+)([a-z].*)?", name)
        if matched:
            name, layer, layer_type = matched.groups()
    name = SHORT_NAMES.get(name, name)
    part = next((part for part, names in _PART_OF.items() if name in names.split()), None)
    part = part or PART_NAMES.get(layer_type or "", layer_type)
    if layer is None and name in ("scale", "normalized"):
        part = "ln_final"
    return ".".join([*(["blocks", str(layer)] if layer is not None else []), *([part] if part else []), f"hook_{name}"])
