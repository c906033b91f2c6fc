"""Indirect objects: which name does the model give, which parts write it, and what do other runs' activations change.

"When Mary and John went to the store, John gave a drink to" goes on with the name that came once, Mary (the indirect
object, IO), not with the one that came twice (the subject, S). The measure is the logit difference at the last token,
logit(IO) - logit(S). After Wang et al. 2022, who took GPT-2 small apart this way.
"""

import itertools
import random
from collections.abc import Sequence
from typing import Any

import attrs
import torch
from torch import Tensor

import lens_core as lens

__all__ = [
    "Batch",
    "Patching",
    "attention",
    "attribution",
    "differences",
    "fixed_batch",
    "head_patching",
    "heads_replaced",
    "make_prompt",
    "random_batches",
    "stream_patching",
    "strongest",
    "tokenize",
    "whole_forward_gap",
]

NAMES = (
    *("Mary", "John", "Tom", "James", "Alice", "Sarah", "David", "Michael", "Robert", "Anna"),
    *("Emily", "Laura", "Peter", "Paul", "Mark", "Jane", "Kate", "Jack", "Daniel", "Simon"),
)
PLACES = ("store", "park", "school", "office", "station", "hospital")
THINGS = ("drink", "book", "ring", "ball", "gift", "card")
TEMPLATES = (
    "When {first} and {second} went to the {place}, {subject} gave a {thing} to",
    "After {first} and {second} went to the {place}, {subject} gave a {thing} to",
    "While {first} and {second} were at the {place}, {subject} handed a {thing} to",
    "Then {first} and {second} went to the {place}. At the {place}, {subject} gave a {thing} to",
    "Then {first} and {second} had a long talk, and afterwards {subject} said to",
    "Friends {first} and {second} found a {thing} at the {place}, and {subject} gave it to",
)


@attrs.frozen(kw_only=True)
class Prompt:
    """One sentence and its two names.

    Attributes:
        text: It ends where the indirect object comes next.
        io: The name that is right.
        subject: The name that came twice.
        swapped: The sentence with the other name coming twice, so that the right answer is the other one.
        unrelated: The sentence with three other names, none of which comes twice.
    """

    text: str
    io: str
    subject: str
    swapped: str
    unrelated: str


@attrs.frozen(kw_only=True, eq=False)
class Batch:
    """Sentences of one length, as tokens.

    Attributes:
        tokens, swapped, unrelated: Ids `[batch, pos]`; they differ in the names only.
        io, subject: Ids `[batch]` of the two names.
        prompts: The sentences.
    """

    tokens: Tensor
    swapped: Tensor
    unrelated: Tensor
    io: Tensor
    subject: Tensor
    prompts: Sequence[Prompt]

    def places(self) -> dict[str, Tensor]:
        """Give the positions `[batch]` of IO, S1 (its first time), S2 (its second) and the last token."""
        is_subject = (self.tokens == self.subject[:, None]).int()
        last = self.tokens.shape[1] - 1
        return {
            "first token": torch.zeros_like(self.io),
            "IO": (self.tokens == self.io[:, None]).int().argmax(-1),
            "S1": is_subject.argmax(-1),
            "S2": last - is_subject.flip(-1).argmax(-1),
            "last token": torch.full_like(self.io, last),
        }


def make_prompt(template: str, names: Sequence[str], *, io_first: bool, place: str, thing: str) -> Prompt:
    """Fill a template; `names` are the indirect object, the subject and three unrelated ones."""
    io, subject, *others = names
    first, second = (io, subject) if io_first else (subject, io)

    def fill(first: str, second: str, subject: str) -> str:
        return template.format(first=first, second=second, subject=subject, place=place, thing=thing)

    return Prompt(
        text=fill(first, second, subject),
        io=io,
        subject=subject,
        swapped=fill(first, second, io),
        unrelated=fill(*others),
    )


def tokenize(model: Any, prompts: Sequence[Prompt]) -> Batch:
    """Turn prompts of one template into a batch; names must be single tokens and lengths equal."""
    ids = {name: model.to_single_token(f" {name}") for prompt in prompts for name in (prompt.io, prompt.subject)}
    tokens, swapped, unrelated = (
        model.to_tokens([getattr(prompt, kind) for prompt in prompts]) for kind in ("text", "swapped", "unrelated")
    )
    if not tokens.shape == swapped.shape == unrelated.shape:
        raise lens.InputError("names of other lengths in tokens; take single-token names")
    io, subject = (torch.tensor([ids[getattr(p, kind)] for p in prompts]) for kind in ("io", "subject"))
    return Batch(tokens=tokens, swapped=swapped, unrelated=unrelated, io=io, subject=subject, prompts=prompts)


def random_batches(model: Any, per_template: int, seed: int = 0) -> list[Batch]:
    """Draw names, places and things; one batch for each template, both orders of the names by turns."""
    rng, batches = random.Random(seed), []
    for template in TEMPLATES:
        prompts = [
            make_prompt(
                template,
                rng.sample(NAMES, 5),
                io_first=index % 2 == 0,
                place=rng.choice(PLACES),
                thing=rng.choice(THINGS),
            )
            for index in range(per_template)
        ]
        batches.append(tokenize(model, prompts))
    return batches


def fixed_batch(model: Any, pairs: int, seed: int = 1) -> Batch:
    """Draw pairs of names for the first template, each in both orders: sentences that differ in the names only."""
    rng, prompts = random.Random(seed), []
    for _ in range(pairs):
        names = rng.sample(NAMES, 5)
        prompts += [make_prompt(TEMPLATES[0], names, io_first=o, place="store", thing="drink") for o in (True, False)]
    return tokenize(model, prompts)


def differences(logits: Tensor, batch: Batch) -> Tensor:
    """Give logit(IO) - logit(S) at the last position, `[batch]`."""
    last, row = logits[:, -1], torch.arange(len(batch.io))
    return last[row, batch.io] - last[row, batch.subject]


@torch.no_grad()
def attribution(model: Any, batch: Batch) -> dict[str, Any]:
    """Take the logit difference apart by what each part added to the residual stream at the last token.

    Raw weights, nothing folded: the parts are divided by the final norm's scale in this run and multiplied by its gain.

    Returns:
        `heads` [layer, head], `mlps` [layer] and `rest` by label, means over the batch; `heads_io` and `heads_subject`,
        what heads write for either name alone, over what they write for the average of `NAMES`; `truth` [batch];
        `error`, the largest difference of a row between the sum of all parts and the true logit difference.
    """
    logits, cache = model.run_with_cache(
        batch.tokens, names_filter=["hook_embed", "z", "attn_out", "mlp_out", "resid_post", "ln_final.hook_scale"]
    )
    parts, labels = cache.get_full_resid_decomposition(expand_neurons=False, pos_slice=-1, return_labels=True)
    by_part, bias = cache.logit_attrs(parts, batch.io, batch.subject, pos_slice=-1, return_bias=True)  # part batch
    truth = differences(logits, batch)
    mean = dict(zip(labels, by_part.mean(1), strict=True))
    layers, heads = range(model.cfg.n_layers), range(model.cfg.n_heads)
    stack = cache.stack_head_results(pos_slice=-1)
    average = torch.stack([cache.logit_attrs(stack, f" {name}", pos_slice=-1) for name in NAMES]).mean(0)
    alone = {
        f"heads_{kind}": (cache.logit_attrs(stack, ids, pos_slice=-1) - average).mean(1).unflatten(0, (len(layers), -1))
        for kind, ids in (("io", batch.io), ("subject", batch.subject))
    }
    return {
        "heads": torch.stack([torch.stack([mean.pop(f"L{layer}H{head}") for head in heads]) for layer in layers]),
        "mlps": torch.stack([mean.pop(f"{layer}_mlp_out") for layer in layers]),
        "rest": mean,
        **alone,
        "truth": truth,
        "error": float((by_part.sum(0) + bias - truth).abs().max()),
    }


@torch.no_grad()
def attention(model: Any, batch: Batch, queries: Sequence[str], fwd_hooks: Sequence[Any] = ()) -> Tensor:
    """Give what every head attends to from some places, `[query, layer, head, place]`, means over the batch."""
    with model.hooks(fwd_hooks):
        _, cache = model.run_with_cache(batch.tokens, names_filter="pattern")
    places, row = batch.places(), torch.arange(len(batch.io))
    keys = torch.stack(list(places.values()))  # place batch
    found = []
    for query in queries:
        pattern = cache["pattern"][:, row, :, places[query]]  # batch layer head key
        found.append(pattern[row, :, :, keys].mean(1).permute(1, 2, 0))  # from place batch layer head
    return torch.stack(found)


@attrs.frozen(kw_only=True, eq=False)
class Patching:
    """How far each patch takes the mean logit difference from the clean run's to the corrupted run's.

    Attributes:
        share: 0 where a patch changes nothing, 1 where it alone gives what the corrupted run gives.
        clean, corrupted: The two runs' mean logit differences.
    """

    share: Tensor
    clean: float
    corrupted: float


@torch.no_grad()
def stream_patching(model: Any, batch: Batch, corrupted: Tensor) -> Patching:
    """Patch `hook_resid_pre` [layer, pos] from the corrupted into the clean run, one forward each.

    Each starts at the patched layer from the clean run's own stream, which gives the same numbers as the whole model.
    """
    logits, clean = model.run_with_cache(batch.tokens, names_filter="resid_pre")
    other_logits, other = model.run_with_cache(corrupted, names_filter="resid_pre")
    start, end = differences(logits, batch).mean(), differences(other_logits, batch).mean()
    n_layers, n_pos = model.cfg.n_layers, batch.tokens.shape[1]
    share = torch.zeros(n_layers, n_pos)
    for layer, pos in itertools.product(range(n_layers), range(n_pos)):
        if torch.equal(clean["resid_pre", layer][:, pos], other["resid_pre", layer][:, pos]):
            continue  # nothing to patch
        edit = lens.edits.replace(other["resid_pre", layer], pos=pos)
        patched = model.run_with_hooks(
            clean["resid_pre", layer], start_at_layer=layer, fwd_hooks=[(("resid_pre", layer), edit)]
        )
        share[layer, pos] = (differences(patched, batch).mean() - start) / (end - start)
    return Patching(share=share, clean=float(start), corrupted=float(end))


@torch.no_grad()
def head_patching(model: Any, batch: Batch, corrupted: Tensor) -> Patching:
    """Patch each head's `hook_z` at all positions [layer, head] from the corrupted into the clean run."""
    logits, clean = model.run_with_cache(batch.tokens, names_filter="resid_pre")
    other_logits, other = model.run_with_cache(corrupted, names_filter="z")
    start, end = differences(logits, batch).mean(), differences(other_logits, batch).mean()
    share = torch.zeros(model.cfg.n_layers, model.cfg.n_heads)
    for layer, head in itertools.product(range(model.cfg.n_layers), range(model.cfg.n_heads)):
        edit = lens.edits.replace(other["z", layer], heads=head)
        patched = model.run_with_hooks(
            clean["resid_pre", layer], start_at_layer=layer, fwd_hooks=[(("z", layer), edit)]
        )
        share[layer, head] = (differences(patched, batch).mean() - start) / (end - start)
    return Patching(share=share, clean=float(start), corrupted=float(end))


@torch.no_grad()
def whole_forward_gap(model: Any, batch: Batch, corrupted: Tensor, cells: Sequence[tuple[int, int]]) -> float:
    """Measure, for some cells (layer, pos), how far starting at a layer is from patching the whole model's run."""
    _, clean = model.run_with_cache(batch.tokens, names_filter="resid_pre")
    _, other = model.run_with_cache(corrupted, names_filter="resid_pre")
    gaps = []
    for layer, pos in cells:
        hooks = [(("resid_pre", layer), lens.edits.replace(other["resid_pre", layer], pos=pos))]
        whole = model.run_with_hooks(batch.tokens, fwd_hooks=hooks)
        short = model.run_with_hooks(clean["resid_pre", layer], start_at_layer=layer, fwd_hooks=hooks)
        gaps.append((whole - short).abs().max())
    return float(torch.stack(gaps).max())


def strongest(values: Tensor, count: int) -> list[tuple[int, int]]:
    """Give the (layer, head) of the largest values, largest first."""
    flat = values.flatten().topk(count).indices
    return [divmod(int(index), values.shape[1]) for index in flat]


@torch.no_grad()
def heads_replaced(
    model: Any, batch: Batch, corrupted: Tensor, heads: Sequence[tuple[int, int]], place: str | None = None
) -> list[Any]:
    """Make hooks that put the corrupted run's z of these heads (layer, head) in place, everywhere or at one place."""
    _, other = model.run_with_cache(corrupted, names_filter="z")
    at = None if place is None else batch.places()[place]
    if at is not None and bool((at != at[0]).any()):
        raise lens.InputError(f"the sentences have {place} at different positions")
    pos = None if at is None else int(at[0])
    return [(("z", layer), lens.edits.replace(other["z", layer], heads=head, pos=pos)) for layer, head in heads]
