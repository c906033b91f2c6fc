"""Weight passes: other weights that give the same predictions, with less in the way of reading them.

A pass rewrites weights of the live HF model so that what the model predicts stays as it was. With norms without gains a
weight can be read by itself; a stream without a mean is the one that LayerNorms see; logits without a mean over the
vocabulary do not favour every token alike. Hooks, caches and weight views go on working, and hold the contract's
equations on the new weights. Papers, autoencoders and notebooks made with TransformerLens' defaults have such weights.

Each pass is a record: `law` says what stays, `after` what is then true, `holds` where it may be used, `why_not(model)`
why it may not on this model. `model.process_weights()` applies what holds, in TransformerLens' order, `model.passes`
tells what was done, and `model.undo_passes()` puts back every bit.

Sources: Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits"; TransformerLens' weight processing.
"""

import copy as copying
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, cast

import attrs
import torch

from lens_core import _pass_rules as rules
from lens_core import _pass_steps as steps
from lens_core._arguments import checks_arguments
from lens_core._pass_log import ATTRIBUTE, Editor, PassLog, PassRecord, log_of, undo
from lens_core._tokenizer import with_bos
from lens_core.errors import ArgumentError, PassWarning, WeightError

if TYPE_CHECKING:
    from lens_core.model import LensModel

__all__ = [
    "PASSES",
    "PassRecord",
    "WeightPass",
    "center_unembed",
    "center_writing_weights",
    "fold_ln",
    "fold_value_biases",
    "process_weights",
    "refactor_factored_attn_matrices",
    "undo_passes",
]


@attrs.frozen(kw_only=True)
class WeightPass:
    """One way to rewrite a model's weights; call it on a model.

    Attributes:
        name: What TransformerLens calls it.
        law: What stays as it was.
        after: What is true of the weights afterwards.
        holds: Where it may be applied.
        precedes: Passes that it must come before, since it would undo what they did.
        rule: Gives the reason why a model does not allow it, or None.
        steps: Does it, weight by weight.

    Example:
        >>> import lens_core as lens
        >>> from lens_core.passes import center_writing_weights, fold_ln
        >>> model = lens.load("toy:gpt2")
        >>> fold_ln(model).passes[-1].name
        'fold_ln'
        >>> center_writing_weights.why_not(lens.load("toy:llama"))
        'ln1 is an RMSNorm, which does not subtract the mean: without it, its output would differ'
    """

    name: str
    law: str
    after: str
    holds: str
    precedes: tuple[str, ...] = ()
    rule: Callable[[Any], str | None] = attrs.field(repr=False)
    steps: Callable[[Editor], Iterator[int | None]] = attrs.field(repr=False)

    def why_not(self, model: "LensModel") -> str | None:
        """Say why the pass does not hold for a model; None if it does. Looks at weights, changes none."""
        late = [name for name in log_of(_checked(model).bare_model).applied if name in self.precedes]
        if late:
            return f"it would undo what {late[0]} did: model.undo_passes(), and apply {self.name} first"
        return self.rule(model)

    @checks_arguments
    def __call__(self, model: "LensModel", *, copy: bool = False, keep: bool = True) -> "LensModel":
        """Apply the pass to a model's own weights; a second application does nothing and warns.

        It works through one weight after the other, in pieces of a few MiB. Beside one such piece it takes memory for
        what it makes (`added_bytes` of its record: missing biases, and an unembedding of its own where it was tied) and
        for the originals of what it changes (`kept_bytes`). Half precision is computed in float32 and rounded once.

        Args:
            model: The model.
            copy: Work on a deep copy, and leave this model as it is.
            keep: Keep the originals for `model.undo_passes()`: as much memory as the weights that are changed. Without
                them the checkpoint has to be loaded again.

        Returns:
            The model, or the copy.

        Raises:
            WeightError: The pass does not hold for this model; says why, and nothing was changed.
        """
        _checked(model)
        _check_switches(copy=copy, keep=keep)
        reason = None if self.name in log_of(model.bare_model).applied else self.why_not(model)
        if reason is not None:
            raise WeightError(f"{self.name} does not hold for this model: {reason}")
        target = copying.deepcopy(model) if copy else model
        _apply(self, target, keep=keep, callers=3)
        return target


fold_ln = WeightPass(
    name="fold_ln",
    law="logits, the residual stream, normalized inputs, scores and patterns stay",
    after="gains are 1 and biases 0, and what reads a LayerNorm has no mean over its inputs",
    holds="models whose weights behind norms are all declared, and can take on the norms' biases; "
    "norms between a branch and the sum stay as they are",
    precedes=("fold_value_biases", "refactor_factored_attn_matrices"),
    rule=rules.no_fold_ln,
    steps=steps.fold_norms,
)
"""The norms' gains and biases, into the weights that read them: of attention, MLPs, routers and experts, in_proj of
mixers, the unembedding; and the gain of Mamba-2's gated norm, into out_proj."""

center_writing_weights = WeightPass(
    name="center_writing_weights",
    law="logits stay, and so does the residual stream less its mean over d_model",
    after="what writes to the residual stream has no mean over d_model",
    holds="models whose norms are all LayerNorms before a branch",
    precedes=("refactor_factored_attn_matrices",),
    rule=rules.no_writing_centring,
    steps=steps.center_embeddings_and_branches,
)
"""The mean over d_model, out of embeddings and out of the last weights and biases of each branch."""

center_unembed = WeightPass(
    name="center_unembed",
    law="log-probabilities stay, and so do logits less their mean over the vocabulary",
    after="W_U and b_U have no mean over the vocabulary",
    holds="models without a soft cap of the logits",
    rule=rules.no_unembed_centring,
    steps=steps.center_vocabulary,
)
"""The mean over the vocabulary, out of the unembedding."""

fold_value_biases = WeightPass(
    name="fold_value_biases",
    law="logits, the residual stream, scores and patterns stay; z loses its constant part",
    after="b_V is 0",
    holds="attention whose pattern's rows sum to 1",
    rule=rules.no_value_folding,
    steps=steps.fold_values,
)
"""Biases of the values, into that of attention's output."""

refactor_factored_attn_matrices = WeightPass(
    name="refactor_factored_attn_matrices",
    law="logits, the residual stream, scores and patterns stay; queries, keys, values and z are in other bases",
    after="a head's W_Q and W_K, biases included, have orthogonal columns of equal lengths, its W_O orthonormal rows; "
    "b_V is 0",
    holds="attention without rotation or norms of queries and keys, and with keys and values of each head's own",
    rule=rules.no_refactoring,
    steps=steps.refactor_heads,
)
"""Each head's W_Q W_K^T and W_V W_O, in their singular bases."""

PASSES = (fold_ln, center_writing_weights, center_unembed, fold_value_biases, refactor_factored_attn_matrices)
"""All passes, in the order in which they are applied."""


def _checked(model: Any) -> Any:
    if not hasattr(model, "bare_model") or not hasattr(model, "declaration"):
        raise ArgumentError(f"a pass takes a model that lens.load gave; got {type(model).__name__}")
    return model


def _check_switches(**given: Any) -> None:
    for name, value in given.items():
        if not isinstance(value, bool):
            raise ArgumentError(f"{name} is True or False; got {value!r}")


def _apply(one: WeightPass, model: Any, *, keep: bool, callers: int = 4) -> None:
    root = model.bare_model
    log = log_of(root)
    if one.name in log.applied:
        told = f"{one.name} was applied before: nothing was changed"
        warnings.warn(told, PassWarning, stacklevel=callers)
        return
    setattr(root, ATTRIBUTE, log)
    editor = Editor(model, log, keep=keep)
    layers: dict[int, None] = {}
    try:
        with torch.no_grad():
            for layer in one.steps(editor):
                if layer is not None:
                    layers.setdefault(layer)
    except BaseException as error:
        _give_up(one, model, log, error)
    record = PassRecord(
        name=one.name,
        layers=tuple(sorted(layers)),
        changed=tuple(editor.changed),
        untied=editor.untied,
        added_bytes=editor.added_bytes,
        kept_bytes=editor.kept_bytes,
    )
    log.records[:] = [*(old for old in log.records if old.name != one.name), record]  # it was left out before


def _give_up(one: WeightPass, model: Any, log: PassLog, error: BaseException) -> None:
    """Leave no half-processed weights behind: put back the originals, or say that the model is lost."""
    if log.is_kept:
        undo(model)
        raise error
    raise WeightError(
        f"{one.name} was interrupted, and the original weights were not kept (keep=False): load the model again"
    ) from error


@checks_arguments
def process_weights(
    model: "LensModel",
    *,
    fold_ln: bool | None = None,
    center_writing_weights: bool | None = None,
    center_unembed: bool | None = None,
    fold_value_biases: bool | None = None,
    refactor_factored_attn_matrices: bool | None = False,
    copy: bool = False,
    keep: bool = True,
) -> "LensModel":
    """Apply weight passes in TransformerLens' order.

    None is TransformerLens' True: the pass is applied where it holds; where it does not, it is left out, and
    `model.passes` says why. True asks for it by name, and is refused where it does not hold. All is checked before
    anything is changed; where a pass is interrupted, the weights are put back as before the first one.

    Args:
        model: The model.
        fold_ln: Gains and biases of norms, into what reads them.
        center_writing_weights: The stream's mean, out of what writes to it.
        center_unembed: The logits' mean, out of the unembedding.
        fold_value_biases: Biases of values, into the output's.
        refactor_factored_attn_matrices: Heads in their singular bases; not done by default.
        copy: Work on a deep copy, and leave this model as it is.
        keep: Keep the originals for `model.undo_passes()`: as much memory as the weights that are changed.

    Returns:
        The model, or the copy.

    Raises:
        WeightError: A pass that was asked for does not hold; says why, and nothing was changed.

    Example:
        >>> import lens_core as lens
        >>> model = lens.load("toy:gpt2").process_weights()
        >>> [record.name for record in model.passes]
        ['fold_ln', 'center_writing_weights', 'center_unembed', 'fold_value_biases']
        >>> bool(model.W_U.mean(-1).abs().max() < 1e-6)
        True
        >>> model.undo_passes().passes
        ()
    """
    asked = (fold_ln, center_writing_weights, center_unembed, fold_value_biases, refactor_factored_attn_matrices)
    for one, given in zip(PASSES, asked, strict=True):
        if given is not None and not isinstance(given, bool):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ArgumentError(f"{one.name} is True, False, or None for where it holds; got {given!r}")
    _check_switches(copy=copy, keep=keep)
    chosen = [(one, given) for one, given in zip(PASSES, asked, strict=True) if given is not False]
    return _process(_checked(model), chosen, copy=copy, keep=keep)


def _process(
    model: Any, chosen: Sequence[tuple[WeightPass, bool | None]], *, copy: bool = False, keep: bool = True
) -> Any:
    """Apply passes, each asked for by name or only where it holds."""
    applied = log_of(model.bare_model).applied
    reasons = {one.name: None if one.name in applied else one.why_not(model) for one, _ in chosen}
    for one, given in chosen:
        if given and reasons[one.name] is not None:
            raise WeightError(f"{one.name} does not hold for this model: {reasons[one.name]}")
    target = copying.deepcopy(model) if copy else model
    for one, _ in chosen:
        reason = reasons[one.name]
        if reason is None:
            _apply(one, target, keep=keep)
        else:
            _leave_out(one, target, reason)
    return target


def _leave_out(one: WeightPass, model: Any, reason: str) -> None:
    log = log_of(model.bare_model)
    setattr(model.bare_model, ATTRIBUTE, log)
    log.records[:] = [record for record in log.records if record.name != one.name]
    log.records.append(PassRecord(name=one.name, skipped=reason))


@checks_arguments
def undo_passes(model: "LensModel") -> "LensModel":
    """Put every weight back as it was before the first pass, bit for bit; no made bias stays, what was tied is again.

    What was written into the weights since, by training for instance, is lost.

    Returns:
        The model.

    Raises:
        WeightError: The originals were not kept.

    Example:
        >>> import torch, lens_core as lens
        >>> model = lens.load("toy:gpt2")
        >>> before = model.W_U
        >>> torch.equal(undo_passes(model.process_weights()).W_U, before)
        True
    """
    undo(_checked(model))
    return model


def read_process(process: Any) -> tuple[tuple[WeightPass, bool | None], ...]:
    """Read what `lens.load(..., process=)` was given, in the order of `PASSES`.

    Raises:
        ArgumentError: Neither `"transformerlens"` nor passes.
    """
    if process is None:
        return ()
    if process == "transformerlens":
        return tuple((one, None) for one in PASSES if one is not refactor_factored_attn_matrices)
    known = {one.name: one for one in PASSES}
    listed = [process] if isinstance(process, WeightPass) else process
    if isinstance(listed, str) or not isinstance(listed, Sequence):
        raise ArgumentError(f"process is None, 'transformerlens' or a sequence of passes; got {process!r}")
    found: list[WeightPass] = []
    for one in cast("Sequence[Any]", listed):
        named = known.get(one, one) if isinstance(one, str) else one
        if named not in PASSES:
            raise ArgumentError(f"no weight pass {one!r}; there are {', '.join(known)}")
        found.append(named)
    return tuple((one, True) for one in PASSES if one in found)


def process_loaded(model: Any, process: Any, *, copy: bool) -> Any:
    """Apply what `lens.load(..., process=)` was given, perhaps to a copy; originals are not kept."""
    target = _process(model, read_process(process), copy=copy, keep=False)
    if process == "transformerlens" and target.tokenizer is not None:
        target.tokenizer = with_bos(target.tokenizer)
        target.default_prepend_bos = target.tokenizer.bos_token_id is not None
    return target
