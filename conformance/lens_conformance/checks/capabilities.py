"""Properties 26 and 30: what the descriptor declares is there, and what it declares absent is not."""

import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import accelerate
import torch

from lens_conformance.case import Case, pad
from lens_conformance.checks import check
from lens_conformance.oracle import Pair, new_pair
from lens_core._registry import active_registry
from lens_core.certificates import package_of
from lens_core.errors import LensError
from lens_core.plugin import Capability, Support


def _has(one: Pair, *ends: str) -> bool:
    return any(name.endswith(ends) for name in one.model.table)


def _runs(what: Callable[[], Any]) -> bool:
    try:
        what()
    except LensError:
        return False
    return True


def _pads(one: Pair, ids: torch.Tensor) -> bool:
    padded, mask = pad([ids[0], ids[0, :-1]], "left")
    return _runs(lambda: one.model(padded, attention_mask=mask))


# Whether a model can do something, as a user finds out: the names are there, or the call is not refused.
_FOUND: dict[Capability, Callable[[Pair, torch.Tensor], bool]] = {
    Capability.ATTENTION_PATTERN: lambda one, ids: _has(one, "attn.hook_pattern", "attn.hook_attn_scores"),
    Capability.SSM_STATE: lambda one, ids: _has(one, "mixer.hook_ssm_state"),
    Capability.POSITION_EMBEDDING: lambda one, ids: "hook_pos_embed" in one.model.table,
    Capability.PER_HEAD: lambda one, ids: _has(one, "attn.hook_result"),
    Capability.GENERATE: lambda one, ids: _runs(lambda: one.model.generate(ids, 1, do_sample=False)),
    Capability.LEFT_PADDING: _pads,
    Capability.WEIGHT_VIEWS: lambda one, ids: bool(one.model.weight_names),
    Capability.GRADIENTS: lambda one, ids: _runs(
        lambda: one.model.run_with_hooks(ids, bwd_hooks=[("hook_embed", lambda g, hook: None)]).sum().backward()
    ),
}


@check(30, "what is declared is there, and what is declared absent is not", judge="law", share=0.05)
def capabilities(case: Case) -> None:
    """Each capability whose presence can be seen from outside, both ways."""
    declared = active_registry().resolve(case.family.model_type).capabilities
    one = new_pair(case.family)
    ids = case.tokens(min_pos=3, batch=1)
    for capability, found in _FOUND.items():
        given = declared[capability]
        if given.support is Support.PARTIAL:
            continue
        is_there = found(one, ids)
        told = f"{capability.name} is declared {given.support.name}" + (f" ({given.reason})" if given.reason else "")
        assert is_there == (given.support is Support.FULL), f"{told}, and is {'' if is_there else 'not '}there"


@check(26, "offload changes nothing", judge="hf", share=0.2, needs=Capability.DEVICE_MAP)
def offload(case: Case) -> None:
    """Weights on the disk or in memory, brought for each module's call: values, an edit and weights as without."""
    one, spread = new_pair(case.family), new_pair(case.family)
    ids = case.tokens()
    kind = case.choice(("cpu", "disk"), "offloaded to")
    name = case.choice(one.names(), "edited")
    edit = (name, case.family.edit_at(name))
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        if kind == "cpu":
            accelerate.cpu_offload(spread.hf)
        else:
            accelerate.disk_offload(spread.hf, folder)
        expected, known = one.model.run_with_cache(ids, names_filter=one.names())
        ours, cache = spread.model.run_with_cache(ids, names_filter=one.names())
        case.equal(f"the logits, offloaded to {kind}", ours, expected)
        for each in one.names():
            case.equal(f"{each}, offloaded to {kind}", cache[each], known[each])
        case.equal(
            f"the logits under an edit at {name}, offloaded to {kind}",
            spread.model.run_with_hooks(ids, fwd_hooks=[edit]),
            one.model.run_with_hooks(ids, fwd_hooks=[edit]),
        )
        case.equal(f"W_U, offloaded to {kind}", spread.model.weight("W_U"), one.model.weight("W_U"))


@check(30, "the descriptor imports neither torch nor transformers", judge="law", share=0.05)
def discovery(case: Case) -> None:
    """In a fresh interpreter."""
    package = package_of(active_registry().resolve(case.family.model_type))
    code = f"import sys, {package}; print(sorted({{'torch', 'transformers'}} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.stdout.strip() == "[]", f"importing {package} brings {result.stdout or result.stderr}"
