"""Folders with random models and a tokenizer, which every library loads the same files from."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging

__all__ = ["make"]

_IDS: Mapping[str, Any] = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}


def make(name: str, folder: Path, *, is_quick: bool) -> None:
    """Save a model of HF's own random initialisation in float32."""
    logging.disable_progress_bar()
    torch.manual_seed(0)
    config = _tiny(name) if is_quick else _full(name)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    words = {"<s>": 0} | {f"w{index}": index for index in range(1, config.vocab_size)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<s>"))
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, **dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token"), "<s>")
    ).save_pretrained(folder)


def _full(name: str) -> PreTrainedConfig:
    """Give the dimensions of GPT-2 small, of SmolLM2-135M, and of half of mamba-130m's layers.

    `n_ctx` stands in GPT-2's published config, and TransformerLens 3.1 reads it there.
    """
    if name == "gpt2":
        return GPT2Config(n_ctx=1024, **_IDS)
    if name == "smollm2":
        return LlamaConfig(
            vocab_size=49152,
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=30,
            num_attention_heads=9,
            num_key_value_heads=3,
            max_position_embeddings=2048,
            rms_norm_eps=1e-5,
            tie_word_embeddings=True,
            **_IDS,
        )
    return MambaConfig(vocab_size=50280, hidden_size=768, num_hidden_layers=12, **_IDS)


def _tiny(name: str) -> PreTrainedConfig:
    if name == "gpt2":
        return GPT2Config(vocab_size=64, n_positions=64, n_ctx=64, n_embd=32, n_layer=4, n_head=2, **_IDS)
    shared = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 4, **_IDS}
    if name == "smollm2":
        return LlamaConfig(**shared, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2)
    return MambaConfig(**shared)
