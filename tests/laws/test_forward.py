"""What `model(...)` takes and gives: return types, losses, partial runs, inputs, refusals."""

import pytest
import torch
from golden.tiny import fresh, pad, random_tokens, tiny_gpt2, tiny_tokenizer
from lens_conformance.edits import edit_at
from torch.nn.functional import cross_entropy

import lens_core as lens
from lens_core import errors


def close(ours, theirs):
    """Compare to float32 rounding."""
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=2e-5)


@pytest.fixture
def talker():
    """Give a tiny model with a tokenizer, and its untouched twin."""
    hf = tiny_gpt2()
    return lens.load(hf, tokenizer=tiny_tokenizer()), fresh(hf)


def test_return_types(subject):
    """Logits, the loss, both, or nothing; per token the loss of each next token."""
    one, tokens = subject(), random_tokens(3, 6)
    with torch.no_grad():
        logits = one.reference(tokens).logits
        each = cross_entropy(logits[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none")
        assert torch.equal(one.model(tokens), logits)
        assert one.model(tokens, return_type=None) is None
        close(one.model(tokens, return_type="loss"), each.mean())
        close(one.model(tokens, return_type="loss", loss_per_token=True), each)
        both = one.model(tokens, return_type="both")
        assert torch.equal(both[0], logits)
        close(both[1], each.mean())
        close(one.reference(tokens, labels=tokens).loss, both[1])


@pytest.mark.parametrize("side", ["left", "right"])
def test_loss_ignores_padding(subject, side):
    """The mean is over real next tokens; a token predicted from or at padding does not count."""
    one = subject()
    rows = [random_tokens(1, n, seed=n)[0] for n in (3, 6, 2)]
    tokens, mask = pad(rows, side, amount=1)
    with torch.no_grad():
        each = [cross_entropy(one.reference(row[None]).logits[0, :-1], row[1:], reduction="none") for row in rows]
        close(one.model(tokens, attention_mask=mask, return_type="loss"), torch.cat(each).mean())
        per_token = one.model(tokens, attention_mask=mask, return_type="loss", loss_per_token=True)
    assert per_token.shape == (3, tokens.shape[1] - 1)
    counted = (mask[:, 1:] * mask[:, :-1]).bool()
    close(per_token[counted], torch.cat(each))
    assert not bool(per_token[~counted].any())


def test_one_row_may_lack_the_batch_axis(subject):
    """A 1-D tensor is one row."""
    one, tokens = subject(), random_tokens(1, 5)
    assert torch.equal(one.model(tokens[0]), one.reference(tokens).logits)
    assert torch.equal(one.model(tokens[0].to(torch.int32)), one.reference(tokens).logits)


def test_strings_are_tokenized(talker):
    """A string is a batch of one; a list is a padded batch whose rows are as they are alone."""
    model, reference = talker
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    with torch.no_grad():
        assert torch.equal(model("w3 w1 w4 w1 w5", prepend_bos=False), reference(ids).logits)
        with_bos = torch.cat([torch.tensor([[28]]), ids], 1)
        assert torch.equal(model("w3 w1 w4 w1 w5", prepend_bos=True), reference(with_bos).logits)
        for side in ("left", "right"):
            logits = model(["w3 w1 w4 w1 w5", "w9 w2"], prepend_bos=False, padding_side=side)
            close(logits[0], reference(ids).logits[0])
            short = reference(torch.tensor([[9, 2]])).logits[0]
            close(logits[1, -2:] if side == "left" else logits[1, :2], short)
        loss = model(["w3 w1 w4 w1 w5", "w9 w2"], prepend_bos=False, return_type="loss", loss_per_token=True)
        assert int((loss != 0).sum()) == 5


@pytest.mark.parametrize("stop", [0, 1, 2, 3, -1, -2, -3])
def test_stopping_gives_the_residual_and_skips_the_rest(subject, stop):
    """stop_at_layer gives what enters that block (n_layers: what leaves the last), and runs no block after it."""
    one, tokens, ran = subject(), random_tokens(), []
    for layer, block in enumerate(one.hf.transformer.h):
        block.register_forward_hook(lambda module, args, out, layer=layer: ran.append(layer))
    one.hf.lm_head.register_forward_hook(lambda module, args, out: ran.append("head"))
    one.hf.transformer.ln_f.register_forward_hook(lambda module, args, out: ran.append("norm"))
    layer = stop % 3 if stop < 0 else stop
    expected = {}
    one.reference.transformer.ln_f.register_forward_pre_hook(lambda module, args: expected.update({3: args[0]}))
    for index, block in enumerate(one.reference.transformer.h):
        block.register_forward_pre_hook(lambda module, args, index=index: expected.update({index: args[0]}))
    one.reference(tokens)
    residual, cache = one.model.run_with_cache(tokens, stop_at_layer=stop)
    assert torch.equal(residual, expected[layer])
    assert ran == list(range(layer))
    assert {name.split(".")[1] for name in cache if name.startswith("blocks.")} == {str(n) for n in range(layer)}


@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("start", [0, 1, 2, 3, -1])
def test_starting_from_a_residual_is_the_rest_of_the_run(subject, start, side):
    """start_at_layer takes a residual stream, runs only the blocks from there on, and gives the whole run's logits."""
    one, ran, options = subject(), [], {}
    tokens = random_tokens(2, 6)
    if side != "none":
        tokens, mask = pad([random_tokens(1, n, seed=n)[0] for n in (3, 6)], side)
        options["attention_mask"] = mask
    whole, cache = one.model.run_with_cache(tokens, **options)
    layer = start % 3 if start < 0 else start
    residual = cache["resid_pre", layer] if layer < 3 else cache["resid_post", 2]
    for index, block in enumerate(one.hf.transformer.h):
        block.mlp.register_forward_hook(lambda module, args, out, index=index: ran.append(index))
    logits, rest = one.model.run_with_cache(residual, start_at_layer=start, **options)
    assert torch.equal(logits, whole)
    assert ran == list(range(layer, 3))
    assert all(torch.equal(rest[name], cache[name]) for name in rest)
    assert {name.split(".")[1] for name in rest if name.startswith("blocks.")} == {str(n) for n in range(layer, 3)}


def test_start_and_stop_compose_and_edits_hold(subject):
    """From a residual to a residual, with an edit between."""
    one, tokens = subject(dtype=torch.float64), random_tokens()
    _, values = one.golden(tokens)
    residual = values["blocks.1.hook_resid_pre"]
    with torch.no_grad():
        ours = one.model(residual, start_at_layer=1, stop_at_layer=2)
        torch.testing.assert_close(ours, values["blocks.2.hook_resid_pre"])
        for name in ("blocks.1.hook_resid_pre", "blocks.1.hook_resid_mid", "blocks.2.attn.hook_pattern"):
            expected, _ = one.golden(tokens, edits={name: edit_at(name)})
            ours = one.model.run_with_hooks(residual, fwd_hooks=[(name, edit_at(name))], start_at_layer=1)
            torch.testing.assert_close(ours, expected)


def test_gradients_flow_through_partial_runs(subject):
    """A residual given to start_at_layer receives its gradient, and stop_at_layer's result has a graph."""
    one, tokens = subject(dtype=torch.float64), random_tokens()
    residual = one.model(tokens, stop_at_layer=1)
    assert residual.requires_grad
    leaf = residual.detach().requires_grad_()
    one.model(leaf, start_at_layer=1).pow(2).sum().backward()
    got = []
    whole = one.model.run_with_hooks(
        tokens, bwd_hooks=[("blocks.1.hook_resid_pre", lambda g, hook: got.append(g.clone()))]
    )
    whole.pow(2).sum().backward()
    torch.testing.assert_close(leaf.grad, got[0])


@pytest.mark.parametrize("layer", [4, -4, 1.0, "1", True], ids=str)
def test_layers_out_of_range_are_errors(subject, layer):
    """start_at_layer and stop_at_layer are whole numbers within the model."""
    one = subject()
    with pytest.raises(errors.LensError):
        one.model(random_tokens(), stop_at_layer=layer)
    with pytest.raises(errors.LensError):
        one.model(torch.randn(1, 4, 21), start_at_layer=layer)


def test_starting_from_token_ids_is_an_error(subject):
    """start_at_layer needs a residual stream."""
    with pytest.raises(errors.LensError):
        subject().model(random_tokens(), start_at_layer=1)


def test_unknown_arguments_raise(subject):
    """A typing error in an argument's name is never swallowed by HF's **kwargs."""
    one, tokens = subject(), random_tokens()
    for run in (one.model, one.model.run_with_cache, one.model.run_with_hooks, one.model.generate):
        with pytest.raises(TypeError):
            run(tokens, retrun_type="logits")
    with pytest.raises(errors.ArgumentError):
        one.model(tokens, return_type="logit")
    with pytest.raises(errors.LensError):
        one.model(tokens, padding_side="middle")


BAD = {
    "no-tokens": (lambda: torch.empty(1, 0, dtype=torch.long), errors.EmptyInputError),
    "no-rows": (lambda: torch.empty(0, 4, dtype=torch.long), errors.EmptyInputError),
    "an-empty-list": (list, errors.EmptyInputError),
    "an-empty-string": (lambda: "", errors.EmptyInputError),
    "a-large-id": (lambda: torch.tensor([[1, 29]]), errors.TokenIdError),
    "a-negative-id": (lambda: torch.tensor([[1, -1]]), errors.TokenIdError),
    "too-long": (lambda: random_tokens(1, 33), errors.ContextLengthError),
    "too-long-embeddings": (lambda: torch.randn(1, 33, 21), (errors.ContextLengthError, errors.ArgumentError)),
    "three-axes-of-ids": (lambda: random_tokens(2, 4)[None], errors.LensError),
    "no-axes": (lambda: torch.tensor(3), errors.LensError),
    "another-width": (lambda: torch.randn(1, 4, 20), errors.LensError),
    "booleans": (lambda: torch.ones(1, 4, dtype=torch.bool), errors.LensError),
    "complex": (lambda: torch.ones(1, 4, 21, dtype=torch.complex64), errors.LensError),
    "none": (lambda: None, errors.LensError),
    "a-number": (lambda: 3, errors.LensError),
    "bytes": (lambda: b"w1", errors.LensError),
    "a-list-of-numbers-and-strings": (lambda: ["w1", 3], errors.LensError),
}


@pytest.mark.parametrize("key", sorted(BAD))
def test_bad_input_is_a_clear_error_and_leaves_the_model(talker, key):
    """Each bad input gives an error of the tree from every entry, and the model works on."""
    model, reference = talker
    make, error = BAD[key]
    runs = [model, model.run_with_cache, model.generate, lambda x: model.run_with_hooks(x, fwd_hooks=[])]
    for run in runs:
        with pytest.raises(error):
            run(make(), prepend_bos=False) if key == "an-empty-string" and run is model else run(make())
        if key == "an-empty-string":
            break  # with a BOS it is not empty
    tokens = random_tokens()
    assert torch.equal(model(tokens), reference(tokens).logits)


def test_text_without_a_tokenizer_is_an_error(subject):
    """Token ids still work."""
    one = subject()
    with pytest.raises(errors.TokenizerError):
        one.model("w1 w2")
    assert one.model(random_tokens()).shape == (2, 5, 29)


def test_uneven_strings_without_a_pad_token_are_an_error():
    """A batch of strings of unequal lengths needs a pad token; of equal lengths it does not."""
    model = lens.load(tiny_gpt2(), tokenizer=tiny_tokenizer(pad=False, bos=False))
    assert model(["w1 w2", "w3 w4"]).shape == (2, 2, 29)
    with pytest.raises(errors.PaddingError):
        model(["w1 w2", "w3"])


@pytest.mark.parametrize(
    "mask", [torch.ones(2, 4), torch.ones(5), torch.ones(3, 5), "yes"], ids=["short", "flat", "more-rows", "text"]
)
def test_a_mask_of_another_shape_is_an_error(subject, mask):
    """The attention mask has a cell per token."""
    one = subject()
    with pytest.raises(errors.LensError):
        one.model(random_tokens(2, 5), attention_mask=mask)
    assert torch.equal(one.model(random_tokens()), one.reference(random_tokens()).logits)


def test_config_has_the_fields_users_know(subject):
    """Cfg gives TransformerLens' names, and is read-only."""
    cfg = subject().model.cfg
    found = cfg.n_layers, cfg.d_model, cfg.n_heads, cfg.d_head, cfg.d_mlp, cfg.d_vocab, cfg.n_ctx, cfg.act_fn
    assert found == (3, 21, 3, 7, 37, 29, 32, "gelu_new")
    assert cfg.eps == pytest.approx(1e-5)
    with pytest.raises((AttributeError, TypeError)):
        cfg.n_layers = 5


def test_the_pieces_notebooks_call(subject):
    """embed, ln_final and unembed are the model's own, as functions."""
    one, tokens = subject(), random_tokens()
    _, cache = one.model.run_with_cache(tokens)
    assert torch.equal(one.model.embed(tokens), cache["hook_embed"])
    assert torch.equal(one.model.ln_final(cache["resid_post", 2]), cache["ln_final.hook_out"])
    assert torch.equal(one.model.unembed(cache["unembed.hook_in"]), cache["hook_logits"])
