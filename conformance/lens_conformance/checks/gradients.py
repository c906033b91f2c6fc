"""Property 19: gradients at hook points, and parameter gradients where one was stopped, are the golden forward's."""

from typing import Any

import torch

from lens_conformance.case import Case
from lens_conformance.checks import check
from lens_conformance.oracle import Pair, plain
from lens_core.plugin import Capability

BOUND = 1e-8
"""Of the gradient's own scale, in true float64."""


def metric(logits: torch.Tensor) -> torch.Tensor:
    """Weigh the logits by fixed random numbers, and bend: a scalar whose gradient is nowhere constant."""
    weight = torch.randn(logits.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    return (logits * weight).sum() + (logits.pow(2) * weight.roll(1)).sum() * 0.1


@check(
    19,
    "gradients at every point, and under a stop there, are the golden forward's",
    judge="golden",
    needs=Capability.GRADIENTS,
)
def gradients(case: Case) -> None:
    """Several names in a plain run, one edited or detached; copies one at a time; parameters too."""
    family = case.family
    with case.exact():
        one, ids = case.pair(torch.float64), case.tokens(max_pos=5)
        pool = [n for n in one.names() if family.gradient(n)]
        kind = case.choice(("plain", "edited", "detached"), "kind")
        names = case.deal(pool, 6 if kind == "plain" else 1)
        apart = [n for n in names if family.apart(n)]
        together = [n for n in names if n not in apart]
        for group in ([together] if together else []) + [[n] for n in apart]:
            _gradients_at(case, one, ids, group, kind)


def _gradients_at(case: Case, one: Pair, ids: torch.Tensor, names: list[str], kind: str) -> None:
    """Compare the gradients at some names of one run; of a detached name, the parameters' gradients."""
    family, name = case.family, names[0]
    edits: dict[str, Any] = {
        "edited": {name: family.edit_at(name)},
        "detached": {name: lambda x, hook: x.detach()},
    }.get(kind, {})
    expected, parameters = _golden(one, ids, edits, {name} if family.apart(name) else ())
    flowing = max((float(g.abs().max()) for g in parameters.values() if g is not None), default=0.0)
    got: dict[str, list[torch.Tensor]] = {each: [] for each in names}

    def keep(g: torch.Tensor, hook: Any) -> None:
        got[hook.name].append(g.detach().clone())

    backward = [] if kind == "detached" else [(each, keep) for each in names]
    one.hf.zero_grad(set_to_none=True)
    logits = one.model.run_with_hooks(ids, fwd_hooks=list(edits.items()), bwd_hooks=backward)
    if logits.requires_grad:
        metric(logits).backward()
    if kind == "detached":
        for key, parameter in one.hf.named_parameters():
            what = f"the gradient of {key} with {name} detached"
            _compare(case, what, parameter.grad, parameters[key], flowing, name=name)
    else:
        for each, seen in got.items():
            assert seen, f"the backward function at {each} was not called"
            ours = torch.cat(seen[::-1], dim=1) if family.per_position(each) else seen[0]
            _compare(case, f"the gradient at {each}, {kind}", ours, expected.get(each), flowing, name=each)
    one.hf.zero_grad(set_to_none=True)


def _golden(one: Pair, ids: torch.Tensor, edits: Any, through: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    state = {key: value.detach().clone().requires_grad_() for key, value in one.reference.state_dict().items()}
    tied = {id(parameter): key for key, parameter in one.reference.named_parameters()}
    for key, parameter in one.reference.named_parameters(remove_duplicate=False):
        state[key] = state[tied[id(parameter)]]
    assert one.family.golden is not None
    logits, values = one.family.golden(state, one.config, ids, edits=edits, through=through)
    if logits.requires_grad:
        metric(logits).backward()
    cuts = {name: value.grad for name, value in values.items() if one.family.gradient(name)}
    return cuts, {key: value.grad for key, value in state.items()}


def _compare(
    case: Case,
    what: str,
    ours: torch.Tensor | None,
    theirs: torch.Tensor | None,
    flowing: float = 0.0,
    name: str | None = None,
) -> None:
    """Compare relative to the gradient's own size; None of golden's is zeros.

    Where it is zero but for rounding, rounding is of the size of what flows elsewhere.
    """
    if ours is None and theirs is None:
        return
    ours = torch.zeros_like(theirs) if ours is None and theirs is not None else ours
    assert ours is not None
    theirs = torch.zeros_like(ours) if theirs is None else theirs
    assert ours.shape == theirs.shape, f"{what} has shape {tuple(ours.shape)}, not {tuple(theirs.shape)}"
    off = float((ours - theirs).abs().max()) / max(1e-6, 1e-4 * flowing, float(theirs.abs().max()))
    case.worst.note(off, BOUND, name)
    assert off <= BOUND, f"{what} is off by {off:.1e} of its size"


@check(
    19,
    "what reads nothing of the graph gets zeros, and learning goes on",
    judge="hf",
    share=0.4,
    needs=Capability.GRADIENTS,
)
def parameter_gradients(case: Case) -> None:
    """Under backward hooks that only look, parameters have HF's gradients."""
    with case.exact():
        one, ids = case.pair(torch.float64), case.tokens()
        names = [n for n in one.names() if case.family.gradient(n) and not case.family.apart(n)]
        chosen = case.deal(names, 4)
        for model in (one.hf, one.reference):
            model.zero_grad(set_to_none=True)
        metric(plain(one, ids)).backward()
        metric(one.model.run_with_hooks(ids, bwd_hooks=[(name, lambda g, hook: None) for name in chosen])).backward()
        pairs = list(zip(one.hf.named_parameters(), one.reference.parameters(), strict=True))
        flowing = max((float(theirs.grad.abs().max()) for _, theirs in pairs if theirs.grad is not None), default=0.0)
        for (key, parameter), theirs in pairs:
            what = f"the gradient of {key} while gradients at {chosen} are read"
            _compare(case, what, parameter.grad, theirs.grad, flowing)
        for model in (one.hf, one.reference):
            model.zero_grad(set_to_none=True)
