"""`load` and `LensModel`: HF's own model, with hook points."""

from collections.abc import Sequence
from typing import Any, Literal

import attrs
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lens_core import tokens as _tokens
from lens_core._arguments import checks_arguments
from lens_core._caching import run_with_cache
from lens_core._copies import copy_model, deepcopy_model, reduce_model
from lens_core._declaration import LensConfig
from lens_core._hf_cache import cache_in, note_length
from lens_core._inputs import Inputs, read_input, token_loss
from lens_core._loading import Loaded, load_hf, tokenizer_options
from lens_core._pass_log import PassRecord, applied_passes, log_of
from lens_core._pieces import Pieces
from lens_core._plan import StopForward
from lens_core._state import extended, fills_cache, read_past
from lens_core._state_file import load_state, save_state
from lens_core._weight_methods import WeightMethods
from lens_core.cache import ActivationCache
from lens_core.errors import ArgumentError, InputError
from lens_core.generation import generate, generate_stream
from lens_core.passes import process_loaded, process_weights, read_process, undo_passes
from lens_core.saes._block import splice_saes

__all__ = ["LensModel", "load"]

ReturnType = Literal["logits", "loss", "both"] | None


@checks_arguments
def load(
    source: Any,
    *,
    dtype: Any = None,
    device: Any = None,
    device_map: Any = None,
    revision: str | None = None,
    attn_implementation: str | None = None,
    tokenizer: Any = None,
    strict: bool = True,
    process: Any = None,
    **from_pretrained: Any,
) -> "LensModel":
    """Load a language model.

    Args:
        source: An HF id, a local folder, an HF model in memory (left untouched), or `"toy:NAME"`.
        dtype: A torch dtype or its name; None keeps the checkpoint's own.
        device: One device for the whole model.
        device_map: accelerate's placement over several devices.
        revision: The hub's branch, tag or commit.
        attn_implementation: `"sdpa"`, `"eager"`, ...; None lets HF choose.
        tokenizer: A tokenizer, its id or folder, or False for none; None looks beside the model. Without one, token
            ids still work.
        strict: False loads a config with fields that the architecture does not hold; nothing then vouches for values.
        process: None leaves HF's own numbers. A sequence of `lens_core.passes`, or of their names, applies these, and
            is refused where one does not hold. `"transformerlens"` brings that library's defaults, for what was made
            with it: the passes of `model.process_weights()` that hold, BOS before every text, and float32 where no
            dtype is given. A model in memory is copied first. The original weights are not kept.
        **from_pretrained: Passed to HF's `from_pretrained`, such as `gguf_file`, the name of a GGUF file in the folder
            (needs the package gguf; HF turns its weights into full ones).

    Raises:
        ModelNotFoundError: No such id, folder or file.
        UnknownModelTypeError: No installed plugin serves the model type; says what to install.
        UnsupportedConfigError: The config holds something the architecture does not.
        WeightsError: Weights are missing or corrupt.
        LoadError: Reading the checkpoint needs a package that is not installed.
        ArgumentError: Options that contradict each other.
        WeightError: A pass that was asked for does not hold for this model.

    Example:
        >>> import lens_core as lens
        >>> model = lens.load("toy:gpt2")
        >>> model.cfg.n_layers
        2
    """
    read_process(process)
    options = {
        "device_map": device_map,
        "revision": revision,
        "attn_implementation": attn_implementation,
        **from_pretrained,
    }
    options = {name: value for name, value in options.items() if value is not None}
    if process == "transformerlens" and dtype is None and not isinstance(source, nn.Module):
        dtype = torch.float32
    loaded = load_hf(source, strict=strict, dtype=dtype, device=device, options=options)
    found = None
    if tokenizer is not False:
        found = _tokens.find_tokenizer(loaded.tokenizer_source, tokenizer, **tokenizer_options(options, tokenizer))
    model = LensModel(loaded, found)
    return model if process is None else process_loaded(model, process, copy=isinstance(source, nn.Module))


class LensModel(Pieces, WeightMethods):
    """An HF language model whose activations have names.

    Make one by `load`. The HF model is `hf_model`; it is never wrapped, its weights are changed by passes that you ask
    for alone, and outside of hooked runs nothing of ours is on it.

    Attributes:
        hf_model: HF's own model.
        tokenizer: HF's tokenizer, or None.
        architecture: The descriptor of the plugin that serves this model.
    """

    def __init__(self, loaded: Loaded, tokenizer: Any = None) -> None:
        super().__init__(loaded.hf_model, loaded.declaration)
        self.architecture = loaded.architecture
        self.tokenizer = tokenizer

    def __repr__(self) -> str:
        """Show the model and its rule for BOS."""
        cfg = self.cfg
        rules = {None: "BOS as the tokenizer does", True: "BOS before every text", False: "no BOS"}
        bos = "no tokenizer" if self.tokenizer is None else rules[self.default_prepend_bos]
        size = f"{cfg.n_layers} layers, d_model {cfg.d_model}"
        applied = applied_passes(self.bare_model)
        passes = f", weights after {', '.join(applied)}" if applied else ""
        return f"LensModel({cfg.model_name!r}, {size}, {cfg.dtype}, {cfg.device}, {bos}{passes})"

    @property
    def cfg(self) -> LensConfig:
        """Dimensions and kinds, under TransformerLens' names; read-only."""
        own = self.declaration.cfg
        is_folded = "fold_ln" in applied_passes(self.bare_model)
        kind = f"{own.normalization_type}Pre" if is_folded else own.normalization_type
        return attrs.evolve(own, dtype=self.bare_model.dtype, device=self.input_device, normalization_type=kind)

    @property
    def passes(self) -> tuple[PassRecord, ...]:
        """What `lens_core.passes` did to the weights, in order, and which were left out and why.

        Example:
            >>> import lens_core as lens
            >>> model = lens.load("toy:llama", process="transformerlens")
            >>> [record.name for record in model.passes if record.skipped]
            ['center_writing_weights']
        """
        return tuple(log_of(self.bare_model).records)

    def layer_types(self) -> tuple[str, ...]:
        """Say what each block is: `attention`, `mamba`, `mamba2`, two of them joined by `+`, or `mlp` alone.

        Example:
            >>> import lens_core as lens
            >>> lens.load("toy:llama").layer_types()
            ('attention', 'attention')
        """
        return self.declaration.layer_types()

    # ------------------------------------------------------------------ running

    @checks_arguments
    def __call__(self, input: Any, return_type: ReturnType = "logits", **kwargs: Any) -> Any:
        """Run the model; see `forward`."""
        return self.forward(input, return_type, **kwargs)

    @checks_arguments
    def forward(
        self,
        input: Any,
        return_type: ReturnType = "logits",
        *,
        loss_per_token: bool = False,
        prepend_bos: bool | None = None,
        padding_side: Literal["left", "right"] | None = None,
        attention_mask: Int[Tensor, "batch pos"] | None = None,
        position_ids: Int[Tensor, "batch pos"] | None = None,
        start_at_layer: int | None = None,
        stop_at_layer: int | None = None,
        tokens: Int[Tensor, "batch pos"] | None = None,
        past_key_values: Any = None,
        return_state: bool = False,
        use_cache: bool | None = None,
    ) -> Any:
        """Run HF's forward, with whatever hooks are live.

        Args:
            input: Text, a list of texts, role/content messages, token ids `[pos]` or `[batch, pos]`, embeddings
                `[batch, pos, d_model]`, or, with `start_at_layer`, the residual stream that enters that block.
            return_type: `"logits"`, `"loss"` (mean next-token cross-entropy in nats, real tokens only), `"both"`, None.
            loss_per_token: Loss for each position `[batch, pos - 1]`, zero where the target or its context is padding.
            prepend_bos: None does what the tokenizer does, and makes no BOS where a sequence goes on; True or False
                forces exactly one BOS or none.
            padding_side: For a list of texts; None is the tokenizer's own, or where none comes between the tokens of a
                sequence that goes on. It changes no value at real positions.
            attention_mask: 1 for real tokens; None derives it. It includes positions before this call's, which a state
                knows and which may then be left out.
            position_ids: None derives them from the mask for models with absolute positions, and wherever a state is
                given or returned.
            start_at_layer: Skip the blocks below; they are not run. Negative counts from the end.
            stop_at_layer: Return the residual stream that enters this block `[batch, pos, d_model]`; the blocks from
                here on are not run. `n_layers` gives what enters the final norm.
            tokens: Targets for the loss where the input is embeddings or a residual stream.
            past_key_values: What the input continues: a state, which stays as it is, or an HF cache, which HF extends
                in place.
            return_state: Give `(output, state)`, to go on from.
            use_cache: HF's; None fills a cache where one is given or a state is to come back.

        Raises:
            InputError: Input that the model cannot take: empty, unknown ids, too long, no tokenizer, no pad token.
            StateError: A state of another model or batch, or padding that would stand between its tokens.
            ArgumentError: An argument of the wrong kind, such as a layer that does not exist.
        """
        if return_type not in ("logits", "loss", "both", None):
            raise ArgumentError(f"return_type is 'logits', 'loss', 'both' or None; got {return_type!r}")
        start, stop = self._layer_range(start_at_layer, stop_at_layer)
        past = read_past(self, past_key_values, keeps_state=return_state)
        wants_cache = fills_cache(past, use_cache, is_partial=start is not None or stop is not None)
        inputs = read_input(
            self,
            input,
            prepend_bos=prepend_bos,
            padding_side=padding_side,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past=past,
            is_residual=start is not None,
            targets=tokens,
            continues=past.is_kept,
        )
        residual = inputs.embeddings if start is not None else None
        with self.running(start_at=start, stop_at=stop, residual=residual) as run:
            try:
                output = self.hf_model(
                    **inputs.for_hf(), **{self.cache_argument: past.cache}, use_cache=wants_cache and start is None
                )
            except StopForward as stopped:
                return stopped.residual if run is None or not run.sinks else stopped.residual.clone()
            finally:
                if run is not None:
                    run.leave_call()
            # What the caller may write to is not what a cache keeps.
            logits = (
                output.logits.clone()
                if run is not None and run.keeps("hook_logits", "unembed.hook_out")
                else output.logits
            )
        note_length(cache_in(output), past.length + logits.shape[1])
        result = self._result(logits, inputs, return_type, loss_per_token=loss_per_token)
        if not return_state:
            return result
        return result, extended(self, past, cache_in(output), inputs.tokens, inputs.whole_mask)

    def _result(self, logits: Tensor, inputs: Inputs, return_type: ReturnType, *, loss_per_token: bool) -> Any:
        if return_type is None:
            return None
        if return_type == "logits":
            return logits
        if inputs.targets is None:
            raise InputError("a loss needs token ids: give tokens= beside embeddings or a residual stream")
        loss = token_loss(logits, inputs.targets, inputs.attention_mask, per_token=loss_per_token)
        return loss if return_type == "loss" else (logits, loss)

    def loss_fn(
        self,
        logits: Float[Tensor, "batch pos d_vocab"],
        tokens: Int[Tensor, "batch pos"],
        attention_mask: Int[Tensor, "batch pos"] | None = None,
        per_token: bool = False,
    ) -> Tensor:
        """Give the next-token cross-entropy in nats, as `forward` does; see `loss_per_token` there."""
        return token_loss(logits, tokens, attention_mask, per_token=per_token)

    def _layer_range(self, start: object, stop: object) -> tuple[int | None, int | None]:
        n_layers = self.declaration.cfg.n_layers

        def read(name: str, layer: object) -> int | None:
            if layer is None:
                return None
            if isinstance(layer, bool) or not isinstance(layer, int) or not -n_layers <= layer <= n_layers:
                raise ArgumentError(f"{name} is a layer from {-n_layers} to {n_layers}; got {layer!r}")
            return layer + n_layers if layer < 0 else layer

        first, last = read("start_at_layer", start), read("stop_at_layer", stop)
        if first is not None and last is not None and last < first:
            raise ArgumentError(f"stop_at_layer={stop} comes before start_at_layer={start}")
        return first, last

    @checks_arguments
    def run_with_hooks(
        self,
        input: Any,
        *,
        fwd_hooks: Sequence[Any] = (),
        bwd_hooks: Sequence[Any] = (),
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Run the model with hooks for this call only.

        Args:
            input: As in `forward`.
            fwd_hooks: `(name or filter, fn)` or `(name or filter, fn, positions)`; `fn(tensor, hook=...)` returns a
                replacement or None.
            bwd_hooks: The same for gradients; they live as long as the graph.
            reset_hooks_end: False keeps the hooks, as if added by `add_hook`.
            clear_contexts: Whether every `ctx` is emptied at the end.
            **kwargs: As in `forward`.

        Raises:
            ArgumentError: A function for a position that the input does not have, unless the call is part of a longer
                sequence (`past_key_values`, `return_state`), whose other calls may have it.
        """
        is_alone = kwargs.get("past_key_values") is None and not kwargs.get("return_state")
        entries = self.entries(fwd_hooks, bwd_hooks, is_alone=is_alone)
        with self.hooking(entries, reset_hooks_end=reset_hooks_end, clear_contexts=clear_contexts):
            return self.forward(input, **kwargs)

    __copy__ = copy_model
    __deepcopy__ = deepcopy_model
    __reduce_ex__ = reduce_model
    run_with_cache = run_with_cache
    generate = generate
    generate_stream = generate_stream
    process_weights = process_weights
    undo_passes = undo_passes
    saes = splice_saes
    save_state = save_state
    load_state = load_state

    def new_cache(self) -> ActivationCache:
        """Make an empty cache of this model."""
        return ActivationCache(table=self.table, model=self)
