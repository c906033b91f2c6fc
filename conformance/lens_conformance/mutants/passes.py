"""Breaks of weight passes: what is folded, where it goes, and what is put back."""

from typing import Any

import pytest

from lens_conformance.family import Family
from lens_conformance.mutants import mutant
from lens_conformance.mutants.core import around
from lens_core import _pass_log, _pass_steps, passes

Patch = pytest.MonkeyPatch


@mutant("a LayerNorm's bias is dropped where its gain is folded", killers=("passes",), needs=("hook_pos_embed",))
def norm_biases_are_not_folded(patch: Patch, family: Family) -> None:
    around(patch, _pass_log.Editor, "add_to_bias", lambda add, self, matrix, addend: add(self, matrix, 0 * addend))


@mutant("a gain is folded, and stays in the norm too", killers=("passes",))
def gains_stay_in_the_norm(patch: Patch, family: Family) -> None:
    patch.setattr(_pass_steps, "neutralise", lambda editor, norm: None)


@mutant("a pass is applied twice", killers=("passes",))
def passes_are_applied_twice(patch: Patch, family: Family) -> None:
    def twice(rows: Any, self: Any, path: str, axis: int, function: Any) -> None:
        rows(self, path, axis, lambda wide: function(function(wide)))

    around(patch, _pass_log.Editor, "map_rows", twice)


@mutant("a tied weight is edited in place, under the embedding's feet", killers=("passes",))
def tied_weights_stay_tied(patch: Patch, family: Family) -> None:
    patch.setattr(_pass_log.Editor, "untie", lambda self: None)


@mutant("what a pass changed is put back, but for the last of it", killers=("passes",))
def undoing_forgets_something(patch: Patch, family: Family) -> None:
    def most(undo: Any, model: Any) -> None:
        _pass_log.log_of(model.bare_model).originals.popitem()
        undo(model)

    around(patch, passes, "undo", most)


@mutant("a pass that refuses is applied all the same", killers=("passes",), needs=("norm.hook_out", "hook_rot_q"))
def refusals_are_ignored(patch: Patch, family: Family) -> None:
    def refused(call: Any, self: Any, model: Any, **options: Any) -> Any:
        reason = self.why_not(model)
        return call(self, model, **options) if reason is None else model

    around(patch, passes.WeightPass, "__call__", refused)
