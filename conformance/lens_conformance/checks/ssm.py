"""Property 29: what is particular to state-space layers."""

from typing import Any

import torch

from lens_conformance.case import Case, NotThereError
from lens_conformance.checks import check
from lens_conformance.oracle import new_pair, tiny_config
from lens_core.analysis.ssm_scan import mixer_layers
from lens_core.analysis.ssm_tokens import mixer_tokens
from lens_core.plugin import Capability


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
        layer = case.choice(mixer_layers(one.model.table), "layer")
        entries: list[Any] = []
        if case.flag("edited"):
            entries = [(f"blocks.{layer}.mixer.hook_delta", lambda x, hook: x * 0.7)]
        with torch.no_grad(), one.model.hooks(fwd_hooks=entries):
            _, cache = one.model.run_with_cache(ids, names_filter=one.names())
        skip = case.flag("skip")
        for target in (None, case.integer(0, ids.shape[1] - 1, "target")):
            found = cache.effective_attention(layer, target=target, skip=skip)
            assert found.error is not None
            bound = case.bound(1e-9)
            case.worst.note(found.error, bound)
            assert found.error <= bound, (
                f"effective attention of layer {layer}, target {target}: off by {found.error:.1e}"
            )
        parts = mixer_tokens(cache, layer, -1)
        whole = parts.values.sum(1) + parts.constant
        case.same(f"the mixer of layer {layer} by tokens", whole, cache["mixer_out", layer][:, -1], 1e-8)


@check(29, "an edited state is what the next positions start from", judge="golden", needs=Capability.SSM_STATE)
def state(case: Case) -> None:
    """At one position or several, in prefill or one by one in decode."""
    with case.exact():
        one, ids = case.pair(torch.float64), case.tokens(min_pos=3)
        layer = case.choice(mixer_layers(one.model.table), "layer")
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
    if not hasattr(tiny_config(case.family, {}), "chunk_size"):
        raise NotThereError("HF's config has no chunk size")
    with case.exact():
        ids = case.tokens(min_pos=2)
        sizes = case.some(range(1, 10), "chunk sizes", least=2, most=2)
        first, second = (new_pair(case.family, overrides={"chunk_size": size}, dtype=torch.float64) for size in sizes)
        with torch.no_grad():
            logits, cache = first.model.run_with_cache(ids, names_filter=first.names())
            other_logits, other = second.model.run_with_cache(ids, names_filter=first.names())
        case.same(f"logits with chunks of {sizes}", other_logits, logits)
        for name in first.names():
            case.same(f"{name} with chunks of {sizes}", other[name], cache[name])
