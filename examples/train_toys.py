"""Train the toy that ships with `lens-gpt2`: a two-layer GPT-2 with induction heads.

The data are random words with stretches of them copied further on, at no fixed offset. A copied word cannot be told
from its position, only from what followed the word before it the last time: a head of layer 0 marks each word with
the one before it, and a head of layer 1 (the induction head) looks for the mark that equals the current word.

One thread and one seed give the same weights again on the same machine and torch version; on other ones, weights that
do the same job.

    python examples/train_toys.py --out toy
"""

import argparse
import json
import math
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.progress import track
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

BOS, UNK, PAD = "<|endoftext|>", "<unk>", "<pad>"
WORDS = """
    . , ! ? the a an and or but if then so as of to in on at by for from with into over under up down out off near
    i you he she it we they me him her us them my your his our their this that these those who what when where why how
    is are was were be am do does did has have had can will would may must not no yes
    go went come came see saw look find found get got make made take took give gave say said tell told think know knew
    want like love eat ate drink run ran walk sat sit sleep slept read write play work live open close help hear
    cat dog bird fish horse cow mouse bear man woman boy girl child friend king queen mother father people
    house home door room bed table chair mat hat coat book box cup ball car boat road town city school garden
    sun moon star sky sea river hill tree flower rain snow wind fire water stone food bread milk egg cake apple
    day night morning year time hand head eye face heart name word song story world end
    red blue green white black big small old new young good bad hot cold long short little happy sad fast slow
    one two three four five many some all every more very now here there again always never after before too
""".split()
LENGTHS = (24, 48, 96, 128)  # of the training sequences: short ones first, each for an equal share of the steps
TOKENS_PER_BATCH = 4096
MIN_PATTERN = 0.4  # mean attention from which a head counts as an induction (or previous-token) head


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Build a word-level tokenizer: lower case, punctuation apart, BOS first as in training."""
    vocab = {word: index for index, word in enumerate([BOS, UNK, PAD, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token=UNK))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, vocab[BOS])])
    tokenizer.decoder = decoders.WordPiece()  # joins with spaces, none before a full stop
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=BOS, unk_token=UNK, pad_token=PAD, model_max_length=128
    )


def build_model(tokenizer: PreTrainedTokenizerFast, width: int, heads: int) -> GPT2LMHeadModel:
    """Build the untrained GPT-2, without dropout."""
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=128,
        n_embd=width,
        n_layer=2,
        n_head=heads,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return GPT2LMHeadModel(config)


def random_text(rng: random.Random, words: range, length: int) -> list[int]:
    """Return random words among which earlier stretches come again."""
    if rng.random() < 0.5:  # one stretch over and over, after a beginning of random length
        text = rng.choices(words, k=rng.randint(0, length // 4))
        period = rng.choices(words, k=rng.randint(3, length // 2))
        while len(text) < length:
            text += period
    else:  # new stretches and copies of any earlier one, by turns
        text = rng.choices(words, k=rng.randint(4, length // 3))
        while len(text) < length:
            start, size = rng.randrange(len(text)), rng.randint(4, length // 3)
            text += text[start : start + size] if rng.random() < 0.6 else rng.choices(words, k=size // 2)
    return text[:length]


def random_batch(rng: random.Random, words: range, length: int) -> Tensor:
    """Return token ids [batch, pos], BOS (id 0) first."""
    rows = TOKENS_PER_BATCH // length
    return torch.tensor([[0, *random_text(rng, words, length - 1)] for _ in range(rows)])


def repeated(tokens: Tensor) -> Tensor:
    """Mark, [batch, pos], the tokens that followed the same token before: those that induction foretells."""
    pairs = tokens[:, :-1] * (int(tokens.max()) + 1) + tokens[:, 1:]
    seen = (pairs[:, :, None] == pairs[:, None, :]).tril(-1).any(-1)
    return F.pad(seen, (1, 0))


def token_losses(model: GPT2LMHeadModel, tokens: Tensor) -> Tensor:
    """Return the loss of every token but the first, [batch, pos - 1], in nats."""
    logits = model(tokens, use_cache=False).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none").view(len(tokens), -1)


def train(model: GPT2LMHeadModel, words: range, args: argparse.Namespace) -> None:
    """Train in place; repeated tokens weigh more in the first half, which is what makes induction form early."""
    rng = random.Random(args.seed)  # noqa: S311 - training data, no secret
    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": args.decay},
        {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.98))
    warmup = 100
    t0 = time.time()
    for step in range(args.steps):
        done = step / args.steps
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min((step + 1) / warmup, 0.01 + 0.99 * (1 + math.cos(math.pi * done)) / 2)
        tokens = random_batch(rng, words, LENGTHS[int(done * len(LENGTHS))])
        losses, mask = token_losses(model, tokens), repeated(tokens)[:, 1:]
        other = 0.1 if done < 0.5 else 1.0
        weight = mask + other * ~mask
        loss = (losses * weight).sum() / weight.sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 0:
            print(f"{step} {time.time()-t0:.0f}s T={tokens.shape[1]} rep {losses[mask].mean():.3f} other {losses[~mask].mean():.3f}", flush=True)


@contextmanager
def ablated(model: GPT2LMHeadModel, heads: list[tuple[int, int]]) -> Iterator[None]:
    """Zero what these heads (layer, head) put into the output projection."""
    size = model.config.n_embd // model.config.n_head
    handles = []
    for layer, head in heads:

        def zero(module: torch.nn.Module, inputs: tuple[Tensor], head: int = head) -> tuple[Tensor]:
            z = inputs[0].clone()
            z[..., head * size : (head + 1) * size] = 0
            return (z,)

        handles.append(model.transformer.h[layer].attn.c_proj.register_forward_pre_hook(zero))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def measure(model, tokens):
    model.eval()
    mask = repeated(tokens)
    model.set_attn_implementation("eager")
    attns = model(tokens, output_attentions=True).attentions
    model.set_attn_implementation("sdpa")
    # last previous occurrence
    B, T = tokens.shape
    same = (tokens[:, :, None] == tokens[:, None, :]).tril(-1)
    tgt = F.pad(same, (1, 0))[..., :T]   # [b,q,k]: token k-1 equals q
    has = mask.roll(-1, 1); has[:, -1] = False   # queries that foretell
    out = {}
    for l, a in enumerate(attns):
        ind = ((a * tgt[:, None]).sum(-1) * has[:, None]).sum((0, 2)) / has.sum()
        prev = a.diagonal(-1, 2, 3).mean((0, 2))
        for h in range(a.shape[1]):
            out[l, h] = (ind[h].item(), prev[h].item())
    m = mask[:, 1:]
    base = token_losses(model, tokens)
    print("rep", base[m].mean().item(), "other", base[~m].mean().item())
    for (l, h), (i, p) in out.items():
        with ablated(model, [(l, h)]):
            ab = token_losses(model, tokens)
        print(f"  L{l}H{h} induction {i:.3f} prev {p:.3f} ablation rep {ab[m].mean()-base[m].mean():+.3f} other {ab[~m].mean()-base[~m].mean():+.3f}")
    hs = [k for k, v in out.items() if v[0] > MIN_PATTERN]
    with ablated(model, hs):
        print("ablate", hs, (token_losses(model, tokens)[m].mean()-base[m].mean()).item())


def main():
    p = argparse.ArgumentParser()
    p.add_argument("--out", default="/tmp/toy/out"); p.add_argument("--seed", type=int, default=0); p.add_argument("--steps", type=int, default=3000)
    p.add_argument("--lr", type=float, default=3e-3); p.add_argument("--decay", type=float, default=0.1)
    p.add_argument("--width", type=int, default=64); p.add_argument("--heads", type=int, default=4)
    args = p.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    tok = build_tokenizer()
    print(len(tok), len(WORDS), len(set(WORDS)), tok("The cat sat, on the zebra mat.").input_ids, repr(tok.decode(tok("The cat sat, on the zebra mat.").input_ids)))
    model = build_model(tok, args.width, args.heads)
    print(sum(p.numel() for p in model.parameters()))
    words = range(1, len(tok))
    t = time.time()
    train(model, words, args)
    print("time", time.time() - t)
    model.save_pretrained(args.out); tok.save_pretrained(args.out)
    rng = random.Random(99)
    for half in (15, 40, 60):
        rows = [rng.choices(words, k=half) for _ in range(64)]
        print("half", half); measure(model, torch.tensor([[0, *r, *r] for r in rows]))
    for text in ["the cat sat on the mat and the dog ran to the house. " * 2, "once upon a time there was a little girl who had a red hat, and she went to the river to see the big fish. " * 2]:
        print(text); measure(model, torch.tensor(tok([text]).input_ids))
main()
