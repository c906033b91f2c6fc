"""Properties 15 to 18 and 21: padding, batch mates, and the split into prompt and continuation do not matter."""

import itertools

import torch
from transformers import DynamicCache

from lens_conformance.case import Case, NotThereError, pad
from lens_conformance.checks import check
from lens_core.plugin import Capability


@check(15, "padding changes nothing at real positions", judge="law", needs=Capability.LEFT_PADDING)
def padding(case: Case) -> None:
    """Side and amount, for the logits and every value: each row is what it is alone."""
    family = case.family
    if not family.paddings:
        raise NotThereError("HF lets padding of this type reach real positions on either side")
    with case.exact():
        one = case.pair(torch.float64)
        lengths = case.some(range(1, 7), "lengths", most=3)
        texts = [case.tokens(min_pos=n, max_pos=n, batch=1)[0] for n in lengths]
        ids, mask = pad(texts, case.choice(family.paddings, "side"), case.integer(1, 3, "more padding"))
        with torch.no_grad():
            logits, cache = one.model.run_with_cache(ids, names_filter=one.names(), attention_mask=mask)
            for row, text in enumerate(texts):
                alone_logits, alone = one.model.run_with_cache(text[None], names_filter=one.names())
                real = (row, mask[row].nonzero().flatten())
                case.same("the logits of a padded row", *case.real("hook_logits", real, logits), alone_logits)
                for name in (n for n in one.names() if n != "hook_pos_embed"):
                    case.same(f"{name} of a padded row", *case.real(name, real, cache[name]), alone[name])


@check(16, "the order of rows does not matter", judge="law")
def permutation(case: Case) -> None:
    """Logits and values of a permuted batch are the permuted ones."""
    with case.exact():
        one, ids = case.pair(torch.float64), case.tokens(batch=3)
        order = torch.tensor(case.choice(list(itertools.permutations(range(3))), "order"))
        with torch.no_grad():
            logits, cache = one.model.run_with_cache(ids, names_filter=one.names())
            other_logits, other = one.model.run_with_cache(ids[order], names_filter=one.names())
        case.same("the logits of permuted rows", other_logits, logits[order])
        for name in one.names():
            case.same(f"{name} of permuted rows", other[name], cache[name][order])


@check(17, "prefill and decode equal the whole, values and edits included", judge="law")
def split(case: Case) -> None:
    """Any split into calls, with an edit in every call or with none."""
    family = case.family
    with case.exact():
        one, ids = case.pair(torch.float64), case.tokens(min_pos=3, max_pos=7)
        n_pos = ids.shape[1]
        cut = case.integer(1, n_pos - 1, "prefill")
        chunk = case.integer(1, n_pos - cut, "chunk") if family.chunks else 1
        bounds = [0, cut, *range(cut + chunk, n_pos, 1), n_pos] if cut + chunk < n_pos else [0, cut, n_pos]
        if not family.chunks:
            bounds = [0, *range(cut, n_pos + 1)]
        pool = [name for name in one.names() if family.decodes(name)]
        edited = case.deal(pool, case.integer(0, 2, "edits"))
        entries = [(name, family.edit_at(name, causal=True)) for name in edited]
        past = DynamicCache(config=one.hf.config)
        with torch.no_grad(), one.model.hooks(fwd_hooks=entries):
            logits, whole = one.model.run_with_cache(ids, names_filter=one.names())
            pieces = []
            for start, stop in itertools.pairwise(bounds):
                part, cache = one.model.run_with_cache(
                    ids[:, start:stop], names_filter=one.names(), past_key_values=past, use_cache=True
                )
                pieces.append(part)
                for name in (n for n in one.names() if family.pos_axis(n) is not None):
                    expected = whole[name].narrow(family.pos_axis(name), start, stop - start)
                    key = family.key_axis(name)
                    expected = expected if key is None else expected.narrow(key, 0, stop)
                    case.same(f"{name} in the call of {start} to {stop}, edits at {edited}", cache[name], expected)
        case.same(f"the logits in parts, edits at {edited}", torch.cat(pieces, dim=1), logits)


@check(18, "greedy generation is HF's", judge="hf", needs=Capability.GENERATE)
def generation(case: Case) -> None:
    """With everything read, padded or not, whatever the prompt's length."""
    one = case.pair()
    length = case.integer(1, 20, "prompt")
    ids = case.tokens(min_pos=length, max_pos=length, batch=2)
    length, mask = ids.shape[1], torch.ones_like(ids)
    if "left" in case.family.paddings and case.flag("padded"):
        ids, mask = pad([ids[0], ids[1, : max(1, length // 2)]], "left")
    options = {"max_new_tokens": 4, "do_sample": False}
    expected = one.reference.generate(ids, attention_mask=mask, eos_token_id=None, pad_token_id=28, **options)
    with one.model.hooks(fwd_hooks=[(name, lambda x, hook: None) for name in one.names()]):
        ours = one.model.generate(ids, attention_mask=mask, stop_at_eos=False, return_type="tokens", **options)
    assert torch.equal(ours, expected), f"generated {ours.tolist()}, HF {expected.tolist()}"


@check(21, "stopping and starting at a layer equals the whole", judge="law")
def layers(case: Case) -> None:
    """The stream that enters a block, and the logits from there."""
    one, ids = case.pair(), case.tokens()
    n_layers = one.model.cfg.n_layers
    layer = case.integer(0, n_layers, "layer")
    with torch.no_grad():
        logits, cache = one.model.run_with_cache(ids, names_filter=["resid_pre", "resid_post"])
        stream = cache["resid_pre", layer] if layer < n_layers else cache["resid_post", -1]
        case.equal(f"the stream that enters block {layer}", one.model(ids, stop_at_layer=layer), stream)
        case.equal(f"the logits from block {layer} on", one.model(stream, start_at_layer=layer), logits)
