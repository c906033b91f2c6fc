"""The toys' words: one tokenizer for all of them, and random texts of which earlier stretches come again."""

import random

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from transformers import PreTrainedTokenizerFast

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
EXAMPLE = "once upon a time a little girl had a red hat, and she went to the river to see the big fish. "


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


def random_batch(rng: random.Random, rows: int, length: int, themed: float) -> Tensor:
    """Return token ids [batch, pos], BOS first; `themed` is the share of the texts that keep to one theme."""
    starts = [3 + sum(map(len, THEMES[:line])) for line in range(len(THEMES) + 1)]
    everything = [1, *range(3, starts[-1])]  # <unk> too, which a user's text may well repeat
    batch = []
    for _ in range(rows):
        line = rng.randrange(len(THEMES))
        words = list(range(starts[line], starts[line + 1])) if rng.random() < themed else everything
        batch.append([0, *random_text(rng, words, length - 1)])
    return torch.tensor(batch)


def repeated(tokens: Tensor) -> Tensor:
    """Mark the tokens that followed the same token before, [batch, pos - 1]: what induction foretells."""
    pairs = tokens[:, :-1] * (int(tokens.max()) + 1) + tokens[:, 1:]
    return (pairs[:, :, None] == pairs[:, None, :]).tril(-1).any(-1)
