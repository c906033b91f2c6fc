"""Tiny GPT-2 models for tests: fixed seeds, noise in every parameter, sizes that cannot be taken for one another."""

import copy
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

# 3 heads of 7, 3 layers, 29 tokens, 37 neurons, 32 positions: a swapped axis cannot broadcast.
SIZES: dict[str, Any] = {
    "vocab_size": 29,
    "n_positions": 32,
    "n_embd": 21,
    "n_layer": 3,
    "n_head": 3,
    "n_inner": 37,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
    "bos_token_id": 28,
    "eos_token_id": 28,
}


def tiny_gpt2(
    *, dtype: torch.dtype = torch.float32, attn: str = "sdpa", seed: int = 0, **overrides: Any
) -> GPT2LMHeadModel:
    """Build a GPT-2 in eval mode whose every parameter has noise.

    A freshly initialised model hides mistakes: 18 of its 28 tensors are constant. Weights are drawn large enough that
    attention is far from uniform and every edit moves the logits well above rounding.
    """
    config = GPT2Config(**{**SIZES, **overrides}, attn_implementation=attn)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = GPT2LMHeadModel(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                gain = name.endswith("weight") and parameter.ndim == 1
                std = 0.2 if parameter.ndim == 1 else 0.3
                parameter.copy_(torch.randn_like(parameter) * std + float(gain))
    return model.to(dtype).eval()


def fresh(model: GPT2LMHeadModel) -> GPT2LMHeadModel:
    """Copy a model into a new instance that shares nothing with it: the reference that nothing has touched."""
    config = copy.deepcopy(model.config)
    with torch.random.fork_rng():
        other = GPT2LMHeadModel(config).to(next(model.parameters()).dtype)
    other.load_state_dict(copy.deepcopy(model.state_dict()))
    other.set_attn_implementation(model.config._attn_implementation)
    return other.train(model.training)


def random_tokens(batch: int = 2, pos: int = 5, *, seed: int = 0, vocab: int = 28) -> Tensor:
    """Draw token ids `[batch, pos]` with a generator of its own."""
    return torch.randint(0, vocab, (batch, pos), generator=torch.Generator().manual_seed(seed))


def pad(rows: list[Tensor], side: str = "left", *, amount: int = 0, token: int = 28) -> tuple[Tensor, Tensor]:
    """Pad rows of unequal lengths to a batch, `amount` columns more than needed; return the ids and the mask."""
    width = max(len(row) for row in rows) + amount
    ids, mask = torch.full((len(rows), width), token), torch.zeros(len(rows), width, dtype=torch.long)
    for index, row in enumerate(rows):
        where = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[index, where], mask[index, where] = row, 1
    return ids, mask


def tiny_tokenizer(*, pad: bool = True, bos: bool = True) -> PreTrainedTokenizerFast:
    """Build a tokenizer of one-word tokens w0 to w27 that fits the tiny models; id 28 is `<s>`."""
    vocab = {f"w{index}": index for index in range(28)} | {"<s>": 28}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"bos_token": "<s>", "eos_token": "<s>"} if bos else {}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special, **({"pad_token": "<s>"} if pad else {}))
