"""Mamba and Falcon-Mamba as tables: where each hook point, norm and weight is in HF's `MambaForCausalLM` and its kin.

Source: transformers `models/mamba/modeling_mamba.py`, `models/falcon_mamba/modeling_falcon_mamba.py`. Falcon-Mamba
differs by RMSNorms without gain of dt, B and C. What HF calls `mixer.conv1d`, `mixer.act` and `mixer.dt_proj` are
modules that it never calls: their places are inside functions, see `_kernel.py`.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

from torch import Tensor

from lens_core.plugin import (
    RMS_NORM,
    Declaration,
    Embedding,
    HookPoint,
    LensConfig,
    ModuleInput,
    ModuleOutput,
    NormKind,
    NormPlace,
    NormReaders,
    Tokens,
    WeightView,
    WritingWeight,
    norm_points,
    point,
    unembedding_points,
    weight_and_bias,
)
from lens_mamba._calls import read_call
from lens_mamba.mixer import mixer_points, mixer_weights

BLOCK = "backbone.layers.{layer}"
MIXER = f"{BLOCK}.mixer"
NORMS = {
    "norm": NormPlace(path=f"{BLOCK}.norm", kind=RMS_NORM),
    "ln_final": NormPlace(path="backbone.norm_f", kind=RMS_NORM),
}


def _without_gain(module: Any, normalized: Tensor) -> Tensor:
    return normalized


SELECTION_NORM = NormKind(name="RMS", split=RMS_NORM.split, affine=_without_gain, centres=False)
"""Falcon-Mamba's norm of dt, B and C; its weight is a buffer of ones that only kernels read."""


def Mamba(config: Any) -> Declaration:
    """Declare Mamba or Falcon-Mamba at one HF config."""
    cfg = LensConfig(
        model_type=config.model_type,
        n_layers=config.num_hidden_layers,
        d_model=config.hidden_size,
        d_inner=config.intermediate_size,
        d_state=config.state_size,
        d_conv=config.conv_kernel,
        dt_rank=int(config.time_step_rank),
        d_vocab=config.vocab_size,
        act_fn=config.hidden_act,
        eps=config.layer_norm_epsilon,
        normalization_type="RMS",
        positional_embedding_type="none",
    )
    stream = "float32" if config.residual_in_fp32 else "model"
    return Declaration(
        cfg=cfg,
        base="backbone",
        blocks="backbone.layers",
        embed="backbone.embeddings",
        unembed="lm_head",
        norms=NORMS,
        points=tuple(_points(cfg, stream)),
        writers=("hook_mixer_out",),
        mixer_kind="mamba",
        embeddings=("hook_embed",),
        readers=tuple(_readers(cfg.n_layers)),
        writing_weights=tuple(_writing(cfg.n_layers)),
        weights=tuple(_weights()),
        read_call=lambda call: read_call(call, has_bias=config.use_bias),
    )


def _points(cfg: LensConfig, stream: str) -> Iterator[HookPoint]:
    yield point("hook_tokens", Tokens(path="backbone"))
    embedding = Embedding(base="backbone", path="backbone.embeddings")
    yield point("hook_embed", embedding, equation="W_E[tokens] = blocks.0.hook_resid_pre")
    for layer in range(cfg.n_layers):
        yield from _block(cfg, layer, stream)
    yield from norm_points("ln_final", NORMS["ln_final"], dtype=stream)
    yield from unembedding_points("backbone", "lm_head", finish=Tensor.float, dtype="float32")


def _block(cfg: LensConfig, layer: int, stream: str) -> Iterator[HookPoint]:
    hf, here = BLOCK.format(layer=layer), partial(point, layer=layer)
    # The embeddings are in the model's dtype; the first block's sum makes the stream what residual_in_fp32 says.
    yield here("hook_resid_pre", ModuleInput(path=hf), dtype=stream if layer else "model")
    yield here("hook_mixer_in", ModuleInput(path=f"{hf}.norm", is_copy=True))
    yield from norm_points("norm", NORMS["norm"], layer=layer)
    yield from mixer_points(
        layer,
        path=MIXER,
        d_inner=cfg.d_inner or 0,
        d_state=cfg.d_state or 0,
        dt_rank=cfg.dt_rank or 0,
        norm=SELECTION_NORM if cfg.model_type == "falcon_mamba" else None,
    )
    yield here("hook_mixer_out", ModuleOutput(path=f"{hf}.mixer"), equation="gated W_out_proj + b_out_proj")
    yield here("hook_resid_post", ModuleOutput(path=hf), equation="resid_pre + mixer_out", dtype=stream)


def _readers(n_layers: int) -> Iterator[NormReaders]:
    for layer in range(n_layers):
        block, mixer = BLOCK.format(layer=layer), MIXER.format(layer=layer)
        norm = NormPlace(path=f"{block}.norm", kind=RMS_NORM)
        yield NormReaders(norm=norm, readers=(f"{mixer}.in_proj",), layer=layer)
    yield NormReaders(norm=NORMS["ln_final"], readers=("lm_head",))


def _writing(n_layers: int) -> Iterator[WritingWeight]:
    yield WritingWeight(path="backbone.embeddings")
    for layer in range(n_layers):
        yield WritingWeight(path=f"{MIXER.format(layer=layer)}.out_proj", layer=layer)


def _weights() -> Iterator[WeightView]:
    yield WeightView(name="W_E", path="backbone.embeddings")
    yield from weight_and_bias("U", "lm_head")
    yield from mixer_weights(MIXER)
