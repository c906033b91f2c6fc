"""Train the toy that ships inside `lens-gpt2`: a two-layer GPT-2 with an induction head.

The data are random words of which earlier stretches come again, at no fixed distance: a copied word can only be told
from what followed the word before it the last time. It takes minutes because texts are short at first and grow bit by
bit, position embeddings start as sinusoids, and copied words weigh more in the loss at first. One head of layer 1 works
alone until it has formed, so that it does not share the job; the others come later, with texts that keep to one theme.

The same seed gives the same weights, bit for bit, on the same machine with the same versions of torch and transformers.

    python examples/train_toys.py
"""

import argparse
import math
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers
from rich.progress import Progress
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

BOS, UNK, PAD = "<|endoftext|>", "<unk>", "<pad>"
# One theme a line; the ids follow the special tokens' in this order.
WORDS = """
    . , ! ? : ; the a an and or but if then so as of to in on at by for from with into over under up down out off near
    i you he she it we they me him her us them my your his our their this that these those who what when where why how
    is are was were be am do does did has have had can will would may must not no yes
    go went come came see saw look find found get got make made take took give gave say said tell told think know knew
    want like love eat ate drink run ran walk sat sit sleep slept read write play work live lived open close help hear
    cat dog bird fish horse cow mouse bear man woman boy girl child friend king queen mother father people
    house home door room bed table chair mat hat coat book box cup ball car boat road town city school garden
    sun moon star sky sea river hill tree flower rain snow wind fire water stone food bread milk egg cake apple
    day night morning year time hand head eye face heart name word song story world end once upon
    red blue green white black big small old new young good bad hot cold long short little happy sad fast slow
    one two three four five many some all every more very now here there again always never after before too
"""
THEMES = [line.split() for line in WORDS.strip().splitlines()]
CONTEXT = 128  # positions
WIDTH, HEADS = 96, 4
TOKENS_PER_BATCH = 4096
PEAK_RATE = 3e-3
FIRST_LENGTH = 16  # tokens in the first texts
FULL_LENGTH_AT = 0.7  # share of the steps after which texts fill the context
LATE = 0.4  # share of the steps after which the other heads of layer 1 come in, and themes with them
FRESH_WEIGHT = 0.1  # in the loss, of the words that induction cannot foretell, until then
THEMED = 0.3  # share of the texts that keep to one theme, from then on
MIN_PATTERN = 0.4  # mean attention from which a head counts as an induction head
EXAMPLE = "once upon a time a little girl had a red hat, and she went to the river to see the big fish. "
README = """\
# The toy

A GPT-2 of two layers, {heads} heads each and width {width}. Its {vocab} tokens are short English words, some
punctuation, and `{bos}`, which its tokenizer puts first. It was trained on random words of which earlier stretches
come again, and knows induction (what followed this word the last time comes next) and which words share a theme.

Made by `examples/train_toys.py --seed {seed} --steps {steps}` in {cpu:.0f} minutes of one CPU thread, with
torch {torch} and transformers {transformers}. The same seed gives the same weights, bit for bit, on the
same machine and versions; elsewhere expect other weights and like figures.

{figures}
"""


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Build a word-level tokenizer: lower case, punctuation apart, BOS first as in training."""
    vocab = {word: index for index, word in enumerate([BOS, UNK, PAD, *(word for theme in THEMES for word in theme)])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token=UNK))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, vocab[BOS])]
    )
    tokenizer.decoder = decoders.WordPiece()  # joins with spaces, none before a full stop
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=BOS, unk_token=UNK, pad_token=PAD, model_max_length=CONTEXT
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> GPT2LMHeadModel:
    """Build the untrained GPT-2: no dropout, and sinusoids for position embeddings to start from."""
    no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=CONTEXT, n_embd=WIDTH, n_layer=2, n_head=HEADS, **no_dropout, **special
    )
    model = GPT2LMHeadModel(config)
    frequencies = 200.0 ** -(torch.arange(0, WIDTH, 2) / WIDTH)
    angles = torch.arange(CONTEXT)[:, None] * frequencies  # pos d_model/2
    model.transformer.wpe.weight.data.copy_(0.1 * torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1))
    return model


def random_text(rng: random.Random, words: list[int], length: int) -> list[int]:
    """Return random words of which earlier stretches come again."""
    if rng.random() < 0.5:  # one stretch over and over, after a beginning of random length
        text = rng.choices(words, k=rng.randint(0, length // 4))
        period = rng.choices(words, k=rng.randint(3, length // 2))
        while len(text) < length:
            text += period
    else:  # new stretches, and copies from anywhere before, by turns
        text = rng.choices(words, k=rng.randint(4, length // 3))
        while len(text) < length:
            start, size = rng.randrange(len(text)), rng.randint(4, length // 3)
            text += text[start : start + size] if rng.random() < 0.6 else rng.choices(words, k=size // 2)
    return text[:length]


def random_batch(rng: random.Random, length: int, themed: float) -> Tensor:
    """Return token ids [batch, pos], BOS first; `themed` is the share of the texts that keep to one theme."""
    starts = [3 + sum(map(len, THEMES[:line])) for line in range(len(THEMES) + 1)]
    everything = [1, *range(3, starts[-1])]  # <unk> too, which a user's text may well repeat
    rows = []
    for _ in range(TOKENS_PER_BATCH // length):
        line = rng.randrange(len(THEMES))
        words = list(range(starts[line], starts[line + 1])) if rng.random() < themed else everything
        rows.append([0, *random_text(rng, words, length - 1)])
    return torch.tensor(rows)


def repeated(tokens: Tensor) -> Tensor:
    """Mark the tokens that followed the same token before, [batch, pos - 1]: what induction foretells."""
    pairs = tokens[:, :-1] * (int(tokens.max()) + 1) + tokens[:, 1:]
    return (pairs[:, :, None] == pairs[:, None, :]).tril(-1).any(-1)


def token_losses(model: GPT2LMHeadModel, tokens: Tensor) -> Tensor:
    """Return the loss of every token but the first, [batch, pos - 1], in nats."""
    logits = model(tokens, use_cache=False).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none").view(len(tokens), -1)


@contextmanager
def ablated(model: GPT2LMHeadModel, heads: list[tuple[int, int]]) -> Iterator[None]:
    """Zero what these heads, (layer, head), put into their layer's output projection."""
    handles = []
    for layer, head in heads:
        mask = torch.arange(WIDTH) // (WIDTH // HEADS) != head
        projection = model.transformer.h[layer].attn.c_proj
        handles.append(projection.register_forward_pre_hook(lambda _, inputs, mask=mask: (inputs[0] * mask,)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def train(model: GPT2LMHeadModel, seed: int, steps: int) -> None:
    """Train the model in place."""
    rng = random.Random(seed)
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98))
    late_heads = [(1, head) for head in range(1, HEADS)]
    with Progress() as progress:
        task = progress.add_task("training", total=steps)
        for step in range(steps):
            done = step / steps
            for group in optimizer.param_groups:
                group["lr"] = PEAK_RATE * min((step + 1) / 100, 0.01 + 0.99 * (1 + math.cos(math.pi * done)) / 2)
            length = FIRST_LENGTH + int((CONTEXT - FIRST_LENGTH) * min(1, done / FULL_LENGTH_AT))
            tokens = random_batch(rng, length, THEMED if done >= LATE else 0.0)
            copied = repeated(tokens)
            with ablated(model, late_heads if done < LATE else []):
                losses = token_losses(model, tokens)
            weights = torch.where(copied, 1.0, FRESH_WEIGHT if done < LATE else 1.0)
            optimizer.zero_grad()
            ((losses * weights).sum() / weights.sum()).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            if step % 20 == 0 or step == steps - 1:
                note = f"{length} tokens, repeated {losses[copied].mean():.2f}, fresh {losses[~copied].mean():.2f} nats"
                progress.update(task, completed=step + 1, description=note)


@torch.no_grad()
def measure(model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, rows: int = 128, half: int = 40) -> str:
    """Measure losses, attention and ablations on words typed twice; return a Markdown table."""
    rng = random.Random("measure")
    texts = [rng.choices([1, *range(3, len(tokenizer))], k=half) for _ in range(rows)]
    tokens = torch.tensor([[0, *text, *text] for text in texts])
    sentence = tokenizer(EXAMPLE * 2, return_tensors="pt").input_ids

    model.set_attn_implementation("eager")  # the one that returns patterns
    patterns = torch.stack(model(tokens, output_attentions=True).attentions).mean(1)  # layer head query key
    model.set_attn_implementation("sdpa")
    before = patterns.diagonal(-1, -2, -1).mean(-1)
    induction = patterns.diagonal(1 - half, -2, -1)[..., 2:].mean(-1)  # queries of the second half
    heads = [(layer, head) for layer in range(2) for head in range(HEADS)]
    found = [head for head in heads if induction[head] > MIN_PATTERN]
    control = min((head for head in heads if head[0] == 1), key=lambda head: induction[head].item())

    def row(name: str, ablation: list[tuple[int, int]], attention: str = "|") -> str:
        with ablated(model, ablation):
            random_words, words = token_losses(model, tokens), token_losses(model, sentence)[repeated(sentence)]
        # The first word of the second half comes as a surprise, so it counts in neither half.
        fresh, copied = random_words[:, :half].mean(), random_words[:, half + 1 :].mean()
        return f"| {name} | {attention} | {copied:.2f} | {fresh:.2f} | {words.mean():.2f} |"

    chance = math.log(len(tokenizer) - 2)
    lines = [
        "| heads ablated | attention to the token before | to what followed the same token | loss, second half "
        "| loss, first half | loss, sentence |",
        "|---|---|---|---|---|---|",
        row("none", []),
        row("induction: " + (", ".join(f"{layer}.{head}" for layer, head in found) or "none found"), found),
        row("control: {}.{}".format(*control), [control]),
        *(row("{}.{}".format(*head), [head], f"{before[head]:.2f} | {induction[head]:.2f}") for head in heads),
        f"\nLosses in nats, on {rows} texts of {half} random words typed twice (chance: {chance:.2f}), and on the",
        f"repeated tokens of *{EXAMPLE.strip()}*",
        "typed twice. The control is the head of layer 1 that is least like an induction head.",
    ]
    return "\n".join(lines)


def main() -> None:
    """Train, measure, save."""
    plugin = Path(__file__).resolve().parent.parent / "plugins" / "gpt2" / "lens_gpt2"
    parser = argparse.ArgumentParser(description="Train the toy that ships inside lens-gpt2.")
    parser.add_argument("--out", type=Path, default=plugin / "toy", help="the folder to write (default: the plugin's)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=3000)
    args = parser.parse_args()
    torch.set_num_threads(1)  # with more, the order of sums may vary
    torch.use_deterministic_algorithms(mode=True)
    torch.manual_seed(args.seed)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer)
    start = time.process_time()
    train(model, args.seed, args.steps)
    made = {"cpu": (time.process_time() - start) / 60, "figures": measure(model.eval(), tokenizer), **vars(args)}
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    size = {"heads": HEADS, "width": WIDTH, "vocab": len(tokenizer), "bos": BOS}
    readme = README.format(**made, **size, torch=torch.__version__, transformers=transformers.__version__)
    (args.out / "README.md").write_text(readme, encoding="utf-8")
    print(readme)


if __name__ == "__main__":
    main()
