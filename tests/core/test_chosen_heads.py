"""Scores and patterns of chosen heads and query rows: the cells of the whole, and no others are ever made."""

import gc
import sys

import pytest
import torch
from golden.live import live_bytes
from golden.tiny import pad, random_tokens, tiny_gpt2
from golden.tiny_llama import tiny_llama
from transformers import GPT2Config, GPT2LMHeadModel, masking_utils
from transformers.modeling_utils import AttentionInterface

import lens_core as lens
from lens_core._softmax import additive_mask
from lens_core.errors import ArgumentError

NAMES = ["pattern", "attn_scores"]
HEADS, ROWS = [0, 2], [2, 4, 7]
FUSED = "test_fused"  # stands for a kernel that can do all that the eager one can, such as flash attention on a GPU
VARIANTS = {
    "gpt2": tiny_gpt2,
    "gpt2-by-layer": lambda: tiny_gpt2(scale_attn_by_inverse_layer_idx=True),
    "grouped": lambda: tiny_llama("llama"),
    "window": lambda: tiny_llama("mistral"),
    "windows-by-layer": lambda: tiny_llama("gemma3_text"),
    "rotary-by-layer": lambda: tiny_llama("smollm3"),
    "multiplier": lambda: tiny_llama("granite"),
    "one-key-head": lambda: tiny_llama("gemma"),
    "soft-cap": lambda: fused(tiny_llama("gemma2", attn="eager")),
    "sinks": lambda: fused(tiny_llama("gpt_oss", attn="eager")),
}


def fused(model):
    """Have a model call another kernel than its eager function, though one of the same mathematics."""
    eager = sys.modules[type(model).__module__].eager_attention_forward

    def kernel(module, *args, **kwargs):
        return eager(module, *args, **kwargs)

    AttentionInterface.register(FUSED, kernel)
    masking_utils.AttentionMaskInterface.register(FUSED, masking_utils.eager_mask)
    model.set_attn_implementation(FUSED)
    return model


def close(a, b):
    """Compare as float32 allows."""
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def both(model, tokens, *, heads=None, pos_slice=None, **options):
    """Cache all cells, and the chosen ones."""
    whole = model.run_with_cache(tokens, names_filter=NAMES, **options)[1]
    some = model.run_with_cache(tokens, names_filter=NAMES, heads=heads, pos_slice=pos_slice, **options)[1]
    return whole, some


@pytest.mark.parametrize("variant", VARIANTS)
def test_chosen_cells_are_those_of_the_whole(variant):
    """All attention types, with padding on either side: rows to rounding, heads alone to the bit."""
    model = lens.load(VARIANTS[variant]())
    rows = [random_tokens(1, 9)[0], random_tokens(1, 6, seed=1)[0]]
    for side in ("left", "right"):
        tokens, mask = pad(rows, side, token=27)
        whole, some = both(model, tokens, heads=HEADS, pos_slice=ROWS, attention_mask=mask)
        assert list(some) == list(whole)
        assert len(some) == 2 * model.cfg.n_layers
        for name in whole:
            close(some[name], whole[name][:, HEADS][:, :, ROWS])
        assert some.heads == (0, 2)
        whole, some = both(model, tokens, heads=HEADS, attention_mask=mask)
        for name in whole:
            assert torch.equal(some[name], whole[name][:, HEADS])
    whole, some = both(model, random_tokens(1, 9), pos_slice=-1)
    for name in whole:
        close(some[name], whole[name][:, :, -1:])


@pytest.mark.parametrize("variant", ["gpt2", "window", "sinks"])
def test_they_continue_a_sequence(variant):
    """A prompt with a past, and steps after it; positions are those of the sequence."""
    model = lens.load(VARIANTS[variant]())
    tokens = random_tokens(2, 9)
    state = model(tokens[:, :5], return_state=True)[1]
    whole, some = both(model, tokens[:, 5:], heads=HEADS, pos_slice=ROWS, past_key_values=state)
    for name in whole:
        assert some[name].shape[1:3] == (2, 1)  # of the rows, 7 alone is in this call
        close(some[name], whole[name][:, HEADS][:, :, [2]])
    kept = {}
    for heads, positions in ((None, None), (HEADS, ROWS)):
        with model.caching(NAMES, heads=heads, pos_slice=positions) as kept[heads is None]:
            model.generate(tokens[:, :4], 5, do_sample=False)
    for name in kept[True]:
        close(kept[False][name], kept[True][name][:, HEADS][:, :, ROWS])


def test_no_bit_of_the_model_changes():
    """Logits are HF's."""
    model = lens.load(tiny_llama("mistral"))
    tokens = random_tokens(2, 9)
    logits, _ = model.run_with_cache(tokens, names_filter=NAMES, heads=1, pos_slice=-1)
    assert torch.equal(logits, model.hf_model(tokens).logits)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's own code
def test_flex_attention_masks_are_made_for_the_rows():
    """Its mask is a function, asked for these rows only."""
    model = lens.load(tiny_llama("mistral", attn="flex_attention"))
    with torch.no_grad():
        whole, some = both(model, random_tokens(2, 9), heads=HEADS, pos_slice=ROWS)
    for name in whole:
        close(some[name], whole[name][:, HEADS][:, :, ROWS])


@pytest.mark.parametrize("given", ["none", "boolean", "additive", "by-head", "padding"])
@pytest.mark.parametrize("past", [0, 3])
def test_masks_are_made_for_the_rows(given, past):
    """Those that kernels get: none (causal), the whole one in three forms, or where padding is."""
    n_pos, total = 5, 5 + past
    query, key = torch.zeros(2, 4, n_pos, 3), torch.zeros(2, 2, total, 3)
    open_cells = torch.rand(2, 4 if given == "by-head" else 1, n_pos, total) > 0.4
    mask = {
        "none": None,
        "boolean": open_cells,
        "additive": torch.zeros(open_cells.shape).masked_fill(~open_cells, torch.finfo(torch.float32).min),
        "by-head": open_cells,
        "padding": torch.tensor([[0] * 2 + [1] * (total - 2), [1] * total]),
    }[given]
    whole, length = additive_mask(torch.nn.Identity(), query, key, mask, {}, past=past)
    rows = torch.tensor([0, 2, 3])
    some, same_length = additive_mask(torch.nn.Identity(), query, key, mask, {}, past=past, rows=rows)
    assert same_length == length
    assert torch.equal(some, whole[:, :, rows])
    assert (some < 0).any()
    assert (some == 0).any()


def test_caches_of_different_choices_share_a_run():
    """Each gets its own cells; one that wants all, a function or a gradient has all computed."""
    model, tokens = lens.load(tiny_gpt2()), random_tokens(2, 9)
    whole, _ = both(model, tokens)
    with model.caching("pattern", heads=0, pos_slice=1) as a, model.caching(NAMES, heads=[1, 2], pos_slice=[0, 8]) as b:
        model(tokens)
    with model.caching("pattern", heads=2) as c, model.caching("pattern") as d, model.caching(NAMES, heads=1) as e:
        model(tokens)
    seen = []
    with model.caching("pattern", heads=2, detach=False) as f:
        logits = model.run_with_hooks(tokens, fwd_hooks=[(("pattern", 1), lambda p, hook: seen.append(p))])
    logits.sum().backward()
    for name in a:
        close(a[name], whole[name][:, :1, 1:2])
        assert torch.equal(c[name], whole[name][:, 2:])
        assert torch.equal(d[name], whole[name])
        assert torch.equal(f[name], whole[name][:, 2:])
        assert f.grad[name].shape == f[name].shape
        assert f.grad[name].abs().sum() > 0
    for name in b:
        close(b[name], whole[name][:, 1:, [0, 8]])
        assert torch.equal(e[name], whole[name][:, 1:2])
    assert torch.equal(seen[0], whole["pattern", 1])


def test_edits_are_seen():
    """What the cache holds is what the model went on with, and choosing changes nothing of that."""
    model, tokens = lens.load(tiny_gpt2()), random_tokens(2, 9)
    halved = [(("pattern", 1), lambda p, hook: p * 0.5)]
    expected = model.run_with_hooks(tokens, fwd_hooks=halved)
    with model.hooks(fwd_hooks=halved):
        logits, _ = model.run_with_cache(tokens, names_filter="pattern", heads=1, pos_slice=-1)
    assert torch.equal(logits, expected)
    with model.hooks(fwd_hooks=[("q", lambda q, hook: q * 2), (("pattern", 1), lambda p, hook: p * 0.5)]):
        whole, some = both(model, tokens, heads=HEADS, pos_slice=ROWS)
    for name in whole:
        close(some[name], whole[name][:, HEADS][:, :, ROWS])


@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize("names", ["pattern", "attn_scores"])
def test_memory_is_what_was_asked_for(names, eager):
    """One head and a few rows of 12 heads and 1,500 positions: no more than a plain run, rows of one head aside.

    HF's eager attention computes all cells itself; then nothing is added to it but what is kept.
    """
    n_pos, n_heads = 1500, 12
    config = GPT2Config(vocab_size=50, n_positions=n_pos, n_embd=24, n_layer=1, n_head=n_heads, use_cache=False)
    model = lens.load(GPT2LMHeadModel(config).eval())
    if eager:
        model.hf_model.set_attn_implementation("eager")
    tokens = random_tokens(1, n_pos)
    square = n_pos * n_pos * 4
    rows = list(range(0, n_pos, 100))
    gc.collect()
    with torch.no_grad():
        plain = live_bytes(lambda: model(tokens, return_type=None), model)

        def peak(**chosen):
            return live_bytes(lambda: model.run_with_cache(tokens, names_filter=names, **chosen), model) - plain

        if eager:
            assert peak(heads=3, pos_slice=rows) < square * n_heads * 2
            return
        row = n_pos * 4
        for chosen, cells in (
            ({"heads": 3, "pos_slice": rows}, len(rows) * row),
            ({"pos_slice": -1}, n_heads * row),
            ({"heads": 3}, square),
        ):
            assert peak(**chosen) < 6 * cells + 2**16, chosen
        assert peak() > n_heads * square


@pytest.mark.parametrize(
    ("heads", "names", "message"),
    [
        (3, "pattern", r"heads=3 names a head that is not there: the model has 3 \(0 to 2\)"),
        ([0, -4], "pattern", r"heads=\[0, -4\] names a head that is not there"),
        ([], "pattern", r"heads are an int, a slice, or some ints; got \[\]"),
        ("all", "pattern", "heads are an int, a slice, or some ints; got 'all'"),
        (1, "z", "heads=1 chooses heads of scores and patterns, and the names to keep have none"),
        (slice(3, 3), "pattern", "names a head that is not there"),
    ],
)
def test_mistakes_are_named(heads, names, message):
    """Heads that are not there, and nothing to choose from."""
    model = lens.load(tiny_gpt2())
    with pytest.raises(ArgumentError, match=message):
        model.run_with_cache(random_tokens(), names_filter=names, heads=heads)


def test_state_space_models_have_no_heads_to_choose():
    """The message says so."""
    model = lens.load("toy:mamba")
    with pytest.raises(ArgumentError, match="chooses heads of scores and patterns"):
        model.run_with_cache(random_tokens(), heads=0)
