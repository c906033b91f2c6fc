"""Singular vectors of weights read as tokens, against dense decompositions in float64."""

import pytest
import torch
from golden.tiny import tiny_gpt2, tiny_tokenizer
from golden.tiny_llama import tiny_llama
from golden.tiny_ssm import tiny_ssm

import lens_core as lens
from lens_core.analysis.singular import singular_vectors
from lens_core.errors import ArgumentError, WeightError


def centring(size):
    """The matrix that takes the mean away."""
    return torch.eye(size, dtype=torch.float64) - 1 / size


def gpt2_matrix(hf, name):
    """Give a weight of block 1 by hand, the norm before it multiplied in, and the way from the stream to logits."""
    block, d = hf.transformer.h[1], hf.config.n_embd
    C, e = centring(d), d // hf.config.n_head
    if name == "OV":
        value, out = block.attn.c_attn.weight[:, 2 * d :][:, 2 * e :], block.attn.c_proj.weight[2 * e :]
        matrix = C @ torch.diag(block.ln_1.weight) @ value @ out
    elif name == "W_in":
        matrix = C @ torch.diag(block.ln_2.weight) @ block.mlp.c_fc.weight
    else:
        matrix = block.mlp.c_proj.weight
    return matrix, C @ torch.diag(hf.transformer.ln_f.weight) @ hf.lm_head.weight.T


def gemma2_matrix(hf, name):
    """The same of Gemma 2: gains are 1 + weight, and a norm stands behind; no centring."""
    block, e = hf.model.layers[1], hf.config.head_dim
    behind = block.post_attention_layernorm if name == "OV" else block.post_feedforward_layernorm
    if name == "OV":
        value, out = block.self_attn.v_proj.weight[e : 2 * e].T, block.self_attn.o_proj.weight[:, 2 * e : 3 * e].T
        matrix = torch.diag(1 + block.input_layernorm.weight) @ value @ out @ torch.diag(1 + behind.weight)
    elif name == "W_in":
        matrix = torch.diag(1 + block.pre_feedforward_layernorm.weight) @ block.mlp.up_proj.weight.T
    else:
        matrix = block.mlp.down_proj.weight.T @ torch.diag(1 + behind.weight)
    return matrix, torch.diag(1 + hf.model.norm.weight) @ hf.lm_head.weight.T


def mamba_matrix(hf, name):
    """The same of Mamba."""
    block = hf.backbone.layers[1]
    if name == "W_in_proj":
        matrix = torch.diag(block.norm.weight) @ block.mixer.in_proj.weight.T
    else:
        matrix = block.mixer.out_proj.weight.T
    return matrix, torch.diag(hf.backbone.norm_f.weight) @ hf.lm_head.weight.T


def mamba2_matrix(hf, name):
    """The same of head 2 of Mamba-2's output, 11 channels wide."""
    matrix, unembedding = mamba_matrix(hf, name)
    return (matrix[22:33], unembedding) if name == "W_out_proj" else (matrix, unembedding)


MODELS = {
    "gpt2": (lambda: tiny_gpt2(dtype=torch.float64), gpt2_matrix),
    "gemma2": (lambda: tiny_llama("gemma2", attn="eager").double(), gemma2_matrix),
    "mamba": (lambda: tiny_ssm("mamba", dtype=torch.float64), mamba_matrix),
    "mamba2": (lambda: tiny_ssm("mamba2", dtype=torch.float64), mamba2_matrix),
}
CASES = [
    *((kind, name, side) for kind in ("gpt2", "gemma2") for name, side in (("OV", "writes"), ("OV", "reads"))),
    *((kind, name, side) for kind in ("gpt2", "gemma2") for name, side in (("W_in", "reads"), ("W_out", "writes"))),
    *((kind, "W_in_proj", "reads") for kind in ("mamba", "mamba2")),
    *((kind, "W_out_proj", "writes") for kind in ("mamba", "mamba2")),
]


@torch.no_grad()
@pytest.mark.parametrize(("kind", "name", "side"), CASES)
def test_directions_are_singular_vectors_of_the_dense_weight(kind, name, side):
    """Each is stretched by its value, and its logits are the final norm's gain and the unembedding of it."""
    make, by_hand = MODELS[kind]
    hf = make()
    matrix, unembedding = by_hand(hf, name)
    head = {"OV": 2, "W_out_proj": 2 if kind == "mamba2" else None}.get(name)
    found = singular_vectors(lens.load(hf), name, 1, head=head, side=side, num_vectors=5)
    assert found.side == side
    assert (found.layer, found.head) == (1, head)
    facing = matrix if side == "writes" else matrix.T
    torch.testing.assert_close(found.values, torch.linalg.svdvals(matrix)[:5], rtol=1e-9, atol=1e-9)
    gram = facing.T @ facing
    stretched = found.values.square()[:, None] * found.vectors
    torch.testing.assert_close(found.vectors @ gram, stretched, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(found.vectors @ found.vectors.T, torch.eye(5, dtype=torch.float64))
    torch.testing.assert_close(found.logits, found.vectors @ unembedding, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_logits_are_what_the_model_says_of_a_step_in_that_direction():
    """Through HF's own final norm and unembedding: the derivative of the logits at a stream of scale 1."""
    hf = tiny_llama("llama").double()
    model = lens.load(hf)
    found = singular_vectors(model, "OV", 0, head=1, num_vectors=2)
    vector = found.vectors[0]
    stream = vector * 1e-7
    made = model.unembed(model.ln_final(stream)) * (stream.square().mean() + model.cfg.eps).sqrt() / 1e-7
    torch.testing.assert_close(found.logits[0], made, rtol=1e-4, atol=1e-4)  # HF's norm computes in float32


@torch.no_grad()
def test_bare_weights_and_embeddings_can_be_asked_for():
    """Without the norm; and tokens by what is embedded along the direction."""
    hf = tiny_gpt2(dtype=torch.float64)
    model = lens.load(hf)
    found = singular_vectors(model, "W_in", 1, with_norms=False, through="W_E")
    matrix = hf.transformer.h[1].mlp.c_fc.weight
    torch.testing.assert_close(found.values, torch.linalg.svdvals(matrix)[:10])
    torch.testing.assert_close(found.logits, found.vectors @ hf.transformer.wte.weight.T)


def test_tokens_are_listed_from_both_ends():
    """With their text, best first; without a tokenizer by number."""
    model = lens.load(tiny_gpt2(), tokenizer=tiny_tokenizer())
    found = singular_vectors(model, "W_out", 2, num_vectors=3)
    for row, high, low in zip(found.logits, found.top(4), found.top(4, lowest=True), strict=True):
        order = row.argsort(descending=True).tolist()
        assert [token for token, _ in high] == [model.to_single_str_token(i) for i in order[:4]]
        assert [token for token, _ in low] == [model.to_single_str_token(i) for i in order[::-1][:4]]
        assert high[0][1] == float(row.max())
    frame = found.to_dataframe(4)
    assert len(frame) == 2 * 3 * 4
    assert "singular value" in found._repr_html_()
    bare = singular_vectors(lens.load(tiny_gpt2(), tokenizer=False), "W_out", 2, num_vectors=3)
    assert bare.top(1)[0][0][0] == f"id {int(bare.logits[0].argmax())}"
    assert len(bare.top(1000)[0]) == 29


def test_half_precision_is_decomposed_in_float32():
    """As are its logits."""
    found = singular_vectors(lens.load(tiny_gpt2(dtype=torch.bfloat16)), "W_in", 0)
    assert found.values.dtype == found.logits.dtype == torch.float32


def test_negative_layers_and_heads_count_from_the_end():
    """As elsewhere."""
    model = lens.load(tiny_gpt2())
    last, also = singular_vectors(model, "OV", -1, head=-1), singular_vectors(model, "OV", 2, head=2)
    assert last.layer == 2
    assert torch.equal(last.values, also.values)
    assert len(last.values) == 7  # d_head: there are no more


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"name": "W_Q"}, "one of W_out, W_out_proj, OV, .*got 'W_Q'"),
        ({"name": "OV"}, "give head="),
        ({"name": "OV", "head": 3}, "heads 0 to 2; got head=3"),
        ({"name": "W_in", "head": 0}, "W_in has no heads"),
        ({"name": "W_in", "side": "writes"}, "W_in reads the residual stream; got side='writes'"),
        ({"name": "W_in", "layer": 3}, "blocks 0 to 2; got layer=3"),
        ({"name": "W_in", "num_vectors": 0}, "1 or more; got 0"),
        ({"name": "W_in", "through": "W_V"}, "got 'W_V'"),
    ],
)
def test_what_makes_no_sense_is_refused(options, told):
    """With what there is."""
    with pytest.raises(ArgumentError, match=told):
        singular_vectors(lens.load(tiny_gpt2()), **{"layer": 0, **options})


def test_blocks_without_the_weight_and_mixers_without_heads_refuse():
    """By name."""
    model = lens.load(tiny_ssm("mamba"))
    with pytest.raises(WeightError, match="no weight 'W_in'"):
        singular_vectors(model, "W_in", 0)
    with pytest.raises(ArgumentError, match="channels and no heads"):
        singular_vectors(model, "W_out_proj", 0, head=1)
