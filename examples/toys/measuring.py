"""What a trained toy can do: losses on words typed twice, and what is left of it without each head or mixer."""

import math
import random
from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from toys.data import EXAMPLE, repeated
from toys.training import ablated, token_losses
from toys.zoo import LAYERS, Toy

Losses: TypeAlias = Callable[[list[tuple[int, int]]], str]
HALF = 40  # words, which are typed twice
ROWS = 128  # texts
MIN_PATTERN = 0.4  # mean attention from which a head counts as an induction head


@torch.no_grad()
def measure(model: PreTrainedModel, toy: Toy, tokenizer: PreTrainedTokenizerFast) -> str:
    """Measure losses and ablations with transformers' own forward pass; return a Markdown table."""
    rng = random.Random("measure")
    texts = [rng.choices([1, *range(3, len(tokenizer))], k=HALF) for _ in range(ROWS)]
    tokens = torch.tensor([[0, *text, *text] for text in texts])
    sentence = tokenizer(EXAMPLE * 2, return_tensors="pt").input_ids

    def losses(ablation: list[tuple[int, int]]) -> str:
        with ablated(toy.mixers(model), toy.heads or 1, ablation):
            random_words = torch.cat([token_losses(model, part) for part in tokens.split(32)])
            words = token_losses(model, sentence)[repeated(sentence)]
        # The first word of the second half comes as a surprise, so it counts in neither half.
        fresh, copied = random_words[:, :HALF].mean(), random_words[:, HALF + 1 :].mean()
        return f"{copied:.2f} | {fresh:.2f} | {words.mean():.2f} |"

    table = _heads(model, tokens, losses) if toy.heads else _layers(losses)
    chance = math.log(len(tokenizer) - 2)
    note = " The control is the head of layer 1 that is least like an induction head." if toy.heads else ""
    return "\n".join(
        [
            *table,
            f"\nLosses in nats, on {ROWS} texts of {HALF} random words typed twice (chance: {chance:.2f}), and on the",
            f"repeated tokens of *{EXAMPLE.strip()}*",
            f"typed twice.{note}",
        ]
    )


def _heads(model: PreTrainedModel, tokens: Tensor, losses: Losses) -> list[str]:
    """Tell where each head looks and what is left without it."""
    model.set_attn_implementation("eager")  # the one that returns patterns
    patterns = torch.stack(model(tokens, output_attentions=True).attentions).mean(1)  # layer head query key
    model.set_attn_implementation("sdpa")
    before = patterns.diagonal(-1, -2, -1).mean(-1)
    induction = patterns.diagonal(1 - HALF, -2, -1)[..., 2:].mean(-1)  # queries of the second half
    heads = [(layer, head) for layer in range(LAYERS) for head in range(patterns.shape[1])]
    found = [head for head in heads if induction[head] > MIN_PATTERN]
    control = min((head for head in heads if head[0] == 1), key=lambda head: induction[head].item())
    named = ", ".join(f"{layer}.{head}" for layer, head in found) or "none found"
    return [
        "| heads ablated | attention to the token before | to what followed the same token | loss, second half "
        "| loss, first half | loss, sentence |",
        "|---|---|---|---|---|---|",
        f"| none | | | {losses([])}",
        f"| induction: {named} | | | {losses(found)}",
        f"| control: {control[0]}.{control[1]} | | | {losses([control])}",
        *(f"| {head[0]}.{head[1]} | {before[head]:.2f} | {induction[head]:.2f} | {losses([head])}" for head in heads),
    ]


def _layers(losses: Losses) -> list[str]:
    """Tell what is left without the mixer of each layer."""
    return [
        "| ablated | loss, second half | loss, first half | loss, sentence |",
        "|---|---|---|---|",
        f"| none | {losses([])}",
        *(f"| the mixer of layer {layer} | {losses([(layer, 0)])}" for layer in range(LAYERS)),
    ]
