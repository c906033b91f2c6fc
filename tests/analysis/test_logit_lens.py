"""The logit lens: every entry against HF's own model cut off there, statistic by statistic."""

import attrs
import pytest
import torch
from analysis.lens_subjects import FAMILIES, SPECIAL, TOKENS, cut_logits, loaded
from golden.tiny import random_tokens, tiny_gpt2, tiny_tokenizer
from lens_conformance.float64 import true_float64
from torch.distributions import Categorical, kl_divergence

import lens_core as lens
from lens_core.analysis import logit_lens as module
from lens_core.analysis.logit_lens import logit_lens
from lens_core.analysis.readout import read_vocabulary
from lens_core.errors import ArgumentError, CacheError, TokenIdError, TokenizerError, UnsupportedHookError, WeightError

N_LAYERS = 3


@pytest.fixture(scope="module")
def models():
    """Give models by kind, built when asked for."""
    built = {}

    def get(kind):
        if kind not in built:
            built[kind] = loaded(kind)
        return built[kind]

    return get


def run(model, *args, **options):
    """Run the lens in float64."""
    with true_float64():
        return logit_lens(model, *args, **options)


def close(ours, expected, tolerance=1e-9):
    """Compare to a tolerance on numbers of the order of 1."""
    torch.testing.assert_close(ours, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(
    ("kind", "chunk"), [*((kind, 4) for kind in (*FAMILIES, *SPECIAL)), ("gpt2", 29), ("gemma2", 1000)]
)
def test_every_entry_says_what_hf_cut_off_there_says(models, kind, chunk):
    """Top tokens, log-probabilities, entropy, divergence and ranks, whatever the chunk; the last is the whole model."""
    with true_float64():
        expected = torch.stack([cut_logits(kind, n_blocks) for n_blocks in range(N_LAYERS + 1)])
        found = run(models(kind), TOKENS, targets=[3, 7], top=4, chunk=chunk)
        spread = Categorical(logits=expected)
        divergence = kl_divergence(Categorical(logits=expected[-1:]), spread)
    assert found.labels == ("0_pre", "1_pre", "2_pre", "final_post")
    log_probs = expected.log_softmax(-1)
    best = log_probs.sort(-1, descending=True)
    assert torch.equal(found.top_tokens, best.indices[..., :4])
    close(found.top_log_probs, best.values[..., :4])
    close(found.entropy, spread.entropy())
    close(found.kl, divergence)
    assert float(found.kl[-1].abs().max()) < 1e-12
    assert float(found.kl[:-1].min()) > 1e-4
    close(found.target_log_probs, log_probs[..., [3, 7]])
    close(found.target_probs, expected.softmax(-1)[..., [3, 7]])
    for column, token in enumerate((3, 7)):
        rank = (best.indices == token).int().argmax(-1)
        assert torch.equal(found.target_ranks[..., column], rank)


def test_a_model_in_half_precision_is_read_in_single(models):
    """The last entry has the model's own top token and log-probability, to bfloat16's rounding of its logits."""
    model = lens.load(tiny_gpt2(dtype=torch.bfloat16))
    logits = model(TOKENS).float()
    found = logit_lens(model, TOKENS, layers=-1, chunk=7, top=1)
    assert found.entropy.dtype == torch.float32
    close(found.top_log_probs[0, ..., 0], logits.log_softmax(-1).amax(-1), 2e-2)
    close(found.entropy[0], Categorical(logits=logits).entropy(), 2e-2)


def test_targets_of_their_own_at_each_position(models):
    """The next token everywhere; one row for all rows; several a position."""
    model = models("llama")
    found = run(model, TOKENS, positions=slice(-1), targets=TOKENS[:, 1:])
    logits = torch.stack([cut_logits("llama", n) for n in range(N_LAYERS + 1)])[:, :, :-1]
    expected = logits.log_softmax(-1).gather(-1, TOKENS[None, :, 1:, None].expand(4, -1, -1, -1))
    close(found.target_log_probs, expected)
    above = (logits > logits.gather(-1, TOKENS[None, :, 1:, None].expand(4, -1, -1, -1))).sum(-1, keepdim=True)
    assert torch.equal(found.target_ranks, above)
    several = run(model, TOKENS, positions=[1], targets=torch.tensor([[[3, 7]]]))
    assert torch.equal(several.target_ranks, run(model, TOKENS, positions=[1], targets=[3, 7]).target_ranks)
    by_name = run(model, TOKENS, positions=1, targets="w3")
    assert torch.equal(by_name.target_ranks, several.target_ranks[..., :1])


def test_a_cache_a_model_and_the_method_are_one_thing(models):
    """Whole caches, caches of one row, and chosen layers and positions, middles included."""
    model = models("gpt2")
    with true_float64():
        _, cache = model.run_with_cache(TOKENS)
    whole = run(model, TOKENS, targets=3)
    for other in (run(cache, targets=3), run(model, cache=cache, targets=3), cache.logit_lens(targets=3)):
        close(other.kl, whole.kl)
        assert torch.equal(other.target_ranks, whole.target_ranks)
    some = run(cache, layers=[2, -1], positions=[4, 0], incl_mid=True)
    assert some.labels == ("2_pre", "2_mid", "final_post")
    assert some.positions == (4, 0)
    close(some.entropy[[0, 2]], whole.entropy[2:, :, [4, 0]])
    mid = model.unembed(model.ln_final(cache["resid_mid", 2]))
    close(some.entropy[1], Categorical(logits=mid.detach()).entropy()[:, [4, 0]])
    row = run(cache.apply_slice_to_batch_dim(1))
    close(row.kl[:, 0], whole.kl[:, 1])
    assert torch.equal(row.tokens, TOKENS[1:])


def test_what_a_lens_gives_is_read(models):
    """Each block's input goes through it, with its layer; what enters the final norm does not."""
    model, seen = models("gpt2"), []

    def double(stream, layer):
        seen.append(layer)
        return stream * 2.0 + 1.0

    with true_float64():
        _, cache = model.run_with_cache(TOKENS)
    found = run(model, TOKENS, lens=double)
    assert seen == [0, 1, 2]
    with torch.no_grad():
        logits = model.unembed(model.ln_final(cache["resid_pre", 1] * 2.0 + 1.0))
    close(found.entropy[1], Categorical(logits=logits).entropy())
    close(found.entropy[-1], run(model, TOKENS).entropy[-1])
    with pytest.raises(ArgumentError, match="leave out incl_mid"):
        run(model, TOKENS, lens=double, incl_mid=True)


def test_logits_exist_for_a_chunk_at_a_time(models, monkeypatch):
    """No product with the unembedding is wider than the chunk, and the run makes no logits of its own."""
    model, widths = models("gpt2"), []
    plain = torch.nn.functional.linear

    def watched(input, weight, bias=None):
        widths.append(len(weight))
        return plain(input, weight, bias)

    monkeypatch.setattr("lens_core.analysis.readout.F.linear", watched)
    run(model, TOKENS, chunk=5)
    assert set(widths) == {5, 4}  # 29 tokens


def test_equal_logits_share_a_rank_and_masked_ones_add_nothing():
    """A token counts those strictly above it; a logit of minus infinity has probability 0 and no part in the sums."""
    hf = tiny_gpt2(dtype=torch.float64)
    hf.lm_head.weight = torch.nn.Parameter(torch.zeros_like(hf.lm_head.weight))
    hf.lm_head.bias = torch.nn.Parameter(torch.zeros(29, dtype=torch.float64))
    with torch.no_grad():
        hf.lm_head.bias[3], hf.lm_head.bias[11:] = 1.0, -torch.inf
    model = lens.load(hf)
    found = logit_lens(model, TOKENS, targets=[3, 5, 7, 20], chunk=4)
    assert found.target_ranks[0, 0, 0].tolist() == [0, 1, 1, 11]
    spread = torch.tensor([1.0] + [0.0] * 10, dtype=torch.float64)
    close(found.entropy, Categorical(logits=spread).entropy().expand_as(found.entropy))
    close(found.kl, torch.zeros_like(found.kl))
    assert found.target_probs[0, 0, 0, 3] == 0


def test_the_data_frame_and_the_grid_say_the_same(models):
    """A row for each cell; the grid has the last entry at the top, each cell its token."""
    model = models("gpt2")
    found = run(model, TOKENS, targets=["w3", "w7"], positions=[1, 2])
    frame = found.to_dataframe()
    assert len(frame) == 4 * 2 * 2
    cell = frame[(frame.entry == "2_pre") & (frame.batch == 1) & (frame.pos == 2)].iloc[0]
    assert cell.token == f"w{int(TOKENS[1, 2])}"
    assert cell.top == f"w{int(found.top_tokens[2, 1, 1, 0])}"
    assert cell.kl == pytest.approx(float(found.kl[2, 1, 1]))
    assert (cell.target_0, cell.target_1) == ("w3", "w7")
    assert cell.target_1_rank == int(found.target_ranks[2, 1, 1, 1])
    alone = run(model, TOKENS, targets="w3", positions=-1).to_dataframe()
    assert {"target", "target_log_prob", "target_rank"} <= set(alone.columns)
    html = found.grid(1, shade="kl").html
    assert html.index("final_post") < html.index("0_pre")
    assert f">w{int(found.top_tokens[2, 1, 1, 0])}<" in html
    assert "final_post" in found._repr_html_()
    with pytest.raises(ArgumentError, match="shade is one of"):
        found.grid(shade="rank")


def test_without_a_tokenizer_ids_are_shown():
    """And padded ids of the vocabulary, which a tokenizer has not, are too."""
    found = logit_lens(lens.load(tiny_gpt2()), TOKENS)
    assert found.to_dataframe().token[0] == str(int(TOKENS[0, 0]))
    show = module.decoder(lens.load(tiny_gpt2(), tokenizer=tiny_tokenizer()))
    assert (show(27), show(40)) == ("w27", "40")


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"layers": 4}, ArgumentError, "a layer is 0 to 3"),
        ({"layers": []}, ArgumentError, "names none"),
        ({"positions": 6}, ArgumentError, "outside an axis of length 6"),
        ({"targets": 29}, TokenIdError, "outside the vocabulary of 29"),
        ({"targets": "w3 w4"}, TokenizerError, "w3 w4"),
        ({"targets": TOKENS[:, 1:]}, ArgumentError, "or ids \\[2, 6\\]"),
        ({"top": 0}, ArgumentError, "top is a number of tokens"),
        ({"chunk": 1.5}, ArgumentError, "chunk is a number of tokens"),
        ({"cache": "both"}, ArgumentError, "one of them"),
    ],
)
def test_a_wrong_argument_says_what_is_right(models, options, error, match):
    """And the model goes on."""
    model = models("gpt2")
    if "cache" in options:
        _, cache = model.run_with_cache(TOKENS)
        options = {"cache": cache}
    with pytest.raises(error, match=match):
        run(model, TOKENS, **options)
    with pytest.raises(ArgumentError, match="one of them"):
        run(model)


def test_a_cache_without_the_stream_or_the_model_is_refused(models):
    """It says what to cache."""
    model = models("gpt2")
    _, cache = model.run_with_cache(TOKENS, names_filter="resid_pre")
    with pytest.raises(CacheError, match="blocks.2.hook_resid_post"):
        logit_lens(cache)
    cache.model = None
    with pytest.raises(CacheError, match="needs the model"):
        logit_lens(cache)


def test_a_quantised_unembedding_is_refused():
    """By the error of the weight."""
    hf = tiny_gpt2()
    hf.lm_head.weight = torch.nn.Parameter(torch.zeros(29, 21, dtype=torch.int8), requires_grad=False)
    model = lens.load(hf)
    with pytest.raises(WeightError, match="quantised"):
        read_vocabulary(model, [torch.zeros(2, 21)])


def test_an_architecture_that_does_not_say_how_logits_are_made_is_refused(monkeypatch):
    """Rather than read without a cap that it may have."""
    model = lens.load(tiny_gpt2())
    own = attrs.evolve(model.table["hook_logits"], seam=object())
    monkeypatch.setitem(model.table._points, "hook_logits", own)
    with pytest.raises(UnsupportedHookError, match="does not say how logits are made"):
        model.finish_logits(torch.zeros(1, 29))


def test_subjects_differ():
    """Cutting blocks off changes what HF says: the reference is not blind."""
    assert not torch.allclose(cut_logits("llama", 1), cut_logits("llama", 2), atol=1e-2)
    assert TOKENS.equal(random_tokens(2, 6))
