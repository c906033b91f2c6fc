"""Properties 26 and 30: what the descriptor declares is there, and what it declares absent is not.

Every member of `Capability` is probed as a user would find it out. What is declared partial is held to this only: it
works, or refuses with an error of lens.
"""

import importlib.metadata
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from typing import Any

import accelerate
import torch

import lens_core as lens
from lens_conformance import case as cases
from lens_conformance.case import Case, NotThereError, pad
from lens_conformance.checks import check
from lens_conformance.oracle import Pair, new_pair
from lens_conformance.report import place_of
from lens_core._discovery import GROUP
from lens_core._registry import active_registry
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


def _offloads(one: Pair, ids: torch.Tensor) -> bool:
    """Whether a model whose weights accelerate brings for each module's call has the values that it had before."""
    with torch.no_grad():
        expected, known = one.model.run_with_cache(ids, names_filter=one.names())

        def run() -> None:
            accelerate.cpu_offload(one.hf)
            logits, cache = one.model.run_with_cache(ids, names_filter=one.names())
            assert torch.equal(logits, expected), "offloaded to memory, the model has other logits"
            for name in one.names():
                assert torch.equal(cache[name], known[name]), f"{name} is another value while offloaded to memory"

        return _runs(run)


def _is_compiled(one: Pair, ids: torch.Tensor) -> bool:
    """Whether a function at a name is called, and its edit holds, on a model that went through `torch.compile`."""
    name, calls = _in_a_block(one), list[str]()
    edit = one.family.edit_at(name)

    def told(x: torch.Tensor, hook: Any) -> Any:
        calls.append(hook.name)
        return edit(x, hook=hook)

    def run() -> None:
        compiled = lens.load(torch.compile(one.hf, backend="eager"))
        compiled(ids)
        calls.clear()
        logits = compiled.run_with_hooks(ids, fwd_hooks=[(name, told)])
        assert calls == [name], f"a compiled model calls the function at {name} {len(calls)} times, and raises nothing"
        off = cases.error(logits, expected)
        assert off < 1e-5, f"the logits of a compiled model with an edit at {name} are off by {off:.1e} of their scale"

    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, about HF's code
        expected = one.model.run_with_hooks(ids, fwd_hooks=[(name, edit)])
        try:
            return _runs(run)
        finally:
            torch.compiler.reset()


def _is_recomputed(one: Pair, ids: torch.Tensor) -> bool:
    """Whether gradients at a name in a block are the usual ones while blocks are run again in the backward pass."""
    if not getattr(one.hf, "supports_gradient_checkpointing", False):
        return False
    name, seen = _in_a_block(one), list[torch.Tensor]()

    def gradient() -> torch.Tensor:
        seen.clear()
        with torch.random.fork_rng():
            torch.manual_seed(0)  # of dropout
            logits = one.model.run_with_hooks(ids, bwd_hooks=[(name, lambda g, hook: seen.append(g.detach().clone()))])
            logits.square().sum().backward()
        assert len(seen) == 1, f"the backward function at {name} was called {len(seen)} times"
        return seen[0]

    def run() -> None:
        off = cases.error(gradient(), expected)
        assert off < 1e-5, f"under gradient checkpointing the gradient at {name} is off by {off:.1e} of its scale"

    one.hf.train()
    expected = gradient()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the name of the argument has changed between releases
        one.hf.gradient_checkpointing_enable()
    return _runs(run)


def _in_a_block(one: Pair) -> str:
    """Give a name inside a block: what it writes to the stream first."""
    names = (f"blocks.{one.model.cfg.n_layers - 1}.{writer}" for writer in one.model.declaration.writers)
    return next(name for name in names if name in one.model.table)


# Whether a model can do something, as a user finds out: the names are there, or the call is not refused. What a probe
# gets that is wrong, and not refused, it asserts.
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
    Capability.DEVICE_MAP: _offloads,
    Capability.TORCH_COMPILE: _is_compiled,
    Capability.GRADIENT_CHECKPOINTING: _is_recomputed,
}


@check(30, "what is declared is there, and what is declared absent is not", judge="law", share=0.05)
def capabilities(case: Case) -> None:
    """Each capability, both ways; a partial one works or refuses."""
    declared = active_registry().resolve(case.family.model_type).capabilities
    ids = case.tokens(min_pos=3, batch=1)
    for capability, found in _FOUND.items():
        given = declared[capability]
        told = f"{capability.name} is declared {given.support.name}" + (f" ({given.reason})" if given.reason else "")
        try:
            is_there = found(new_pair(case.family), ids)  # of its own: some probes leave it changed
        except AssertionError as error:  # wrong, and not refused
            raise AssertionError(f"{told}, and {error}") from error
        except Exception as error:
            if given.support is Support.ABSENT:
                continue
            raise AssertionError(f"{told}, and raises {type(error).__name__}: {error}{place_of(error)}") from error
        if given.support is not Support.PARTIAL:
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
    architecture = active_registry().resolve(case.family.model_type)
    record = next((record for record in active_registry().records if architecture in record.architectures), None)
    assert record is not None, f"no plugin describes {case.family.model_type}"
    if record.distribution is None:
        raise NotThereError(f"{record.label}: no entry point is imported for it")
    points = importlib.metadata.distribution(record.distribution).entry_points.select(group=GROUP)
    modules = [point.module for point in points if point.name == record.entry_name]
    assert modules, f"{record.label} has no entry point {record.entry_name!r} of the group {GROUP}"
    code = f"import sys, importlib; importlib.import_module({modules[0]!r}); "
    code += "print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, (
        f"{modules[0]}, the entry point of {record.label}, cannot be imported: {result.stderr}"
    )
    assert result.stdout.strip() == "[]", f"importing {modules[0]} brings {result.stdout.strip()}"
