"""lens on GPT-NeoX: what it reads is golden's, what it edits has golden's effect, and what it only reads is HF's."""

import functools
import itertools

import pytest
import torch
from families.compare import check, error, part, real_part
from families.subject import Subject, pair
from golden.tiny import pad, random_tokens
from lens_conformance.edits import edit_at, in_place, only_at, only_head
from lens_conformance.float64 import true_float64
from neox_golden import COPIES, golden, is_starred, names
from neox_tiny import VARIANTS, tiny_neox
from transformers import DynamicCache

TOKENS = random_tokens(2, 6)
TOLERANCE = 1e-9
HEADED = (*COPIES, "hook_q", "hook_k", "hook_v", "rot_q", "rot_k", "hook_z", "hook_result")


def head_axis(name):
    """Give the axis of heads."""
    return 1 if name.endswith(("scores", "pattern")) else 2 if name.endswith(HEADED) else None


@functools.lru_cache
def built(variant, attn, dtype=torch.float64):
    """Build a pair of lens and an untouched HF model, for all tests that change no parameter."""
    subject = Subject(
        name=variant,
        plugin="lens_gpt_neox",
        build=functools.partial(tiny_neox, variant),
        golden=golden,
        names=names,
        is_starred=is_starred,
        sizes=dict,
        head_axis=head_axis,
    )
    return pair(subject, dtype=dtype, attn=attn)


@pytest.fixture(params=[(variant, attn) for variant in VARIANTS for attn in ("sdpa", "eager")], ids="-".join)
def narrow(request):
    """Give a pair in float32, HF just as it is."""
    return built(*request.param, torch.float32)


@pytest.fixture(params=[(variant, attn) for variant in VARIANTS for attn in ("sdpa", "eager")], ids="-".join)
def wide(request):
    """Give a pair in true float64, and run the test in it."""
    with true_float64():
        yield built(*request.param)


@pytest.fixture(params=VARIANTS)
def wide_sdpa(request):
    """Give the same for one implementation: where the other would only take longer."""
    with true_float64():
        yield built(request.param, "sdpa")


def floating(one):
    """List the names whose value has a gradient."""
    return [name for name in one.names() if name != "hook_tokens"]


def metric(logits):
    """Weigh the logits by fixed random numbers, and bend: a scalar whose gradient is nowhere constant."""
    weight = torch.randn(logits.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return (logits * weight).sum() + (logits.pow(2) * weight.roll(1)).sum() * 0.1


# ---------------------------------------------------------------------- reading


def test_names_are_those_of_the_contract(narrow):
    """Every name once, in the order of computation, and the starred ones are out of the default cache."""
    points = narrow.model.hook_points()
    ours = [point.name for point in points]
    assert sorted(ours) == sorted(narrow.names())
    assert {point.name for point in points if not point.default} == set(filter(is_starred, ours))
    assert ("hook_resid_mid" in str(ours)) != narrow.config.use_parallel_residual


def test_reading_every_name_leaves_hfs_bits(narrow):
    """Logits and parameter gradients are a fresh HF model's while every name is read, by cache and by function."""
    plain = narrow.reference(TOKENS).logits
    plain.pow(2).sum().backward()
    for chosen in (narrow.names(), [n for n in narrow.names() if "attn" in n], ["hook_embed"]):
        entries = [(name, lambda x, hook: None) for name in chosen]
        narrow.hf.zero_grad(set_to_none=True)
        with narrow.model.hooks(fwd_hooks=entries):
            logits, cache = narrow.model.run_with_cache(TOKENS, names_filter=chosen)
        assert torch.equal(logits, plain)
        assert sorted(cache) == sorted(chosen)
        logits.pow(2).sum().backward()
        for (name, ours), theirs in zip(narrow.hf.named_parameters(), narrow.reference.parameters(), strict=True):
            assert torch.equal(ours.grad, theirs.grad), name
    narrow.reference.zero_grad(set_to_none=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_reading_leaves_the_bits_in_half_precision(dtype):
    """The same in the dtypes that Pythia is stored in."""
    one = built("parallel", "sdpa", dtype)
    with torch.no_grad():
        logits, cache = one.model.run_with_cache(TOKENS, names_filter=one.names())
        assert torch.equal(logits, one.reference(TOKENS).logits)
    assert {cache[name].dtype for name in floating(one)} == {dtype}


def test_values_equal_golden(wide):
    """The value at every name is golden's, under padding too."""
    padded, mask = pad([random_tokens(1, n, seed=n)[0] for n in (3, 6)])
    for tokens, real in ((TOKENS, torch.ones_like(TOKENS)), (padded, mask)):
        _, expected = wide.golden(tokens, attention_mask=real)
        with torch.no_grad():
            _, cache = wide.model.run_with_cache(tokens, names_filter=wide.names(), attention_mask=real)
        off = {}
        for row, name in itertools.product(range(2), wide.names()):
            at = real[row].nonzero()[:, 0]
            pieces = (real_part(wide.subject, name, values[name], row, at) for values in (cache, expected))
            off[name, row] = error(*pieces)
        assert not {key: value for key, value in off.items() if not value <= TOLERANCE}


@pytest.mark.parametrize("variant", VARIANTS)
def test_dropout_is_inside_what_is_added(variant):
    """In training, branches and embedding are seen after their dropouts, and the logits are HF's."""
    one = pair(built(variant, "eager").subject, attn="eager", hidden_dropout=0.4, attention_dropout=0.2)
    one.hf.train()
    one.reference.train()
    torch.manual_seed(3)
    expected = one.reference(TOKENS).logits
    torch.manual_seed(3)
    logits, cache = one.model.run_with_cache(TOKENS, names_filter=one.names())
    assert torch.equal(logits, expected)
    assert torch.equal(cache["hook_embed"], cache["resid_pre", 0])
    for layer in range(2):
        assert (cache["attn_out", layer] == 0).float().mean() > 0.2
        assert (cache["mlp_out", layer] == 0).float().mean() > 0.2
        added = cache["resid_pre", layer] + cache["attn_out", layer] + cache["mlp_out", layer]
        assert error(added, cache["resid_post", layer]) < 1e-6


# ---------------------------------------------------------------------- editing


def test_an_edit_has_golden_effect_everywhere(wide):
    """An edit at any name outside the first block moves the logits, and every other value, as it moves golden's."""
    for name in wide.edited_names():
        check(wide, TOKENS, [(name, edit_at(name))], {name: edit_at(name)})


def test_an_edit_alone_has_golden_effect(wide):
    """The logits with nothing else asked for, in both blocks: returned in grad mode, written in inference mode."""
    for name in wide.names():
        edit = edit_at(name)
        expected, _ = wide.golden(TOKENS, edits={name: edit}, record=False)
        for mode, entry in ((torch.enable_grad, edit), (torch.inference_mode, in_place(edit))):
            with mode():
                ours = wide.model.run_with_hooks(TOKENS, fwd_hooks=[(name, entry)])
            assert error(ours, expected) <= TOLERANCE, name


def test_an_edit_of_one_head_reaches_that_head(wide_sdpa):
    """Each head's part of q, k, v, of their inputs, and of all that follows."""
    for name in filter(head_axis, wide_sdpa.names()):
        for head in range(3) if name in wide_sdpa.edited_names() else ():
            edit = only_head(edit_at(name), head, head_axis(name))
            check(wide_sdpa, TOKENS, [(name, edit)], {name: edit})


def test_edits_of_all_projections_compose(wide_sdpa):
    """q, k and v share a module: edits of all three, and of all their inputs, hold together."""
    for parts in (("hook_q", "hook_k", "hook_v"), COPIES, ("hook_k_input", "attn.hook_v", "rot_k", "rot_q")):
        edits = {name: edit_at(name) for name in wide_sdpa.names() if name.endswith(parts)}
        check(wide_sdpa, TOKENS, list(edits.items()), edits)


# ---------------------------------------------------------------------- gradients


def gradients(one, edits, through=()):
    """Run golden with a graph; give the gradient at every cut, and of every parameter."""
    state = {key: value.detach().clone().requires_grad_() for key, value in one.reference.state_dict().items()}
    if one.config.tie_word_embeddings:
        state["lm_head.weight"] = state["gpt_neox.embed_in.weight"]
    logits, values = golden(state, one.config, TOKENS, edits=edits, through=through)
    metric(logits).backward()
    return {name: values[name].grad for name in floating(one)}, {key: value.grad for key, value in state.items()}


def off_by(ours, theirs):
    """Give the relative difference; infinite where there is no gradient."""
    if ours is None or ours.shape != theirs.shape:
        return float("inf")
    return float((ours - theirs).abs().max()) / max(1e-6, float(theirs.abs().max()))


def test_gradients_equal_golden(wide):
    """At all names on HF's own way at once, by backward function and in an undetached cache, and of parameters."""
    cuts, parameters = gradients(wide, {})
    chosen, got = [name for name in floating(wide) if not name.endswith(COPIES)], {}
    entries = [(name, lambda g, hook: got.__setitem__(hook.name, g.clone())) for name in chosen]
    wide.hf.zero_grad(set_to_none=True)
    metric(wide.model.run_with_hooks(TOKENS, bwd_hooks=entries)).backward()
    with wide.model.caching(chosen, detach=False) as cache:
        metric(wide.model(TOKENS)).backward()
    wrong = {name: off_by(got.get(name), cuts[name]) for name in chosen}
    wrong |= {f"{name} cached": off_by(cache.grad[name], cuts[name]) for name in chosen}
    wrong |= {key: off_by(p.grad / 2, parameters[key]) for key, p in wide.hf.named_parameters()}
    assert not {name: value for name, value in wrong.items() if not value <= 1e-8}


def test_each_gradient_alone_equals_golden(wide_sdpa):
    """One name at a time, copies too, plain and edited."""
    wrong = {}
    for name in wide_sdpa.edited_names():
        if name == "hook_tokens":
            continue
        for edits in ({}, {name: edit_at(name)}):
            got = []
            cuts, _ = gradients(wide_sdpa, edits, {name} if name.endswith(COPIES) else ())
            hooks = {
                "fwd_hooks": list(edits.items()),
                "bwd_hooks": [(name, lambda g, hook, to=got: to.append(g.clone()))],
            }
            metric(wide_sdpa.model.run_with_hooks(TOKENS, **hooks)).backward()
            wrong[name, bool(edits)] = off_by(got[0] if len(got) == 1 else None, cuts[name])
    assert not {name: value for name, value in wrong.items() if not value <= 1e-8}


# ---------------------------------------------------------------------- decoding


def stepwise(one, calls, *, reads=True):
    """Run the calls one after the other on one cache; give their logits, and the values at every name of each."""
    past, logits, caches = DynamicCache(config=one.hf.config), [], []
    for start, stop, entries in calls:
        options = {"names_filter": one.names() if reads else "hook_embed", "past_key_values": past, "use_cache": True}
        with torch.no_grad(), one.model.hooks(fwd_hooks=entries):
            out, cache = one.model.run_with_cache(TOKENS[:, start:stop], **options)
        logits.append(out)
        caches.append(cache)
    return torch.cat(logits, 1), caches


def test_prefill_and_decode_equal_the_whole(wide):
    """With an edit in every call, logits and values of each call are those of the whole run."""
    calls, off = [(0, 3), (3, 4), (4, 6)], {}
    for name in wide.edited_names():
        edit = edit_at(name, causal=True)
        expected, values = wide.golden(TOKENS, edits={name: edit})
        logits, caches = stepwise(wide, [(start, stop, [(name, edit)]) for start, stop in calls])
        off[name] = error(logits, expected)
        for (start, stop), cache in zip(calls, caches, strict=True):
            for at in wide.names():
                off[name, at, start] = error(cache[at], part(wide.subject, at, values[at], start, stop))
    assert not {key: value for key, value in off.items() if not value <= TOLERANCE}


def test_an_edit_in_one_call_holds_for_later_ones(wide_sdpa):
    """What an edit did to keys and values is in the cache that bare decoding reads."""
    off = {}
    for name in wide_sdpa.names():
        edit = edit_at(name, causal=True)
        expected, _ = wide_sdpa.golden(TOKENS, edits={name: only_at(name, edit, range(3))}, record=False)
        logits, _ = stepwise(wide_sdpa, [(0, 3, [(name, edit)]), (3, 4, []), (4, 6, [])], reads=False)
        off[name] = error(logits, expected)
    assert not {key: value for key, value in off.items() if not value <= TOLERANCE}


def test_greedy_generation_equals_hf(narrow):
    """Lens generates HF's own tokens while every name is read, for uneven prompts too."""
    padded, mask = pad([random_tokens(1, n, seed=n)[0] for n in (3, 5)])
    for tokens, real in ((TOKENS, torch.ones_like(TOKENS)), (padded, mask)):
        expected = narrow.reference.generate(
            tokens, attention_mask=real, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=28
        )
        entries = [(name, lambda x, hook: None) for name in narrow.names()]
        with narrow.model.hooks(fwd_hooks=entries):
            ours = narrow.model.generate(tokens, 6, attention_mask=real, do_sample=False, stop_at_eos=False)
        assert torch.equal(ours, expected)


def test_greedy_generation_with_an_edit_equals_golden(wide_sdpa):
    """With an edit of k, v or rotated keys at every step, generation picks golden's tokens."""
    moved = 0
    for part_name in ("attn.hook_k", "attn.hook_v", "attn.hook_rot_k", "hook_k_input", "hook_mlp_in", "hook_resid_pre"):
        name, expected = f"blocks.0.{part_name}", TOKENS
        for _ in range(4):
            logits, _ = wide_sdpa.golden(expected, edits={name: edit_at(name)})
            expected = torch.cat([expected, logits[:, -1:].argmax(-1)], 1)
        options = {"do_sample": False, "stop_at_eos": False}
        plain = wide_sdpa.model.generate(TOKENS, 4, **options)
        with wide_sdpa.model.hooks(fwd_hooks=[(name, edit_at(name))]):
            assert torch.equal(wide_sdpa.model.generate(TOKENS, 4, **options), expected), name
        moved += not torch.equal(plain, expected)
    assert moved >= 3


# ---------------------------------------------------------------------- parts and weights


def test_decompositions_sum(wide_sdpa):
    """Heads, neurons, biases and embedding sum to the stream, to what the MLP reads, and to the logits."""
    with torch.no_grad():
        _, cache = wide_sdpa.model.run_with_cache(TOKENS)
    read = "resid_pre" if wide_sdpa.config.use_parallel_residual else "resid_mid"
    for layer, mlp_input, stream in (
        (None, False, ("resid_post", -1)),
        (1, False, ("resid_pre", 1)),
        (1, True, (read, 1)),
    ):
        options = {"layer": layer, "mlp_input": mlp_input}
        assert error(cache.decompose_resid(**options).sum(0), cache[stream]) <= TOLERANCE
        assert error(cache.get_full_resid_decomposition(**options).sum(0), cache[stream]) <= TOLERANCE
    stack = cache.get_full_resid_decomposition()
    attrs, bias = cache.logit_attrs(stack, TOKENS, return_bias=True)
    assert error(attrs.sum(0) + bias, cache["hook_logits"].gather(-1, TOKENS[..., None])[..., 0]) <= TOLERANCE
    heads = cache.stack_head_results(layer=1)
    out = cache["attn_out", 0] - wide_sdpa.model.b_O[0]
    assert error(heads.sum(0), out) <= TOLERANCE


def test_weights_recompute_the_values(wide_sdpa):
    """Weights in TransformerLens' layout make every linear place of what it reads; absent biases are zeros."""
    model = wide_sdpa.model
    with torch.no_grad():
        _, cache = model.run_with_cache(TOKENS, names_filter=wide_sdpa.names())
        for layer in range(2):
            normed, read, post = (
                cache[f"blocks.{layer}.{n}"] for n in ("ln1.hook_out", "mlp.hook_in", "mlp.hook_post")
            )
            w = {name: model.weight(name, layer) for name in ("W_O", "b_O", "W_in", "b_in", "W_out", "b_out")}
            for letter in "qkv":
                weight, bias = model.weight(f"W_{letter.upper()}", layer), model.weight(f"b_{letter.upper()}", layer)
                assert weight.shape == (3, 24, 8)
                assert bool(bias.any()) == wide_sdpa.config.attention_bias
                ours = torch.einsum("bpd,hde->bphe", normed, weight) + bias
                assert error(ours, cache[letter, layer]) <= TOLERANCE
            ours = torch.einsum("bphe,hed->bphd", cache["z", layer], w["W_O"])
            assert error(ours, cache["result", layer]) <= TOLERANCE
            assert error(ours.sum(2) + w["b_O"], cache[f"blocks.{layer}.attn.hook_out"]) <= TOLERANCE
            assert error(read @ w["W_in"] + w["b_in"], cache["pre", layer]) <= TOLERANCE
            assert error(post @ w["W_out"] + w["b_out"], cache[f"blocks.{layer}.mlp.hook_out"]) <= TOLERANCE
        assert error(model.W_E[TOKENS], cache["hook_embed"]) <= TOLERANCE
        assert error(cache["unembed.hook_in"] @ model.W_U + model.b_U, cache["hook_logits"]) <= TOLERANCE
    assert model.W_Q.shape == (2, 3, 24, 8)
    assert model.b_V.shape == (2, 3, 8)


def test_weights_are_the_live_parameters():
    """A view of a fused projection writes through to HF's parameter, head by head and part by part."""
    one = pair(built("parallel", "sdpa").subject)
    fused = one.hf.gpt_neox.layers[1].attention.query_key_value
    with torch.no_grad():
        one.model.weight("W_K", 1)[2].zero_()  # the last head's key
        one.model.weight("b_V", 1)[0].zero_()
    assert not fused.weight.view(3, 3, 8, 24)[2, 1].any()
    assert (fused.weight.view(9, -1) == 0).all(-1).sum() == 1
    assert (fused.bias.view(9, 8) == 0).all(-1).tolist() == [False] * 2 + [True] + [False] * 6
