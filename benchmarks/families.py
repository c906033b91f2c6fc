"""A plain forward and the default cache of each family, as ratios to plain HF."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    Mamba2Config,
    MambaConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

import lens_core as lens
from benchmarks.models import random_tokens
from benchmarks.pairs import interleaved
from benchmarks.rows import Row, ratio_row
from benchmarks.settings import Settings, Size

__all__ = ["family_configs", "random_family", "rows"]


def family_configs(size: Size) -> Mapping[str, PreTrainedConfig]:
    """Give a config of each family but GPT-2 with these dimensions; Mamba-2's heads are 64 wide or less."""
    shared: dict[str, Any] = {
        "vocab_size": size.d_vocab,
        "hidden_size": size.d_model,
        "num_hidden_layers": size.n_layers,
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),
    }
    head_dim = min(64, size.d_model // 2)
    attention = {
        "num_attention_heads": size.n_heads,
        "num_key_value_heads": size.n_heads // 2,
        "intermediate_size": 4 * size.d_model,
        "max_position_embeddings": size.n_ctx,
    }
    return {
        "Llama": LlamaConfig(**shared, **attention),
        "Mamba": MambaConfig(**shared),
        "Mamba-2": Mamba2Config(
            **shared, num_heads=2 * size.d_model // head_dim, head_dim=head_dim, n_groups=1, chunk_size=64
        ),
    }


def random_family(config: PreTrainedConfig) -> tuple[PreTrainedModel, lens.LensModel]:
    """Make a float32 model of HF's own random initialisation, and the same one in lens' hands."""
    torch.manual_seed(0)
    hf_model = AutoModelForCausalLM.from_config(config).eval()
    return hf_model, lens.load(hf_model, tokenizer=False)


def rows(settings: Settings) -> Iterator[Row]:
    """Measure each family; no gradients."""
    tokens = random_tokens(settings.family)
    for name, config in family_configs(settings.family).items():
        hf_model, model = random_family(config)
        plain = partial(hf_model, tokens, use_cache=False)
        ways: dict[str, Callable[[], Any]] = {
            "plain forward": partial(model, tokens),
            "all default names cached": partial(model.run_with_cache, tokens),
        }
        with torch.no_grad():
            for way, ours in ways.items():
                pairs = interleaved(plain, ours, seconds=16 * settings.share, at_least=settings.at_least)
                yield ratio_row(f"{name}, forward of 1 × {settings.family.n_tokens} tokens", f"{name}: {way}", pairs)
