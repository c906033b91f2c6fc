"""Weight views against the activations that they define, recomputed head by head in float64."""

import contextlib

import pytest
import torch
from golden.tiny import random_tokens, tiny_gpt2
from golden.tiny_llama import tiny_llama
from golden.tiny_ssm import tiny_ssm
from lens_conformance.families import known_families
from lens_conformance.float64 import true_float64
from transformers import AutoConfig, AutoModelForCausalLM

import lens_core as lens
from lens_core.errors import WeightError

TOKENS = random_tokens(2, 6)
SEQUENTIAL = ("gpt2", "llama", "gemma2", "phi3", "qwen3_moe", "gpt_oss", "stablelm", "granite", "opt", "gpt_bigcode")
HYBRID = ("bamba", "falcon_h1", "nemotron_h")
SSM = ("mamba", "mamba2")


@contextlib.contextmanager
def float64():
    """Build and run in float64, float32 taken for it."""
    torch.set_default_dtype(torch.float64)
    try:
        with true_float64():
            yield
    finally:
        torch.set_default_dtype(torch.float32)


def by_kit(model_type, **fields):
    """Give a tiny model of a type that the kit knows, noise in every parameter."""
    family = known_families()[model_type]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **{**family.config, **fields}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(family.noise(name, parameter))
    if hasattr(model.config, "num_experts_per_tok"):
        model.set_experts_implementation("eager")
    return model.eval()


def tiny(name):
    """Give a tiny HF model in float64."""
    with float64():
        if name in SSM:
            return tiny_ssm(name, dtype=torch.float64)
        if name == "gpt2":
            return tiny_gpt2(dtype=torch.float64)
        if name in ("opt", "gpt_bigcode", *HYBRID):
            return by_kit(name)
        if name == "granite":  # the one with a factor on its branches, and biases in them
            return tiny_llama(name, attention_bias=True, mlp_bias=True)
        return tiny_llama(name, attn="eager" if name in ("gemma2", "gpt_oss") else "sdpa")


@pytest.fixture(scope="module", params=(*SEQUENTIAL, *HYBRID, *SSM))
def run(request):
    """Give a model and all its activations on one text."""
    model = lens.load(tiny(request.param))
    with float64(), torch.no_grad():
        _, cache = model.run_with_cache(TOKENS, names_filter=[*model.table])
    return model, cache


def same(made, expected):
    """Equal to float64's rounding of sums this long."""
    assert made.dtype == expected.dtype == torch.float64
    torch.testing.assert_close(made, expected, rtol=1e-9, atol=1e-9)


def heads_of(model, cache, layer):
    """Give what attention of a block reads, or None."""
    if f"blocks.{layer}.attn.hook_z" not in cache:
        return None
    name = f"blocks.{layer}.ln1.hook_out"
    return cache[name] if name in cache else cache[f"blocks.{layer}.hook_resid_pre"]


def test_embeddings_and_unembedding(run):
    """Rows of W_E, but for the type's scale; rows of W_pos; W_U with b_U."""
    model, cache = run
    scale = {"gemma2": model.cfg.d_model**0.5}.get(model.cfg.model_type, model.declaration.embed_scale)
    same(cache["hook_embed"], model.W_E[TOKENS] * scale)
    if "W_pos" in model.weight_names:
        same(cache["hook_pos_embed"], model.W_pos[torch.arange(6)].expand(2, 6, -1))
        assert model.W_pos.shape == (model.cfg.n_ctx, model.cfg.d_model)
        assert torch.equal(model.W_E_pos, torch.cat([model.W_E, model.W_pos]))
    else:
        with pytest.raises(WeightError, match="no embedding of their own"):
            _ = model.W_E_pos
    same(cache["unembed.hook_out"], cache["unembed.hook_in"] @ model.W_U + model.b_U)


def test_heads(run):
    """Queries, keys and values of each head, and what it writes; the stack's rows are the layers' views."""
    model, cache = run
    for layer in range(model.cfg.n_layers):
        x = heads_of(model, cache, layer)
        if x is None:
            continue
        for part in "QKV":
            weight, bias = model.weight(f"W_{part}", layer), model.weight(f"b_{part}", layer)
            made = cache[f"blocks.{layer}.attn.hook_{part.lower()}"]
            for head in range(made.shape[2]):
                same(made[:, :, head], x @ weight[head] + bias[head])
            layers, stack = model.stacked_weight(f"W_{part}")
            assert torch.equal(stack[layers.index(layer)], weight)
        W_O, z = model.weight("W_O", layer), cache[f"blocks.{layer}.attn.hook_z"]
        written = [z[:, :, head] @ W_O[head] for head in range(z.shape[2])]
        same(cache[f"blocks.{layer}.attn.hook_result"], torch.stack(written, 2))
        same(cache[f"blocks.{layer}.attn.hook_out"], sum(written) + model.weight("b_O", layer))


def test_OV_is_what_a_head_writes(run):
    """Result = pattern (x OV + b_V W_O): the whole circuit of each query head, grouped values included."""
    model, cache = run
    for layer in range(model.cfg.n_layers):
        x = heads_of(model, cache, layer)
        if x is None:
            continue
        OV, W_O, b_V = (
            model.factored_weight("OV", layer),
            model.weight("W_O", layer),
            model.weight("b_V", layer),
        )
        pattern = cache[f"blocks.{layer}.attn.hook_pattern"]
        assert OV.shape == (model.cfg.n_heads, model.cfg.d_model, model.cfg.d_model)
        for head in range(model.cfg.n_heads):
            group = head // (model.cfg.n_heads // len(b_V))
            moved = x @ OV[head].AB + b_V[group] @ W_O[head]
            same(cache[f"blocks.{layer}.attn.hook_result"][:, :, head], pattern[:, head] @ moved)


SCALES = {"gemma2": 7**-0.5}  # query_pre_attn_scalar


def test_QK_is_the_score_at_distance_zero(run):
    """A token's score for itself, which no rotation changes: x QK x^T, and what the biases add, over sqrt(d_head)."""
    model, cache = run
    kind = model.cfg.model_type
    for layer in range(model.cfg.n_layers):
        x = heads_of(model, cache, layer)
        if x is None or f"blocks.{layer}.attn.hook_q_normed" in cache:
            continue
        QK, W_Q, W_K = (model.factored_weight("QK", layer), model.weight("W_Q", layer), model.weight("W_K", layer))
        b_Q, b_K = model.weight("b_Q", layer), model.weight("b_K", layer)
        scores = cache[f"blocks.{layer}.attn.hook_attn_scores"].diagonal(dim1=-2, dim2=-1)
        factor = SCALES.get(kind, getattr(model.hf_model.config, "attention_multiplier", model.cfg.d_head**-0.5))
        factor *= getattr(model.hf_model.config, "key_multiplier", 1.0)
        for head in range(model.cfg.n_heads):
            group = head // (model.cfg.n_heads // len(b_K))
            made = ((x @ QK[head].AB) * x).sum(-1) + x @ W_Q[head] @ b_K[group] + x @ W_K[group] @ b_Q[head]
            made = (made + b_Q[head] @ b_K[group]) * factor
            if kind == "gemma2":
                made = 2.0 * torch.tanh(made / 2.0)  # attn_logit_softcapping
            same(scores[:, head], made)


@pytest.mark.parametrize("run", ["gpt2", "opt", "gpt_bigcode"], indirect=True)
def test_every_score_of_a_model_without_rotations_is_QK(run):
    """Where positions are added to the stream, for every pair of tokens."""
    model, cache = run
    QK, (_, W_Q), (_, W_K) = model.QK, model.stacked_weight("W_Q"), model.stacked_weight("W_K")
    for layer in range(model.cfg.n_layers):
        x, b_Q, b_K = cache["ln1.hook_out", layer], model.b_Q[layer], model.b_K[layer]
        for head in range(model.cfg.n_heads):
            group = head // (model.cfg.n_heads // len(b_K))
            made = x @ QK[layer, head].AB @ x.mT
            made = made + (x @ W_Q[layer, head] @ b_K[group])[:, :, None] + (x @ W_K[layer, group] @ b_Q[head])[:, None]
            made = (made + b_Q[head] @ b_K[group]) * model.cfg.d_head**-0.5
            shown = torch.ones(6, 6, dtype=torch.bool).tril()
            same(cache["attn_scores", layer][:, head][:, shown], made[:, shown])


def test_dense_MLPs(run):
    """The projections into and out of the hidden layer."""
    model, cache = run
    names = model.weight_names
    for layer in range(model.cfg.n_layers):
        at = f"blocks.{layer}.mlp.hook_"
        if f"{at}post" not in cache:
            continue
        x, is_gated = cache[f"{at}in"], "W_gate" in names
        up = x @ model.weight("W_in", layer) + model.weight("b_in", layer)
        same(cache[f"{at}pre_linear" if is_gated else f"{at}pre"], up)
        if is_gated:
            same(cache[f"{at}pre"], x @ model.weight("W_gate", layer) + model.weight("b_gate", layer))
        out = cache[f"{at}post"] @ model.weight("W_out", layer) + model.weight("b_out", layer)
        same(cache[f"{at}out"], out)


def gpt_oss_gate(gate, up):
    """HF's `GptOssExperts._apply_gate`."""
    gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
    return (up + 1) * gate * torch.sigmoid(gate * 1.702)


def test_experts(run):
    """What each chosen expert returns for each token, one at a time."""
    model, cache = run
    kind = model.cfg.model_type
    for layer in range(model.cfg.n_layers):
        at = f"blocks.{layer}.mlp.hook_"
        if f"{at}expert_out" not in cache:
            continue
        own = {n: model.weight(n, layer) for n in model.weight_names if n.startswith(("W_expert", "b_expert"))}
        assert own["W_expert_in"].shape[:2] == (model.cfg.n_experts, model.cfg.d_model)
        x, chosen, made = cache[f"{at}in"], cache[f"{at}expert_indices"], cache[f"{at}expert_out"]
        for row in range(2):
            for pos in range(6):
                for place, expert in enumerate(chosen[row, pos].tolist()):

                    def through(name, value, expert=expert, own=own):
                        bias = own.get(f"b_expert_{name}")
                        return value @ own[f"W_expert_{name}"][expert] + (0 if bias is None else bias[expert])

                    up = through("in", x[row, pos])
                    if kind == "gpt_oss":
                        inside = gpt_oss_gate(through("gate", x[row, pos]), up)
                    elif kind == "nemotron_h":
                        inside = up.relu().square()
                    else:
                        inside = torch.nn.functional.silu(through("gate", x[row, pos])) * up
                    same(made[row, pos, place], through("out", inside))


def test_mixers(run):
    """Every projection of a state-space mixer, its convolution written as a sum, decay and skip."""
    model, cache = run
    for layer in range(model.cfg.n_layers):
        at = f"blocks.{layer}.mixer.hook_"
        if f"{at}gated" not in cache:
            continue

        def own(name, layer=layer):
            return model.weight(name, layer)

        norm = next(n for n in ("norm", "ln1") if f"blocks.{layer}.{n}.hook_out" in cache)
        same(cache[f"{at}in_proj"], cache[f"blocks.{layer}.{norm}.hook_out"] @ own("W_in_proj") + own("b_in_proj"))
        kernel, u = own("W_conv"), cache[f"{at}conv_in"]
        width = kernel.shape[-1]
        for pos in range(6):
            taps = [kernel[:, width - 1 - back] * u[:, pos - back] for back in range(min(width, pos + 1))]
            same(cache[f"{at}conv"][:, pos], sum(taps) + own("b_conv"))
        delta, A, x = cache[f"{at}delta"], own("A"), cache[f"{at}ssm_input"]
        assert torch.equal(A, -own("A_log").exp())
        if "W_x" in model.weight_names:
            same(cache[f"{at}x_proj"], x @ own("W_x"))
            same(cache[f"{at}decay"], (delta[..., None] * A).exp())
            if f"blocks.{layer}.mixer.dt_norm.hook_scale" not in cache:
                low = cache[f"{at}x_proj"][..., : model.cfg.dt_rank]
                same(cache[f"{at}delta_pre"], low @ own("W_dt") + own("b_dt"))
            same(cache[f"{at}ssm_output"], cache[f"{at}y"] + own("D") * x)
        else:
            same(cache[f"{at}delta_pre"], cache[f"{at}in_proj"][..., -len(A) :] + own("b_dt"))
            same(cache[f"{at}decay"], (delta * A).exp())
            same(cache[f"{at}ssm_output"], cache[f"{at}y"] + own("D")[:, None] * x)
        out = cache[f"{at}gated"] @ own("W_out_proj") + own("b_out_proj")
        same(cache[f"blocks.{layer}.hook_mixer_out"], out * model.declaration.factor_of("hook_mixer_out"))


def test_accumulated_bias_is_what_is_left_when_nothing_is_active(run):
    """The stream at every block and every MLP, with all heads, neurons, experts and channels at zero."""
    model = run[0]
    silenced = ("attn.hook_z", "mlp.hook_post", "mlp.hook_expert_out", "mixer.hook_gated", "mlp.hook_expert_weights")
    entries = [
        (name, lambda value, hook: torch.zeros_like(value))
        for name in model.table
        if name.partition(".")[2].partition(".")[2] in silenced
    ]
    shared = [f"hf.{name}.output" for name, _ in model.hf_model.named_modules() if name.endswith("shared_experts")]
    entries += [(name, lambda value, hook: torch.zeros_like(value)) for name in shared]
    with float64(), torch.no_grad():
        with model.hooks(fwd_hooks=entries):
            _, quiet = model.run_with_cache(TOKENS)
    embedded = sum(quiet[name] for name in model.declaration.embeddings)
    for layer in range(model.cfg.n_layers):
        added = quiet[f"blocks.{layer}.hook_resid_pre"] - embedded
        same(model.accumulated_bias(layer).expand_as(added), added)
        if f"blocks.{layer}.hook_resid_mid" in quiet:
            added = quiet[f"blocks.{layer}.hook_resid_mid"] - embedded
            same(model.accumulated_bias(layer, mlp_input=True).expand_as(added), added)
    whole = quiet[f"blocks.{model.cfg.n_layers - 1}.hook_resid_post"] - embedded
    for end in (None, -1, model.cfg.n_layers):
        same(model.accumulated_bias(end).expand_as(whole), whole)
