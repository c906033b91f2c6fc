"""Property 29: what is particular to state-space layers."""

from typing import Any

import torch

from lens_conformance.case import Case, NotThereError
from lens_conformance.checks import check
from lens_conformance.oracle import Pair, new_pair, tiny_config
from lens_core.analysis.ssm_scan import mixer_layers
from lens_core.analysis.ssm_tokens import mixer_tokens
from lens_core.plugin import Capability


def _mixers(one: Pair) -> list[int]:
    """List the state-space layers whose names are tried: on a checkpoint, those of the chosen blocks."""
    names = set(one.names())
    layers = [at for at in mixer_layers(one.model.table) if f"blocks.{at}.mixer.hook_delta" in names]
    if not layers:
        raise NotThereError("no state-space layer is among the blocks whose names are tried")
    return layers


@check(
    29,
    "effective attention gives the scan's output back, and tokens the mixer's",
    judge="law",
    needs=Capability.SSM_STATE,
)
def effective_attention(case: Case) -> None:
    """Whole, one row, with the skip; the token decomposition at one target; also under an edit of the step sizes."""
    with case.exact():
        one, ids = case.pair(torch.float64), case.tokens()
        layer = case.choice(_mixers(one), "layer")
        entries: list[Any] = []
        if case.flag("edited"):
            entries = [(f"blocks.{layer}.mixer.hook_delta", lambda x, hook: x * 0.7)]
        with torch.no_grad(), one.model.hooks(fwd_hooks=entries):
            _, cache = one.model.run_with_cache(ids, names_filter=one.names())
        skip = case.flag("skip")
        for target in (None, case.integer(0, ids.shape[1] - 1, "target")):
            _gives_the_output_back(case, cache, layer, target, skip=skip)
        parts = mixer_tokens(cache, layer, -1)
        whole = parts.values.sum(1) + parts.constant
        case.same(f"the mixer of layer {layer} by tokens", whole, cache["mixer_out", layer][:, -1], 1e-8)


def _gives_the_output_back(case: Case, cache: Any, layer: int, target: int | None, *, skip: bool) -> None:
    """Contract the matrices with what the scan read; compare with its output, and with the error that is told."""
    at, name = f"blocks.{layer}.mixer.", "hook_ssm_output" if skip else "hook_y"
    found = cache.effective_attention(layer, target=target, skip=skip)
    own = torch.einsum(
        "bhs,bsh...->bh..." if target is not None else "bhts,bsh...->bth...", found.values, cache[at + "hook_ssm_input"]
    )
    expected = cache[at + name] if target is None else cache[at + name][:, target]
    which = "all targets" if target is None else f"target {target}"
    told = f"{at}{name} at {which}, which is effective attention times ssm_input{', with D' if skip else ''},"
    case.same(told, own, expected)
    assert found.error is not None, f"effective attention of layer {layer} at {which} tells no error"
    bound = case.bound(1e-9)
    assert found.error <= bound, (
        f"effective attention of layer {layer}, {which}: it tells an error of {found.error:.1e}"
    )


@check(29, "an edited state is what the next positions start from", judge="golden", needs=Capability.SSM_STATE)
def state(case: Case) -> None:
    """At one position or several, in prefill or one by one in decode."""
    with case.exact():
        one, ids = case.pair(torch.float64), case.tokens(min_pos=3)
        layer = case.choice(_mixers(one), "layer")
        name = f"blocks.{layer}.mixer.hook_ssm_state"
        places = case.some(range(ids.shape[1]), "edited positions")

        def halve(x: torch.Tensor, hook: Any) -> torch.Tensor:
            return torch.where(torch.isin(hook.positions, torch.tensor(places))[0], x * 0.5 + 0.1, x)

        expected, _ = one.golden(ids, edits={name: halve})
        entry = (name, lambda x, hook: x * 0.5 + 0.1, places)
        with torch.no_grad():
            ours = one.model.run_with_hooks(ids, fwd_hooks=[entry])
            case.same(f"the logits with the state of layer {layer} edited at {places}", ours, expected)
            past, pieces = None, []
            with one.model.hooks(fwd_hooks=[entry]):
                for position in range(ids.shape[1]):
                    step = ids[:, position : position + 1]
                    logits, past = one.model(step, past_key_values=past, return_state=True)
                    pieces.append(logits)
        case.same(f"the same, one position at a time, {places}", torch.cat(pieces, dim=1), expected, 1e-8)


@check(29, "the chunk size does not matter", judge="hf", share=0.4, needs=Capability.SSM_STATE)
def chunks(case: Case) -> None:
    """Logits and every value, where the config has a chunk size."""
    config = tiny_config(case.family, {})
    field = next((name for name in ("chunk_size", "mamba_chunk_size") if hasattr(config, name)), None)
    if field is None:
        raise NotThereError("HF's config has no chunk size")
    with case.exact():
        ids = case.tokens(min_pos=2)
        sizes = case.some(range(1, 10), "chunk sizes", least=2, most=2)
        first, second = (new_pair(case.family, overrides={field: size}, dtype=torch.float64) for size in sizes)
        with torch.no_grad():
            logits, cache = first.model.run_with_cache(ids, names_filter=first.names())
            other_logits, other = second.model.run_with_cache(ids, names_filter=first.names())
        case.same(f"logits with chunks of {sizes}", other_logits, logits)
        for name in first.names():
            case.same(f"{name} with chunks of {sizes}", other[name], cache[name])
