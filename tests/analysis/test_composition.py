"""Composition scores against dense matrices, one pair of heads at a time, in float64."""

import pytest
import torch
from golden.tiny import tiny_gpt2
from golden.tiny_llama import tiny_llama
from golden.tiny_ssm import tiny_ssm
from lens_conformance.families import known_families
from transformers import AutoConfig, AutoModelForCausalLM

import lens_core as lens
from lens_core import FactoredMatrix
from lens_core.analysis.composition import composition_scores
from lens_core.errors import ArgumentError, WeightError

MODES = ("Q", "K", "V")


def draw(*shape, seed=0):
    """Give random numbers in float64."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def slow(left, right):
    """One pair: the definition."""
    return (torch.linalg.matrix_norm(left @ right) / torch.linalg.matrix_norm(left)) / torch.linalg.matrix_norm(right)


def gpt2_parts(hf, layer, head):
    """Give ln1's gain and the four weights of one head, cut out of HF's own tensors by hand."""
    block, d = hf.transformer.h[layer], hf.config.n_embd
    e = d // hf.config.n_head
    fused = block.attn.c_attn.weight.data
    at = slice(head * e, (head + 1) * e)
    query, key, value = (fused[:, part * d : (part + 1) * d][:, at] for part in range(3))
    return block.ln_1.weight.data, query, key, value, block.attn.c_proj.weight.data[at]


def llama_parts(hf, layer, head):
    """The same of Llama, whose heads share keys and values in pairs; no bias, no centring."""
    block, e = hf.model.layers[layer], hf.config.head_dim
    own, shared = slice(head * e, (head + 1) * e), slice(head // 2 * e, (head // 2 + 1) * e)
    attn = block.self_attn
    query, key, value = attn.q_proj.weight.data[own], attn.k_proj.weight.data[shared], attn.v_proj.weight.data[shared]
    return block.input_layernorm.weight.data, query.T, key.T, value.T, attn.o_proj.weight.data[:, own].T


def gemma2_parts(hf, layer, head):
    """The same of Gemma 2: gains are 1 + weight, and a norm stands behind W_O."""
    gain, *weights, out = llama_parts(hf, layer, head)
    return 1 + gain, *weights, out * (1 + hf.model.layers[layer].post_attention_layernorm.weight.data)


def centring(size):
    """The matrix that takes the mean away."""
    return torch.eye(size, dtype=torch.float64) - 1 / size


def dense(parts, mode, *, with_norms, centres):
    """Give what one head writes and what it reads as full matrices."""
    gain, query, key, value, out = (part.double() for part in parts)
    before = torch.diag(gain) if with_norms else torch.eye(len(gain), dtype=torch.float64)
    C = centring(len(gain)) if centres and with_norms else torch.eye(len(gain), dtype=torch.float64)
    writes = C @ before @ value @ out @ C
    reads = {"Q": query @ key.T, "K": key @ query.T}
    return writes, writes if mode == "V" else C @ before @ reads[mode] @ before @ C


MODELS = {
    "gpt2": (lambda: tiny_gpt2(dtype=torch.float64), gpt2_parts, True),
    "llama": (lambda: tiny_llama("llama").double(), llama_parts, False),
    "gemma2": (lambda: tiny_llama("gemma2", attn="eager").double(), gemma2_parts, False),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("with_norms", [True, False])
@pytest.mark.parametrize("kind", MODELS)
def test_scores_are_those_of_the_dense_matrices(kind, with_norms, mode):
    """Every pair of heads; zero where the reader is not in a later block."""
    make, parts, centres = MODELS[kind]
    hf = make()
    model = lens.load(hf)
    found = model.all_composition_scores(mode, with_norms=with_norms)
    assert found.scores.dtype == torch.float64
    heads = [(layer, head) for layer in range(3) for head in range(model.cfg.n_heads)]
    if kind == "gemma2" and not with_norms:
        parts = llama_parts
    sides = {h: dense(parts(hf, *h), mode, with_norms=with_norms, centres=centres) for h in heads}
    for a in heads:
        for b in heads:
            expected = slow(sides[a][0], sides[b][1]) if b[0] > a[0] else torch.zeros((), dtype=torch.float64)
            torch.testing.assert_close(found.scores[(*a, *b)], expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("mode", MODES)
def test_scores_do_not_change_when_norms_are_folded(mode):
    """What is folded into the weights is what was multiplied in before; then the bare weights give the same."""
    model = lens.load(tiny_gpt2(dtype=torch.float64))
    before = model.all_composition_scores(mode).scores
    bare = model.all_composition_scores(mode, with_norms=False).scores
    assert (before - bare).abs().max() > 1e-3
    model.process_weights(fold_ln=True, center_writing_weights=True, center_unembed=False, fold_value_biases=False)
    for with_norms in (True, False):
        after = model.all_composition_scores(mode, with_norms=with_norms).scores
        torch.testing.assert_close(after, before, rtol=1e-9, atol=1e-12)


def test_all_pairs_of_any_leading_axes():
    """Factored or not, also where a matrix is wider than it is high."""
    left, right = FactoredMatrix(draw(2, 3, 9, 4), draw(2, 3, 4, 7, seed=1)), draw(5, 7, 11, seed=2)
    found = composition_scores(left, right)
    assert found.shape == (2, 3, 5)
    for i in range(2):
        for j in range(3):
            for k in range(5):
                torch.testing.assert_close(found[i, j, k], slow(left[i, j].AB, right[k]))
    torch.testing.assert_close(composition_scores(draw(9, 7), draw(7, 2)), slow(draw(9, 7), draw(7, 2)))
    torch.testing.assert_close(
        composition_scores(draw(9, 7), FactoredMatrix(draw(7, 20), draw(20, 3))),
        slow(draw(9, 7), draw(7, 20) @ draw(20, 3)),
    )


def test_many_pairs_are_done_in_parts(monkeypatch):
    """The same numbers, however few products are held at once."""
    left, right = FactoredMatrix(draw(7, 9, 4), draw(7, 4, 7, seed=1)), draw(5, 7, 11, seed=2)
    whole = composition_scores(left, right)
    monkeypatch.setattr("lens_core.analysis.composition._MOST_ELEMENTS", 500)
    torch.testing.assert_close(composition_scores(left, right), whole)


def test_one_direction_handed_on_whole_scores_1_and_none_0():
    """By hand: what is written along e1 and read along e1, or along e2."""
    e = torch.eye(4)
    writes = FactoredMatrix(draw(4, 1).float(), e[1:2])
    along, across = (FactoredMatrix(e[:, i : i + 1], draw(1, 4).float()) for i in (1, 2))
    assert float(composition_scores(writes, along)) == pytest.approx(1.0)
    assert float(composition_scores(writes, across)) == pytest.approx(0.0)
    assert float(composition_scores(writes * 0, along)) == 0.0


def test_the_baseline_is_what_random_turns_give():
    """Root mean square over 400 turns of one matrix against another: 1/sqrt(d), to three standard errors."""
    left, right = draw(6, 16) * torch.logspace(0, -2, 16, dtype=torch.float64), draw(16, 5, seed=1)
    turns = torch.linalg.qr(draw(400, 16, 16, seed=2)).Q
    squares = composition_scores(left @ turns, right).square()
    error = 3 * float(squares.std()) / 20
    assert float(squares.mean()) == pytest.approx(1 / 16, abs=error)
    assert lens.load(tiny_gpt2()).all_composition_scores("Q").baseline == pytest.approx(21**-0.5)


def test_a_record_tells_its_heads_and_its_largest():
    """Labels in the order of the axes; pairs of later blocks only, once each."""
    found = lens.load(tiny_gpt2()).all_composition_scores("K")
    assert found.head_labels[:4] == ["L0H0", "L0H1", "L0H2", "L1H0"]
    assert found.layer_indices == (0, 1, 2)
    writer, reader, score = found.top(1)[0]
    assert score == float(found.scores.max())
    a, b = (found.head_labels.index(label) for label in (writer, reader))
    assert float(found.table[a, b]) == score
    frame = found.to_dataframe()
    assert len(frame) == len(found.top(1000)) == 27  # 3 pairs of layers, 3 x 3 heads
    assert set(frame.columns) == {"writer", "reader", "score"}
    assert "L2H1" in found._repr_html_()
    assert found.top(0) == []


def test_a_hybrid_has_scores_between_its_blocks_with_attention():
    """And says which they are."""
    family = known_families()["bamba"]
    config = AutoConfig.for_model("bamba", **{**family.config, "attn_layer_indices": [0, 2]})
    model = lens.load(AutoModelForCausalLM.from_config(config).eval())
    found = model.all_composition_scores("V")
    assert found.layer_indices == (0, 2)
    assert found.head_labels == model.all_head_labels
    assert found.scores.shape[:1] == found.scores.shape[2:3] == (2,)
    assert (found.scores[0, :, 1] > 0).all()
    assert not found.scores[1].any()


def test_half_precision_gives_float32():
    """The values of the halves."""
    hf = tiny_gpt2(dtype=torch.bfloat16)
    found = lens.load(hf).all_composition_scores("Q").scores
    assert found.dtype == torch.float32
    wide = lens.load(hf.float()).all_composition_scores("Q").scores
    torch.testing.assert_close(found, wide)


def test_nothing_of_the_graph_is_kept():
    """Weights are parameters; scores are numbers."""
    assert not lens.load(tiny_gpt2()).all_composition_scores("Q").scores.requires_grad


def test_what_makes_no_sense_is_refused():
    """By name."""
    with pytest.raises(WeightError, match="no block of this model has any"):
        lens.load(tiny_ssm("mamba")).all_composition_scores("Q")
    with pytest.raises(ArgumentError, match="got 'O'"):
        lens.load(tiny_gpt2()).all_composition_scores("O")
    with pytest.raises(ArgumentError, match="left .9, 7. writes 7 numbers, right .9, 7. reads 9"):
        composition_scores(draw(9, 7), draw(9, 7))
    with pytest.raises(ArgumentError, match="right is a floating tensor"):
        composition_scores(draw(9, 7), draw(7))
