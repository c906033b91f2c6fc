"""The four toys: how each is built, and where training treats it unlike the others."""

import math
from collections.abc import Callable, Sequence

import attrs
import torch
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from toys.data import CONTEXT

LAYERS, WIDTH, HEADS, STATES = 2, 96, 4, 32


@attrs.frozen(kw_only=True)
class Toy:
    """One toy.

    Attributes:
        about: What it is, for its README.
        build: Makes the untrained model for a tokenizer.
        mixers: The modules, one a layer, whose input is what the layer's heads or channels found at other positions.
        heads: By how many heads of equal width that input is shared; None where there are no heads to ablate.
        is_staged: Whether one head of layer 1 works alone until it has formed, so that it does not share the job.
        steps: Of training, unless others are asked for.
        tokens: In a batch.
        rate: The highest learning rate.
    """

    about: str
    build: Callable[[PreTrainedTokenizerFast], PreTrainedModel]
    mixers: Callable[[PreTrainedModel], Sequence[nn.Module]]
    heads: int | None = None
    is_staged: bool = False
    steps: int = 3000
    tokens: int = 4096
    rate: float = 3e-3


def _shared(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    """Give what every configuration says alike."""
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return {"vocab_size": len(tokenizer), **special}


def _gpt2(tokenizer: PreTrainedTokenizerFast) -> GPT2LMHeadModel:
    """Build a GPT-2: no dropout, and sinusoids for position embeddings to start from."""
    no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    size = {"n_positions": CONTEXT, "n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS}
    model = GPT2LMHeadModel(GPT2Config(**size, **no_dropout, **_shared(tokenizer)))
    frequencies = 200.0 ** -(torch.arange(0, WIDTH, 2) / WIDTH)
    angles = torch.arange(CONTEXT)[:, None] * frequencies  # pos d_model/2
    model.transformer.wpe.weight.data.copy_(0.1 * torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1))
    return model


def _llama(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Build a Llama: two query heads share a key and value head.

    All embeddings have a part in common to start with, for queries and keys that know only how far apart they are.
    """
    config = LlamaConfig(
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS // 2,
        max_position_embeddings=CONTEXT,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},  # wavelengths from 6 to 430 positions
        tie_word_embeddings=True,
        **_shared(tokenizer),
    )
    model = LlamaForCausalLM(config)
    model.model.embed_tokens.weight.data += config.initializer_range * torch.randn(WIDTH)
    return model


def _mamba(tokenizer: PreTrainedTokenizerFast) -> MambaForCausalLM:
    """Build a Mamba whose states are written to in large steps and decay slowly, to start with."""
    config = MambaConfig(
        hidden_size=WIDTH,
        state_size=STATES,
        num_hidden_layers=LAYERS,
        initializer_range=0.02,
        time_step_min=0.01,
        time_step_max=0.3,
        **_shared(tokenizer),
    )
    model = MambaForCausalLM(config)
    for layer in model.backbone.layers:
        layer.mixer.A_log.data -= math.log(STATES)  # A from -1/32 to -1
    return model


def _mamba2(tokenizer: PreTrainedTokenizerFast) -> Mamba2ForCausalLM:
    """Build a Mamba-2."""
    config = Mamba2Config(
        hidden_size=WIDTH,
        num_heads=2 * HEADS,
        head_dim=WIDTH // HEADS,
        n_groups=1,
        state_size=STATES,
        chunk_size=32,
        num_hidden_layers=LAYERS,
        initializer_range=0.02,
        tie_word_embeddings=True,
        **_shared(tokenizer),
    )
    return Mamba2ForCausalLM(config)


TOYS = {
    "gpt2": Toy(
        about=f"A GPT-2 of two layers, {HEADS} heads each and width {WIDTH}",
        build=_gpt2,
        mixers=lambda model: [block.attn.c_proj for block in model.transformer.h],
        heads=HEADS,
        is_staged=True,
    ),
    "llama": Toy(
        about=f"A Llama of two layers, {HEADS} query heads and {HEADS // 2} key-value heads each, and width {WIDTH}",
        build=_llama,
        mixers=lambda model: [layer.self_attn.o_proj for layer in model.model.layers],
        heads=HEADS,
        steps=1000,
    ),
    "mamba": Toy(
        about=f"A Mamba of two layers, {2 * WIDTH} channels of {STATES} states each, and width {WIDTH}",
        build=_mamba,
        mixers=lambda model: [layer.mixer.out_proj for layer in model.backbone.layers],
        steps=5000,
        tokens=1536,
    ),
    "mamba2": Toy(
        about=f"A Mamba-2 of two layers, {2 * HEADS} heads of {WIDTH // HEADS} x {STATES} states, and width {WIDTH}",
        build=_mamba2,
        mixers=lambda model: [layer.mixer.out_proj for layer in model.backbone.layers],
        steps=1500,
        tokens=1536,
    ),
}
