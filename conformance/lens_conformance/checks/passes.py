"""Property 24: weight passes keep their laws, do what they say, are undone, and refuse where they do not hold."""

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from lens_conformance.case import Case
from lens_conformance.checks import check
from lens_conformance.oracle import Pair, plain
from lens_core._registry import active_registry
from lens_core.errors import WeightError
from lens_core.passes import PASSES, WeightPass

_BOUND = 1e-10
"""Of logits and streams in true float64: a pass is a few roundings of each weight."""
_NORMS = ("ln1", "ln2", "norm", "ln_final")
_STREAM = ("hook_resid_pre", "hook_resid_mid", "hook_resid_post")


@check(
    24,
    "weight passes keep their laws, are undone bit for bit, and refuse where they do not hold",
    judge="hf",
    share=0.4,
)
def passes(case: Case) -> None:
    """Each alone, put back after, and then all that hold in a row; logits are those of the untouched twin."""
    with case.exact(), torch.no_grad():
        one, ids = case.pair(torch.float64, is_own=True, **_tying(case)), case.tokens()
        before, own = _values(one, ids), _bits(one)
        expected = plain(one, ids).log_softmax(-1)
        held: list[WeightPass] = []
        for each in PASSES:
            if _refuses(one, each):
                _unchanged(one, own, f"{each.name}, which refused,")
                continue
            held.append(each)
            each(one.model)
            _keeps_its_law(case, one, each.name, ids, before, expected)
            _does_nothing_twice(one, each)
            one.model.undo_passes()
            _unchanged(one, own, f"{each.name}, applied and undone,")
        one.model.process_weights(refactor_factored_attn_matrices=None)
        done = [record.name for record in one.model.passes if not record.skipped]
        assert done == [each.name for each in held], f"process_weights applied {done}, and what holds is {held}"
        _keeps_its_law(case, one, "all passes", ids, before, expected, done=done)


def _tying(case: Case) -> dict[str, bool]:
    """Draw whether the embeddings are tied, where the plugin takes both: passes must untie them."""
    architecture = active_registry().resolve(case.family.model_type)
    field = "tie_word_embeddings"
    return {field: case.flag("tied")} if field in architecture.config_handled else {}


def _values(one: Pair, ids: Tensor) -> dict[str, Tensor]:
    names = ("ln1.hook", "ln2.hook", "norm.hook", "ln_final.hook", "resid", "pattern", "hook_embed", "unembed.hook_out")
    chosen = [name for name in one.names() if any(part in name for part in names) and "input" not in name]
    return dict(one.model.run_with_cache(ids, names_filter=chosen)[1])


def _bits(one: Pair) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in one.hf.state_dict().items()}


def _unchanged(one: Pair, own: Mapping[str, Tensor], told: str) -> None:
    now = one.hf.state_dict()
    assert now.keys() == own.keys(), f"{told} left other parameters: {sorted(now.keys() ^ own.keys())[:3]}"
    other = [name for name in own if not torch.equal(now[name], own[name])]
    assert not other, f"{told} left other weights in {other[0]}"
    assert one.hf.config.to_dict() == one.config.to_dict(), f"{told} left another config"
    assert _shares(one.hf) == _shares(one.reference), f"{told} left the embeddings {'un' * _shares(one.reference)}tied"
    assert not one.model.passes, f"{told} is still recorded"


def _shares(hf: Any) -> bool:
    return hf.get_input_embeddings().weight is hf.get_output_embeddings().weight


def _refuses(one: Pair, each: WeightPass) -> bool:
    """Whether a pass says that it does not hold; then it must raise, with its reason."""
    reason = each.why_not(one.model)
    if reason is None:
        return False
    assert reason.strip(), f"{each.name} refuses without a reason"
    told = ""
    try:
        each(one.model)
    except WeightError as error:
        told = str(error)
    assert told, f"{each.name} does not hold, since {reason}, and was applied"
    assert reason in told, f"{each.name} refuses, since {reason}, and its error says: {told}"
    return True


def _does_nothing_twice(one: Pair, each: WeightPass) -> None:
    first = _bits(one)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        each(one.model)
    assert any("before" in str(warning.message) for warning in told), f"{each.name}, applied twice, does not say so"
    now = one.hf.state_dict()
    other = [name for name in first if not torch.equal(now[name], first[name])]
    assert not other, f"{each.name}, applied twice, changed {other[0]} again"


def _keeps_its_law(
    case: Case,
    one: Pair,
    name: str,
    ids: Tensor,
    before: Mapping[str, Tensor],
    expected: Tensor,
    *,
    done: list[str] | None = None,
) -> None:
    """Compare with the values before, and look whether what should be true of the weights is."""
    applied = [name] if done is None else done
    now = _values(one, ids)
    case.same(f"log-probabilities after {name}", one.hf(ids, use_cache=False).logits.log_softmax(-1), expected, _BOUND)
    centred = "center_writing_weights" in applied
    for place, value in before.items():
        kind = place.rpartition(".")[2]
        stays = kind in _STREAM or kind in ("hook_embed", "hook_pattern") or place.endswith(".hook_normalized")
        if stays:
            is_stream = centred and kind in (*_STREAM, "hook_embed")
            law = value - value.mean(-1, keepdim=True) if is_stream else value
            case.same(f"{place} after {name}", now[place], law, _BOUND)
    for each in applied:
        if each in _AFTERWARDS:
            _AFTERWARDS[each](case, one, now, name)


def _norms_hand_on_their_input(case: Case, one: Pair, now: Mapping[str, Tensor], told: str) -> None:
    for norm in one.model.declaration.norms:
        for place in [place for place in now if place.endswith(f"{norm}.hook_out") and norm in _NORMS]:
            normalized = now[place.replace("hook_out", "hook_normalized")]
            case.same(f"{place}, which is hook_normalized after {told},", now[place], normalized, _BOUND)


def _stream_has_no_mean(case: Case, one: Pair, now: Mapping[str, Tensor], told: str) -> None:
    for place in [place for place in now if place.rpartition(".")[2] in _STREAM]:
        mean = now[place].mean(-1)
        case.same(f"{place}, its mean over d_model after {told},", mean, torch.zeros_like(mean), _BOUND)


def _logits_have_no_mean(case: Case, one: Pair, now: Mapping[str, Tensor], told: str) -> None:
    mean = now["unembed.hook_out"].mean(-1)
    case.same(f"unembed.hook_out, its mean over the vocabulary after {told},", mean, torch.zeros_like(mean), _BOUND)


def _values_have_no_bias(case: Case, one: Pair, now: Mapping[str, Tensor], told: str) -> None:
    for layer in _attention(one):
        bias = one.model.weight("b_V", layer)
        assert not bias.any(), f"b_V of block {layer} is not zero after {told}"


def _outputs_are_orthonormal(case: Case, one: Pair, now: Mapping[str, Tensor], told: str) -> None:
    for layer in _attention(one):
        output = one.model.weight("W_O", layer)
        product = output @ output.mT
        unit = torch.eye(product.shape[-1], dtype=product.dtype).expand_as(product)
        case.same(f"W_O W_O^T of each head of block {layer} after {told},", product, unit, 1e-8)


def _attention(one: Pair) -> tuple[int, ...]:
    view = next(view for view in one.model.declaration.weights if view.name == "W_O")
    return view.layers or tuple(range(one.model.cfg.n_layers))


_AFTERWARDS: Mapping[str, Callable[[Case, Pair, Mapping[str, Tensor], str], Any]] = {
    "fold_ln": _norms_hand_on_their_input,
    "center_writing_weights": _stream_has_no_mean,
    "center_unembed": _logits_have_no_mean,
    "fold_value_biases": _values_have_no_bias,
    "refactor_factored_attn_matrices": _outputs_are_orthonormal,
}
