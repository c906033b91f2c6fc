"""Properties 8 to 11: an edit reaches what the equations say, and nothing else."""

from typing import Any

import torch

from lens_conformance.case import TIGHT, Case, error
from lens_conformance.checks import check
from lens_conformance.edits import only_at, only_head
from lens_conformance.oracle import Pair

MOVES = 1e-6
"""How far an edit must move the logits at least, of their scale: rounding in float64 is 1e-13."""


@check(8, "an edit has the golden forward's effect, on the logits and on every other value", judge="golden", share=2.0)
def edits(case: Case) -> None:
    """One name, or a program of several: returned or in place, at some positions, of one head, under padding."""
    with case.exact():
        one = case.pair(torch.float64)
        ids, options = case.batch(longest=8)
        program: dict[str, Any] = {}
        entries: list[tuple[Any, ...]] = []
        for name in case.deal(one.names(), case.integer(1, 3, "edits")):
            program[name], entry = _edit(case, one, name, ids.shape[1], is_padded=bool(options))
            entries.append(entry)
        expected_logits, expected = one.golden(ids, edits=program, **options)
        with torch.no_grad(), one.model.hooks(fwd_hooks=entries):
            logits, cache = one.model.run_with_cache(ids, names_filter=one.names(), **options)
        at = f"under edits at {list(program)}"
        for row in case.rows(options):
            case.same(f"the logits {at}", *case.real("hook_logits", row, logits, expected_logits))
            for name in one.names():
                case.same(f"{name} {at}", *case.real(name, row, cache[name], expected[name]))


def _edit(case: Case, one: Pair, name: str, n_pos: int, *, is_padded: bool) -> tuple[Any, tuple[Any, ...]]:
    """Choose an edit of a name: as the golden forward takes it, and as lens does."""
    edit: Any = case.family.edit_at(name, causal=is_padded)  # what a query gives to later keys, padding may not have
    axes = one.model.table[name].shape.split() if name in one.model.table else []
    heads = next(
        (axis for axis, of in enumerate(axes) if of in ("n_heads", "n_kv_heads", "n_groups", "ssm_heads")), None
    )
    if heads is not None and case.flag("one head"):
        edit = only_head(edit, 0, heads)
    has_positions = case.family.pos_axis(name) is not None and not case.family.per_position(name)
    if has_positions and case.flag("at some positions"):
        where = case.some(range(n_pos), "edited positions")
        return only_at(name, edit, where), (name, edit, where)
    return edit, (name, _in_place(edit) if case.flag("in place") else edit)


def _in_place(edit: Any) -> Any:
    def write(x: torch.Tensor, hook: Any) -> None:
        x.copy_(edit(x.clone(), hook=hook))

    return write


@check(9, "an edit at any name moves the logits", judge="law")
def liveness(case: Case) -> None:
    """Far above rounding; a place that nothing reads is no hook point."""
    with case.exact():
        one, ids = case.pair(torch.float64), case.tokens(min_pos=2)
        with torch.no_grad():
            for name in case.deal(one.names(), 5):
                # Against a run in which the place is watched: that alone may move half precision's logits.
                unedited = one.model.run_with_hooks(ids, fwd_hooks=[(name, lambda x, hook: x.clone())])
                ours = one.model.run_with_hooks(ids, fwd_hooks=[(name, case.family.edit_at(name))])
                moved = float((ours - unedited).abs().max()) / max(1.0, float(unedited.abs().max()))
                assert moved > MOVES, f"an edit at {name} moves the logits by {moved:.1e} of their scale"


@check(10, "an edit leaves everything before it as it was", judge="law")
def locality(case: Case) -> None:
    """Names that are computed earlier, and earlier positions of all names, bit for bit."""
    family = case.family
    with case.exact():
        one, ids = case.pair(torch.float64), case.tokens(min_pos=3)
        names = [name for name in one.names() if name in one.model.table]
        first = case.integer(1, ids.shape[1] - 1, "position")
        with torch.no_grad():
            _, before = one.model.run_with_cache(ids, names_filter=names)
        for name in case.deal([n for n in names if family.pos_axis(n) is not None], 3):
            entry = (name, only_at(name, family.edit_at(name, causal=True), range(first, ids.shape[1])))
            with torch.no_grad(), one.model.hooks(fwd_hooks=[entry]):
                _, after = one.model.run_with_cache(ids, names_filter=names)
            _is_local(case, one, name, first, before, after)


def _is_local(case: Case, one: Pair, name: str, first: int, before: Any, after: Any) -> None:
    """Compare what is computed before a name, and what other names have before a position."""
    order = {other: at for at, other in enumerate(one.model.table)}
    layer = one.model.table[name].layer
    for other in before:
        point, axis = one.model.table[other], case.family.pos_axis(other)
        is_earlier_layer = point.layer is not None and layer is not None and point.layer < layer
        if is_earlier_layer or (point.layer is None and order[other] < order[name] and layer is not None):
            case.equal(f"{other}, which comes before the edit at {name}", after[other], before[other])
        elif axis is not None:
            here, there = (value[other].narrow(axis, 0, first) for value in (after, before))
            told = f"{other} before position {first}, under an edit at {name} from there on,"
            # A fused scan and a recurrence round differently; experts round by how many tokens come to each.
            if ".mixer." in name or one.model.cfg.n_experts is not None:
                case.same(told, here, there)
            else:
                case.equal(told, here, there)


@check(11, "putting the cached value back restores the run", judge="law")
def restoring(case: Case) -> None:
    """After the embeddings were corrupted, the clean stream at any block gives the clean logits."""
    with case.exact():
        one, ids = case.pair(torch.float64), case.tokens()
        streams = [n for n in one.names() if n.endswith(("hook_resid_pre", "hook_resid_post"))]
        name = case.choice([*streams, "unembed.hook_in"], "name")
        with torch.no_grad():
            clean, cache = one.model.run_with_cache(ids, names_filter=[name])
            corrupt = ("hook_embed", case.family.edit_at("hook_embed"))
            broken = one.model.run_with_hooks(ids, fwd_hooks=[corrupt])
            ours = one.model.run_with_hooks(ids, fwd_hooks=[corrupt, (name, lambda x, hook: cache[name])])
    assert error(broken, clean) > MOVES, "the corruption moves nothing"
    case.same(f"the logits with the clean {name} put back", ours, clean, TIGHT)
