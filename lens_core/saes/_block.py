"""`model.saes`: the block in which SAEs are part of the model."""

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import attrs

from lens_core._arguments import checks_arguments
from lens_core._watch import HookEntry
from lens_core.errors import ArgumentError, SaeError
from lens_core.saes._fit import bos_check, check_metadata, check_place, check_width, metadata_of
from lens_core.saes._splice import Capture, Splice

if TYPE_CHECKING:
    from lens_core.model import LensModel

__all__ = ["splice_saes"]


@checks_arguments
@contextmanager
def splice_saes(
    model: "LensModel", saes: Any, use_error_term: bool = False, *, strict: bool = True
) -> Generator["LensModel", None, None]:
    """Run the model with sparse autoencoders at some hook points, inside the block and in this thread.

    At the hook point NAME of each, the SAE's output goes on in the value's place. `NAME.hook_sae_input`,
    `hook_sae_acts_pre` (where the SAE has `pre_acts` and `activate`), `hook_sae_acts_post`, `hook_sae_recons`,
    `hook_sae_error` (with the error term) and `hook_sae_output` are hook points like any other until the block ends:
    cached, edited at positions, with gradients, in every call. Hooks at NAME itself that were there before see what the
    SAE reads; those given inside see what it gives.

    Args:
        model: The model.
        saes: A module with `encode` and `decode`, several, or a mapping from hook names to them. Without a name given
            the module's own `hook_name` is taken (SAELens' modules: their config's). A transcoder, whose
            `hook_name_out` is another, reads at the one and is spliced at the other.
        use_error_term: Whether what the SAE fails to reconstruct is added to its output. Nothing then changes until
            something is edited: the value goes on bit for bit, and nothing is computed that nobody asks for. Gradients
            are those of the whole formula: a feature's is that of the output through the decoder, and what lies before
            NAME gets the output's own (Marks et al. 2024).
        strict: False splices an SAE, with a warning, whose training had other activations at NAME.

    Raises:
        SaeError: An SAE that does not fit the hook point, one hook point twice, or (strict) one that was trained on
            other activations: processed weights, as its metadata say.
        UnknownHookError: No such hook point.
        ArgumentError: Something without `encode` and `decode`.

    Cost: one encoder and one decoder in each call; with the error term and an edit or a gradient, two of each.

    Example:
        >>> import lens_core as lens
        >>> model = lens.load("toy:gpt2")
        >>> sae = lens.saes.SparseAutoencoder(lens.saes.SaeConfig(d_in=model.cfg.d_model, d_sae=256))
        >>> with model.saes({"blocks.1.hook_resid_pre": sae}, use_error_term=True):
        ...     _, cache = model.run_with_cache("the cat sat", names_filter="sae_acts_post")
        >>> cache["sae_acts_post", 1].shape[-1]
        256
    """
    splices = [_splice(model, name, sae, use_error_term, strict) for name, sae in _named(saes)]
    names = [splice.place.name for splice in splices]
    taken = [name for name in names if names.count(name) > 1 or f"{name}.hook_sae_output" in model.table]
    if taken:
        raise SaeError(
            f"{taken[0]!r} has an SAE already, in this block or one around it; an SAE of what that one gives or leaves "
            f"stands at '{taken[0]}.hook_sae_recons' or '.hook_sae_error'"
        )
    entries = [HookEntry(names=(one.place.name,), exact=True, fn=one, is_optional=True) for one in splices]
    brought = {splice.place.name: splice.points() for splice in splices}
    captures = [splice.capture for splice in splices if splice.capture is not None]
    try:
        with model.running([*entries, *_bos_checks(model, splices)], captures, brings=brought):
            yield model
    finally:
        _forget(model, {point.name for points in brought.values() for point in points})


def _forget(model: "LensModel", names: set[str]) -> None:
    """Remove what was added at hook points that exist no longer: functions, and their contexts."""
    kept: list[HookEntry] = []
    for entry in model.added_hooks:
        others = tuple(name for name in entry.names if name not in names)
        if others:
            kept.append(entry if others == entry.names else attrs.evolve(entry, names=others))
    model.added_hooks = kept
    for name in names:
        model.hook_contexts.pop(name, None)


def _named(saes: Any) -> list[tuple[Any, Any]]:
    """Pair each SAE with the name that it was given, or None."""
    if isinstance(saes, Mapping):
        return list(cast("Mapping[Any, Any]", saes).items())
    if isinstance(saes, Sequence):
        return [(None, sae) for sae in cast("Sequence[Any]", saes)]
    return [(None, saes)]


def _splice(model: "LensModel", name: Any, sae: Any, use_error_term: bool, strict: bool) -> Splice:
    if not all(callable(getattr(sae, method, None)) for method in ("encode", "decode")):
        raise ArgumentError(f"an SAE is a module with encode and decode; got {type(sae).__name__}")
    about = metadata_of(sae)
    source = about["hook_name"] if name is None else name
    if source is None:
        raise ArgumentError(f"{type(sae).__name__} does not say where it belongs: give {{hook_name: sae}}")
    table, head = model.table, about["hook_head_index"]
    read, target = table[source], about["hook_name_out"]
    is_transcoder = target is not None and table.canonical(target) != read.name
    place = table[target] if is_transcoder else read
    for one in {read.name: read, place.name: place}.values():
        check_place(model, one, head=head if one is read else None)
        check_metadata(model, one, about, strict=strict)
    if is_transcoder and table.rank(read.name) > table.rank(place.name):
        raise SaeError(f"a transcoder reads before it writes; {read.name!r} is computed after {place.name!r}")
    if is_transcoder and head is not None:
        raise SaeError(f"a transcoder of one head (hook_head_index={head}) is not supported")
    cfg: Any = getattr(sae, "cfg", None)
    if getattr(sae, "hook_z_reshaping_mode", False):
        raise SaeError(
            "this SAE flattens heads itself, and is given them flattened here: call "
            "sae.turn_off_forward_pass_hook_z_reshaping() first"
        )
    check_width(model, read, getattr(cfg, "d_in", None), head=head, what="d_in")
    check_width(model, place, getattr(cfg, "d_out", None), head=head, what="d_out")
    capture = Capture(names=(read.name,)) if is_transcoder else None
    return Splice(
        hf_model=model.bare_model, sae=sae, place=place, head=head, use_error_term=use_error_term, capture=capture
    )


def _bos_checks(model: "LensModel", splices: Sequence[Splice]) -> list[HookEntry]:
    """Watch how texts begin, once for each habit that the SAEs' trainings had."""
    if model.tokenizer is None or model.tokenizer.bos_token_id is None or "hook_tokens" not in model.table:
        return []
    habits = {metadata_of(splice.sae)["prepend_bos"] for splice in splices} - {None}
    return [HookEntry(names=("hook_tokens",), exact=False, fn=bos_check(model, bool(habit))) for habit in habits]
