"""The kit must be able to fail: each break of the core is killed by the check that is named beside it."""

import pytest
import torch
from lens_conformance.checks import all_checks
from lens_conformance.runner import find_family, try_check

from lens_core import _cache_sink, _inputs, _pieces, _plan, _recurrence, _softmax, _watch, hook_points, model


def an_edit_is_ignored(patch):
    patch.setattr(_watch.Watch, "_apply", lambda self, entry, value, call, **options: value)


def reading_draws_a_random_number(patch):
    fire = _watch.Watch.fire
    patch.setattr(_watch.Watch, "fire", lambda *args, **options: (torch.rand(1), fire(*args, **options))[1])


def what_was_read_is_handed_on_rounded(patch):
    fire = _watch.Watch.fire

    def rounded(self, value, **options):
        new = fire(self, value, **options)
        return new * (1 + 1e-6) if new.is_floating_point() else new

    patch.setattr(_watch.Watch, "fire", rounded)


def a_point_fires_twice(patch):
    fire = _watch.Watch.fire
    patch.setattr(_watch.Watch, "fire", lambda *args, **options: (fire(*args, **options), fire(*args, **options))[1])


def the_pattern_is_shifted_by_a_key(patch):
    fire = _softmax._fire_pattern
    patch.setattr(_softmax, "_fire_pattern", lambda watch, pattern, dtype: fire(watch, pattern.roll(1, -1), dtype))


def a_function_gets_the_models_own_tensor(patch):
    apply = _watch.Watch._apply

    def unguarded(self, entry, value, call, **options):
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(torch.Tensor, "clone", lambda tensor, **_: tensor)
            return apply(self, entry, value, call, **options)

    patch.setattr(_watch.Watch, "_apply", unguarded)


def what_is_cached_is_of_another_dtype(patch):
    moved = _cache_sink.moved
    patch.setattr(_cache_sink, "moved", lambda tensor, device, dtype: moved(tensor, device, torch.float64))


def a_filter_gives_all(patch):
    select = hook_points.HookTable.select
    patch.setattr(hook_points.HookTable, "select", lambda table, names: select(table, list(table)))


def the_mask_is_all_ones(patch):
    # Not dropped: HF reads position ids that restart, without a mask, as packed sequences, and hides padding that way.
    read = _inputs._read_mask

    def seen(*args, **options):
        mask, ids = read(*args, **options)
        return mask if mask is None else torch.ones_like(mask), ids

    patch.setattr(_inputs, "_read_mask", seen)


def the_model_stops_a_block_late(patch):
    layer_range = model.LensModel._layer_range

    def late(self, start, stop):
        first, last = layer_range(self, start, stop)
        return first, last if last is None else min(last + 1, self.cfg.n_layers)

    patch.setattr(model.LensModel, "_layer_range", late)


def a_weight_is_read_backwards(patch):
    read = _pieces.read_weight
    patch.setattr(_pieces, "read_weight", lambda *args: read(*args).flip(0))


def a_gradient_is_doubled(patch):
    apply = _watch.Watch._apply_backward
    patch.setattr(
        _watch.Watch,
        "_apply_backward",
        lambda self, entry, call, position, g: apply(self, entry, call, position, 2 * g),
    )


def a_state_is_edited_for_show_only(patch):
    shown = _recurrence._shown
    patch.setattr(
        _recurrence, "_shown", lambda call, watch, position, state: (shown(call, watch, position, state), state)[1]
    )


def taps_stay(patch):
    class Stuck:
        """A handle that does not let go."""

        def remove(self):
            """Do nothing."""

    tap = _plan.Run._tap
    patch.setattr(_plan.Run, "_tap", lambda *args: (tap(*args), Stuck())[1])


MUTANTS = [
    (an_edit_is_ignored, ("gpt2", "qwen3", "mamba", "mamba2"), ("edits", "liveness")),
    (reading_draws_a_random_number, ("gpt2", "llama", "mamba2"), ("purity",)),
    (what_was_read_is_handed_on_rounded, ("gpt2", "llama", "mamba"), ("logits",)),
    (a_point_fires_twice, ("gpt2", "llama", "mamba2"), ("fires",)),
    (the_pattern_is_shifted_by_a_key, ("gpt2", "llama", "gemma2"), ("values",)),
    (a_function_gets_the_models_own_tensor, ("gpt2", "llama"), ("aliasing",)),
    (what_is_cached_is_of_another_dtype, ("gpt2", "llama", "mamba"), ("dtypes",)),
    (a_filter_gives_all, ("gpt2", "mamba2"), ("filters",)),
    (the_mask_is_all_ones, ("gpt2", "llama", "mamba2"), ("padding",)),
    (the_model_stops_a_block_late, ("gpt2", "llama", "mamba"), ("layers",)),
    (a_weight_is_read_backwards, ("gpt2", "llama", "mamba"), ("weights",)),
    (a_gradient_is_doubled, ("gpt2", "llama", "mamba2"), ("gradients",)),
    (a_state_is_edited_for_show_only, ("mamba", "mamba2"), ("state",)),
    (taps_stay, ("gpt2", "llama", "mamba2"), ("clean",)),
]
CASES = [(mutant, kind, check) for mutant, kinds, checks in MUTANTS for kind in kinds for check in checks]


@pytest.mark.parametrize(
    ("mutant", "model_type", "check"), CASES, ids=[f"{mutant.__name__}-{kind}-{check}" for mutant, kind, check in CASES]
)
def test_a_mutant_is_killed(mutant, model_type, check, monkeypatch):
    """The named check passes on the core as it is, and fails on the broken one."""
    family, one = find_family(model_type), all_checks()[check]
    assert try_check(one, family, level="fast").status == "passed"
    mutant(monkeypatch)
    assert try_check(one, family, level="fast").status == "failed"
