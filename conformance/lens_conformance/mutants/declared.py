"""Breaks of what a plugin declares: the descriptor, and the tables of hook points, weights and writers."""

import atexit
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import pytest

from lens_conformance.family import Family
from lens_conformance.mutants import mutant
from lens_conformance.mutants.core import around
from lens_core import _loading, _registry
from lens_core.certificates import package_of
from lens_core.plugin import Capability, HeadInput, ModuleInput, Support

Patch = pytest.MonkeyPatch


def declares(patch: Patch, change: Callable[[Any], Any]) -> None:
    """Let every model be declared otherwise: `change` takes a `Declaration`."""
    around(patch, _loading, "declare", lambda declare, *args: change(declare(*args)))


def points(patch: Patch, change: Callable[[Any, dict[str, Any]], Any]) -> None:
    """Let every hook point be declared otherwise: `change` takes it and all of them by name; None leaves it out."""

    def other(declaration: Any) -> Any:
        known = {point.name: point for point in declaration.points}
        made = (change(point, known) for point in declaration.points)
        return attrs.evolve(declaration, points=tuple(point for point in made if point is not None))

    declares(patch, other)


@mutant("a hook point is declared at a module that is not there", killers=("runs",))
def a_module_is_misspelt(patch: Patch, family: Family) -> None:
    def misspelt(point: Any, known: Any) -> Any:
        is_it = point.name == "blocks.1.hook_resid_pre" and isinstance(point.seam, ModuleInput)
        return attrs.evolve(point, seam=attrs.evolve(point.seam, path=f"{point.seam.path}.nowhere")) if is_it else point

    points(patch, misspelt)


@mutant("the epsilon of norms is not the model's", killers=("declaration",))
def eps_is_another(patch: Patch, family: Family) -> None:
    declares(patch, lambda declaration: attrs.evolve(declaration, cfg=attrs.evolve(declaration.cfg, eps=0.5)))


@mutant("a copy for the MLP is declared behind its norm", killers=("equations",), needs=("ln2.hook_out",))
def mlp_in_is_behind_the_norm(patch: Patch, family: Family) -> None:
    def behind(point: Any, known: Any) -> Any:
        return (
            attrs.evolve(point, seam=known[f"blocks.{point.layer}.mlp.hook_in"].seam)
            if point.name.endswith("hook_mlp_in")
            else point
        )

    points(patch, behind)


@mutant(
    "copies of the stream are projected without their norm", killers=("equations", "edits"), needs=("ln1.hook_out",)
)
def copies_skip_the_norm(patch: Patch, family: Family) -> None:
    def bare(point: Any, known: Any) -> Any:
        is_it = isinstance(point.seam, HeadInput) and point.seam.norm is not None
        return attrs.evolve(point, seam=attrs.evolve(point.seam, norm=None)) if is_it else point

    points(patch, bare)


@mutant("one name is left out of the table", killers=("declaration",))
def a_name_is_missing(patch: Patch, family: Family) -> None:
    def some(point: Any, known: Any) -> Any:
        return None if point.name == "blocks.1.hook_resid_post" else point

    points(patch, some)


@mutant(
    "from block 1 on, what a branch adds is hooked in the block before",
    killers=("locality", "values"),
    needs=("hook_mlp_out", "hook_mixer_out"),
)
def places_are_a_block_early(patch: Patch, family: Family) -> None:
    def early(point: Any, known: Any) -> Any:
        if not point.name.endswith(("hook_mlp_out", "hook_mixer_out")) or not point.layer:
            return point
        before = known[point.name.replace(f"blocks.{point.layer}.", f"blocks.{point.layer - 1}.")]
        return attrs.evolve(point, seam=before.seam)

    points(patch, early)


@mutant("an edit of resid_mid reaches the MLP alone", killers=("edits",), needs=("hook_resid_mid",))
def resid_mid_reaches_one_branch(patch: Patch, family: Family) -> None:
    def one(point: Any, known: Any) -> Any:
        is_it = point.name.endswith("hook_resid_mid") and isinstance(point.seam, ModuleInput)
        return attrs.evolve(point, seam=attrs.evolve(point.seam, reaches="module")) if is_it else point

    points(patch, one)


@mutant("queries and keys change places", killers=("values", "weights"), needs=("attn.hook_q",))
def queries_are_keys(patch: Patch, family: Family) -> None:
    def swapped(point: Any, known: Any) -> Any:
        other = {"hook_q": "hook_k", "hook_k": "hook_q"}.get(point.name.rpartition(".")[2])
        if ".attn." not in point.name or other is None:
            return point
        return attrs.evolve(point, seam=known[f"{point.name[:-6]}{other}"].seam)

    points(patch, swapped)


@mutant("a shape says positions where channels are", killers=("dtypes",))
def a_shape_is_turned(patch: Patch, family: Family) -> None:
    def turned(point: Any, known: Any) -> Any:
        return attrs.evolve(point, shape="batch d_model pos") if point.name == "hook_embed" else point

    points(patch, turned)


@mutant("a writer of the residual stream is not declared", killers=("residual", "decompositions"))
def a_writer_is_missing(patch: Patch, family: Family) -> None:
    declares(patch, lambda declaration: attrs.evolve(declaration, writers=declaration.writers[:-1]))


@mutant("weights of the first block are given for all", killers=("weights",))
def weights_are_the_first_blocks(patch: Patch, family: Family) -> None:
    def first(view: Any) -> Any:
        return attrs.evolve(view, path=view.path.replace("{layer}", "0")) if view.name in ("W_O", "W_in_proj") else view

    def first_of_layers(declaration: Any) -> Any:
        return attrs.evolve(declaration, weights=tuple(first(view) for view in declaration.weights))

    declares(patch, first_of_layers)


@mutant("weight views are declared absent, and are there", killers=("capabilities",))
def a_capability_is_denied(patch: Patch, family: Family) -> None:
    def denied(resolve: Any, self: Any, model_type: str) -> Any:
        found = resolve(self, model_type)
        absent = {Capability.WEIGHT_VIEWS: (Support.ABSENT, "a mutant denies it")}
        return attrs.evolve(found, capabilities={**found.capabilities, **absent})

    around(patch, _registry.Registry, "resolve", denied)


@mutant("a state is promised, and there is none", killers=("capabilities",), needs=("attn.hook_z",))
def a_capability_is_invented(patch: Patch, family: Family) -> None:
    def invented(resolve: Any, self: Any, model_type: str) -> Any:
        found = resolve(self, model_type)
        return attrs.evolve(found, capabilities={**found.capabilities, Capability.SSM_STATE: Support.FULL})

    around(patch, _registry.Registry, "resolve", invented)


@mutant("the descriptor imports torch", killers=("discovery",))
def the_descriptor_is_heavy(patch: Patch, family: Family) -> None:
    package = package_of(_registry.active_registry().resolve(family.model_type))
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    (folder / package).mkdir()
    code = Path(spec.origin).read_text(encoding="utf-8")
    (folder / package / "__init__.py").write_text(f"{code}\nimport torch\n", encoding="utf-8")
    before = os.environ.get("PYTHONPATH")
    patch.setenv("PYTHONPATH", os.pathsep.join([str(folder), *([before] if before else [])]))
