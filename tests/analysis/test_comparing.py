"""Two models compared, against both run text by text, with everything written out."""

import copy

import pytest
import torch
from analysis.lens_subjects import FAMILIES, hf_model, loaded
from golden.tiny import random_tokens, tiny_gpt2, tiny_tokenizer
from golden.tiny_llama import tiny_llama
from golden.tiny_ssm import tiny_ssm
from lens_conformance.float64 import true_float64
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import lens_core as lens
from lens_core.analysis.comparing import compare_weights
from lens_core.analysis.logit_lens import logit_lens
from lens_core.errors import ArgumentError, EmptyInputError, UnknownHookError

ROWS = [random_tokens(1, size, seed=size)[0] for size in (5, 8, 3, 6)]


def changed(kind="gpt2", *, seed=0, size=0.02):
    """Give a model and one with noise on all its weights."""
    one, other = hf_model(kind), hf_model(kind)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in other.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_((noise * size).to(parameter.dtype))
    return (lens.load(model, tokenizer=tiny_tokenizer()) for model in (one, other))


def slow(a, b, rows, names):
    """Run every row by itself through both; give all statistics of names, positions and tokens."""
    n_pos = max(map(len, rows))
    found = {name: [[] for _ in range(n_pos)] for name in names}
    kl, probs, losses, agree, places = [[] for _ in range(n_pos)], [], [[], []], [], []
    for text, row in enumerate(rows):
        (logits_a, cache_a), (logits_b, cache_b) = (
            model.run_with_cache(row[None], names_filter=list(names)) for model in (a, b)
        )
        for name in names:
            axis = a.table[name].position_axis
            own, other = (cache[name][0].movedim(axis - 1, 0).flatten(1).detach() for cache in (cache_a, cache_b))
            own, other = (torch.where(value.isinf(), 0.0, value) for value in (own, other))
            for at in range(len(row)):
                found[name][at].append((own[at], other[at]))
        p, q = (logits[0].softmax(-1).detach() for logits in (logits_a, logits_b))
        probs.append(torch.stack([p.sum(0), q.sum(0)]))
        for at in range(len(row)):
            divergence = float((p[at] * (p[at] / q[at]).log()).sum())
            kl[at].append(divergence)
            places.append((divergence, text, at))
            agree.append(int(p[at].argmax()) == int(q[at].argmax()))
            if at + 1 < len(row):
                losses[0].append(-float(p[at, row[at + 1]].log()))
                losses[1].append(-float(q[at, row[at + 1]].log()))
    return found, kl, sum(probs) / sum(map(len, rows)), losses, agree, sorted(places, reverse=True)


def flat(lists):
    """Give the items of lists in one."""
    return [item for each in lists for item in each]


def mean(values):
    """Give the mean of numbers."""
    return sum(values) / len(values)


def relative(pairs):
    """Give the norm of all differences over that of all first values."""
    off = sum(float((other - own).norm() ** 2) for own, other in pairs)
    return (off / sum(float(own.norm() ** 2) for own, _ in pairs)) ** 0.5


NAMES = ("hook_embed", "blocks.1.attn.hook_attn_scores", "blocks.1.attn.hook_z", "blocks.2.hook_resid_post")


@pytest.mark.parametrize("batch_size", [1, 3])
def test_every_number_is_that_of_texts_one_by_one(batch_size):
    """Hook points, positions, divergences, probabilities, losses and places, whatever the batches and padding."""
    a, b = changed()
    ours = lens.compare(a, b, iter(ROWS), names=list(NAMES), batch_size=batch_size, contexts=4)
    found, kl, probs, losses, agree, places = slow(a, b, ROWS, NAMES)
    assert ours.names == NAMES
    for index, name in enumerate(NAMES):
        every = [pair for pairs in found[name] for pair in pairs]
        cosines = [[float(torch.cosine_similarity(*pair, dim=0)) for pair in pairs] for pairs in found[name]]
        assert float(ours.relative[index]) == pytest.approx(relative(every), rel=1e-6)
        assert float(ours.cosine[index]) == pytest.approx(mean(flat(cosines)), rel=1e-6)
        assert ours.relative_by_pos[index].tolist() == pytest.approx([relative(pairs) for pairs in found[name]])
        assert ours.cosine_by_pos[index].tolist() == pytest.approx([mean(each) for each in cosines])
    assert ours.kl == pytest.approx(mean(flat(kl)))
    assert ours.kl_by_pos.tolist() == pytest.approx([mean(each) for each in kl])
    torch.testing.assert_close(ours.probs, probs)
    assert ours.losses == (pytest.approx(mean(losses[0])), pytest.approx(mean(losses[1])))
    assert ours.agreement == mean(agree)
    assert [(one.text, one.pos) for one in ours.contexts] == [(text, at) for _, text, at in places[:4]]
    first = ours.contexts[0]
    assert first.kl == pytest.approx(places[0][0])
    assert first.before == "".join(f"w{int(token)}" for token in ROWS[first.text][: first.pos + 1])
    assert first.top_b == f"w{int(b(ROWS[first.text][None])[0, first.pos].argmax())}"


@pytest.mark.parametrize("kind", [*FAMILIES, "gemma2"])
def test_a_model_is_like_itself(kind):
    """On every family: no difference, cosine 1, divergence 0, the same bits."""
    model = loaded(kind)
    with true_float64():
        found = lens.compare(model, model, ROWS)
    assert found.relative.max() == 0
    assert float((found.cosine - 1).abs().max()) < 1e-9
    assert (found.kl, found.agreement) == (0.0, 1.0)
    assert found.losses[0] == found.losses[1]
    assert found.prob_change.abs().max() == 0
    assert all(change.relative == 0 for change in found.weights)


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_change_shows_from_its_layer_on(kind):
    """One changed weight of block 1: nothing before it differs, everything after it does, and the weight is found."""
    one = hf_model(kind)
    other = copy.deepcopy(one)
    name = next(name for name, value in one.named_parameters() if ".1." in name and value.ndim == 2)
    with torch.no_grad():
        dict(other.named_parameters())[name].mul_(1.5)
    a, b = lens.load(one), lens.load(other)
    found = lens.compare(a, b, torch.stack([row[:3] for row in ROWS]))
    for layer, point, value in zip(found.layers, found.names, found.relative, strict=True):
        touched = layer is not None and layer >= 1
        assert (value > 1e-6) == touched, point
    assert [change.name for change in found.weights if change.change] == [name]
    best = found.top_weights(1)[0]
    assert (best.name, best.layer) == (name, 1)
    assert best.relative == pytest.approx(0.5)


def test_weights_are_compared_by_frobenius_norms():
    """Of each parameter, written out; zeros that changed are infinitely far."""
    a, b = changed()
    theirs = dict(b.hf_model.named_parameters())
    for change in compare_weights(a, b):
        own = dict(a.hf_model.named_parameters())[change.name].detach()
        expected = ((theirs[change.name].detach() - own) ** 2).sum().sqrt() / (own**2).sum().sqrt()
        assert change.relative == pytest.approx(float(expected))
    with torch.no_grad():
        a.hf_model.transformer.ln_f.bias.zero_()
    assert lens.compare(a, b, ROWS, weights=True).top_weights(1)[0].name == "transformer.ln_f.bias"
    assert lens.compare(a, b, ROWS, weights=False).weights == ()


def test_half_precision_and_two_dtypes():
    """A bfloat16 copy is near, in every statistic, and its weights to its rounding."""
    one = tiny_gpt2()
    a, b = lens.load(one), lens.load(copy.deepcopy(one).to(torch.bfloat16))
    found = lens.compare(a, b, ROWS)
    assert 0 < float(found.relative.max()) < 0.05
    assert 0 < found.kl < 1e-2
    assert 0 < max(change.relative for change in found.weights) < 2**-8


def test_what_is_no_number_is_not_hidden():
    """A model that breaks at one position has no divergence, rather than none."""
    a, b = lens.load(tiny_gpt2()), lens.load(tiny_gpt2())
    with torch.no_grad():
        b.hf_model.transformer.wte.weight[int(ROWS[0][2])] = torch.nan
    found = lens.compare(a, b, [ROWS[0]])
    assert found.kl != found.kl
    assert bool(found.relative.isnan().any())
    lensed = logit_lens(b, ROWS[0][None])
    assert bool(lensed.kl[:, 0, 2].isnan().all())
    assert bool(lensed.entropy[0, 0, 2].isnan())


def test_one_batch_is_held_at_a_time():
    """An endless stream of texts is read a batch at a time, and values of the second model are not kept."""
    a, b = changed()
    read = []

    def texts():
        for index in range(100):
            read.append(index)
            if index == 7:
                raise KeyboardInterrupt
            yield ROWS[index % 4]

    seen = []
    plain = a.run_with_cache
    a.run_with_cache = lambda *args, **options: seen.append(len(read)) or plain(*args, **options)
    with pytest.raises(KeyboardInterrupt):
        lens.compare(a, b, texts(), batch_size=2)
    assert seen == [2, 4, 6]


# ---------------------------------------------------------------------- what is shown


def test_tables_and_pictures():
    """Each table has its rows; the page shows tokens and weights; tops are sorted."""
    a, b = changed(size=0.1)
    found = lens.compare(a, b, ["w3 w4 w5 w6", "w1 w2"])
    frame = found.to_dataframe()
    assert frame.name.tolist() == list(found.names)
    assert frame[frame.name == "blocks.1.hook_mlp_out"].layer.tolist() == [1]
    assert found.top(1) == [(frame.loc[frame.relative.idxmax()]["name"], pytest.approx(frame.relative.max()))]
    positions = found.to_dataframe("positions")
    assert len(positions) == len(found.names) * found.relative_by_pos.shape[1]
    tokens = found.to_dataframe("tokens").set_index("token")
    token, change = found.top_tokens(1)[0]
    assert change == pytest.approx(tokens.change[token])
    assert abs(change) == pytest.approx(tokens.change.abs().max())
    assert tokens.prob_a.sum() == pytest.approx(1.0)
    assert found.to_dataframe("contexts").kl.is_monotonic_decreasing
    assert found.to_dataframe("weights").relative.max() == pytest.approx(found.top_weights(1)[0].relative)
    html = found.page().html
    for expected in ("KL of the next token", "layer 2", "outside", "hook_mlp_out", token, found.top_weights(1)[0].name):
        assert expected in html
    assert "Two models compared" in found._repr_html_()
    with pytest.raises(ArgumentError, match="table is one of"):
        found.to_dataframe("layers")


# ---------------------------------------------------------------------- refusals


def other_tokenizer(names):
    """Give a tokenizer of other words, or of the same in another order of ids."""
    backend = Tokenizer(models.WordLevel({name: at for at, name in enumerate(names)}, unk_token=names[0]))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def test_models_that_do_not_correspond_are_refused():
    """By type, size and vocabulary; by how they read a text."""
    base = lens.load(tiny_gpt2(), tokenizer=tiny_tokenizer())
    with pytest.raises(ArgumentError, match="types 'gpt2' and 'llama'"):
        lens.compare(base, lens.load(tiny_llama()), ROWS)
    with pytest.raises(ArgumentError, match="differ in n_layers: 3 and 2"):
        lens.compare(base, lens.load(tiny_gpt2(n_layer=2)), ROWS)
    with pytest.raises(ArgumentError, match="differ in d_vocab: 29 and 31"):
        lens.compare(base, lens.load(tiny_gpt2(vocab_size=31)), ROWS)
    words = [f"v{index}" for index in range(29)]
    with pytest.raises(ArgumentError, match="different vocabularies"):
        lens.compare(base, lens.load(tiny_gpt2(), tokenizer=other_tokenizer(words)), ROWS)
    without_bos = lens.load(tiny_gpt2(), tokenizer=other_tokenizer([*(f"w{index}" for index in range(28)), "<s>"]))
    without_bos.tokenizer.backend_tokenizer.normalizer = None
    without_bos.tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Split("9", "removed")
    with pytest.raises(ArgumentError, match="the tokenizers read 'w3 w4' as"):
        lens.compare(base, without_bos, ["w3 w4"])
    lens.compare(base, lens.load(tiny_gpt2()), ["w3 w4"])  # one tokenizer is enough
    lens.compare(lens.load(tiny_gpt2()), base, "w3 w4")


def test_what_cannot_be_compared_is_refused():
    """Names, modes and texts."""
    a = lens.load(tiny_gpt2(), tokenizer=tiny_tokenizer())
    with pytest.raises(ArgumentError, match="none of these hook points holds floating"):
        lens.compare(a, a, ROWS, names="hook_tokens")
    with pytest.raises(ArgumentError, match="has no positions to compare by"):
        lens.compare(a, a, ROWS, names="hf.transformer.h.0.output")
    with pytest.raises(UnknownHookError):
        lens.compare(a, a, ROWS, names="hook_nothing")
    with pytest.raises(ArgumentError, match="texts are strings, or rows"):
        lens.compare(a, a, 3)
    with pytest.raises(EmptyInputError, match="no texts"):
        lens.compare(a, a, [])
    with pytest.raises(ArgumentError, match="training mode"):
        lens.compare(a, lens.load(tiny_gpt2().train()), ROWS)
    assert lens.compare(a, a, [3, 1, 4]).kl_by_pos.shape == (3,)  # one row of ids
    ssm = lens.load(tiny_ssm("mamba"))
    assert lens.compare(ssm, ssm, ROWS, names="ssm_state").relative.max() == 0
