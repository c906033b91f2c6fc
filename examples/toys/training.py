"""The training loop that all toys share."""

import math
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from unittest import mock

import torch
from rich.progress import Progress
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.models.mamba import modeling_mamba

from toys.data import CONTEXT, random_batch, repeated
from toys.scan import selective_scan
from toys.zoo import Toy

FIRST_LENGTH = 16  # tokens in the first texts
FULL_LENGTH_AT = 0.7  # share of the steps after which texts fill the context
LATE = 0.4  # share of the steps after which the other heads of layer 1 come in, and themes with them
FRESH_WEIGHT = 0.1  # in the loss, of the words that induction cannot foretell, until then
THEMED = 0.3  # share of the texts that keep to one theme, from then on


def token_losses(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """Return the loss of every token but the first, [batch, pos - 1], in nats."""
    logits = model(tokens, use_cache=False).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none").view(len(tokens), -1)


@contextmanager
def ablated(mixers: Sequence[nn.Module], heads: int, ablation: list[tuple[int, int]]) -> Iterator[None]:
    """Zero what these heads, (layer, head), put into their layer's output projection."""
    handles = []
    for layer, head in ablation:

        def zero(_: nn.Module, inputs: tuple[Tensor, ...], head: int = head) -> tuple[Tensor]:
            width = inputs[0].shape[-1]
            return (inputs[0] * (torch.arange(width) // (width // heads) != head),)

        handles.append(mixers[layer].register_forward_pre_hook(zero))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _optimizer(model: PreTrainedModel) -> torch.optim.Optimizer:
    """Decay the matrices but for A_log, whose size is a time constant."""
    named = dict(model.named_parameters())
    matrices = [p for name, p in named.items() if p.dim() > 1 and "A_log" not in name]
    others = [p for name, p in named.items() if p.dim() == 1 or "A_log" in name]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.98))


def train(model: PreTrainedModel, toy: Toy, seed: int, steps: int) -> None:
    """Train the model in place."""
    rng = random.Random(seed)
    optimizer = _optimizer(model)
    late_heads = [(1, head) for head in range(1, toy.heads or 0)] if toy.is_staged else []
    with Progress() as progress, mock.patch.object(modeling_mamba, "mamba_selective_scan", selective_scan):
        task = progress.add_task("training", total=steps)
        for step in range(steps):
            done = step / steps
            for group in optimizer.param_groups:
                group["lr"] = toy.rate * min((step + 1) / 100, 0.01 + 0.99 * (1 + math.cos(math.pi * done)) / 2)
            length = FIRST_LENGTH + int((CONTEXT - FIRST_LENGTH) * min(1, done / FULL_LENGTH_AT))
            tokens = random_batch(rng, toy.tokens // length, length, THEMED if done >= LATE else 0.0)
            copied = repeated(tokens)
            with ablated(toy.mixers(model), toy.heads or 1, late_heads if done < LATE else []):
                losses = token_losses(model, tokens)
            weights = torch.where(copied, 1.0, FRESH_WEIGHT if done < LATE else 1.0)
            optimizer.zero_grad()
            ((losses * weights).sum() / weights.sum()).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            if step % 20 == 0 or step == steps - 1:
                note = f"{length} tokens, repeated {losses[copied].mean():.2f}, fresh {losses[~copied].mean():.2f} nats"
                progress.update(task, completed=step + 1, description=note)
