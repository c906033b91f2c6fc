"""Random GPT-2 models: HF's, and the same one in lens' hands."""

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

import lens_core as lens
from benchmarks.settings import Size

__all__ = ["random_model", "random_tokens"]


def random_model(size: Size) -> tuple[GPT2LMHeadModel, lens.LensModel]:
    """Make a float32 model of HF's own random initialisation, without special tokens."""
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=size.n_layers,
        n_embd=size.d_model,
        n_head=size.n_heads,
        vocab_size=size.d_vocab,
        n_positions=size.n_ctx,
        bos_token_id=None,
        eos_token_id=None,
    )
    hf_model = GPT2LMHeadModel(config).eval()
    return hf_model, lens.load(hf_model, tokenizer=False)


def random_tokens(size: Size, batch: int = 1) -> Tensor:
    """Give token ids `[batch, n_tokens]`."""
    return torch.randint(0, size.d_vocab, (batch, size.n_tokens), generator=torch.Generator().manual_seed(1))
