"""Properties 1 to 7, 12, 14, 20 and 22: values are what the equations say, and reading changes nothing."""

import contextlib
import warnings
from typing import Any

import torch

from lens_conformance.case import Case
from lens_conformance.checks import check
from lens_conformance.oracle import plain
from lens_core.errors import CostWarning

MODES = {"grad": contextlib.nullcontext, "no_grad": torch.no_grad, "inference": torch.inference_mode}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def look(x: torch.Tensor, hook: Any) -> None:
    """Read and return nothing."""
    float(x.detach().sum())


@check(1, "logits equal HF, bit for bit", judge="hf")
def logits(case: Case) -> None:
    """Plain calls and calls that read everything, in each dtype and autograd mode."""
    one = case.pair(case.choice(DTYPES, "dtype"))
    ids = case.tokens(max_pos=12)
    with MODES[case.choice(sorted(MODES), "mode")]():
        expected = plain(one, ids)
        case.equal("the logits of a plain call", one.model(ids), expected)
        ours, _ = one.model.run_with_cache(ids, names_filter=one.names())
        case.equal("the logits while every name is read", ours, expected)


@check(2, "every declared point fires as often as declared, in prefill and in each step", judge="law")
def fires(case: Case) -> None:
    """Once a call, or once a position; the plugin's table holds the contract's names and no others."""
    one = case.pair()
    names, known = one.names(), one.contract()
    assert sorted(known) == sorted(one.model.table), (
        f"the table lacks {sorted(set(known) - set(one.model.table))[:5]} and has "
        f"{sorted(set(one.model.table) - set(known))[:5]} beyond the contract"
    )
    counts: dict[str, int] = {}

    def count(x: torch.Tensor, hook: Any) -> None:
        counts[hook.name] = counts.get(hook.name, 0) + 1

    ids = case.tokens(min_pos=2)
    n_pos, n_new = ids.shape[1], 3
    with torch.no_grad(), one.model.hooks(fwd_hooks=[(name, count) for name in names]):
        one.model(ids)
        once = dict(counts)
        counts.clear()
        one.model.generate(ids, n_new, do_sample=False, stop_at_eos=False, return_type="tokens")
    for name in names:
        is_many = case.family.per_position(name)
        assert once.get(name) == (n_pos if is_many else 1), f"{name} fired {once.get(name)} times in a prefill"
        steps = n_pos + n_new - 1 if is_many else n_new
        assert counts.get(name) == steps, f"{name} fired {counts.get(name)} times in a prompt and {n_new - 1} steps"


@check(3, "values are those of the golden forward", judge="golden")
def values(case: Case) -> None:
    """Every name, padded or not."""
    with case.exact():
        one = case.pair(torch.float64)
        ids, options = case.batch()
        expected_logits, expected = one.golden(ids, **options)
        with torch.no_grad():
            logits, cache = one.model.run_with_cache(ids, names_filter=one.names(), **options)
        for row in case.rows(options):
            for name in one.names():
                case.same(name, *case.real(name, row, cache[name], expected[name]))
            case.same("logits", *case.real("hook_logits", row, logits, expected_logits))


@check(4, "what branches add sums to the residual stream", judge="law")
def residual(case: Case) -> None:
    """At every block, the embeddings and all that was written before; in training, dropouts included, of each block."""
    with case.exact():
        if case.family.dropout and case.flag("training"):
            _each_block_adds(case)
            return
        one = case.pair(torch.float64)
        with torch.no_grad():
            _, cache = one.model.run_with_cache(case.tokens())
        n_layers = one.model.cfg.n_layers
        for layer in range(n_layers + 1):
            parts = cache.decompose_resid(layer)
            at = f"blocks.{layer}.hook_resid_pre" if layer < n_layers else f"blocks.{n_layers - 1}.hook_resid_post"
            told = f"{at}, which is {' + '.join(one.model.declaration.embeddings)} and what every block below writes"
            told += f" ({', '.join(one.model.declaration.writers)}),"
            case.same(told, cache[at], parts.sum(0), 1e-6)  # parts are kept in float32 where the cache is


def _each_block_adds(case: Case) -> None:
    """Compare block by block: dropout of the sum of two embeddings is no sum of theirs."""
    one = case.pair(torch.float64, is_own=True, **case.family.dropout)
    one.hf.train()
    with torch.no_grad():
        _, cache = one.model.run_with_cache(case.tokens())
    for layer in range(one.model.cfg.n_layers):
        at = f"blocks.{layer}."
        written = [cache[at + name] for name in one.model.declaration.writers if at + name in cache]
        told = f"{at}hook_resid_post in training, which is resid_pre and what the block writes after its dropouts,"
        case.same(told, cache[f"{at}hook_resid_post"], cache[f"{at}hook_resid_pre"] + sum(written))


@check(5, "heads, neurons and biases sum to the stream and to the logits", judge="law")
def decompositions(case: Case) -> None:
    """The full decomposition, where the model has one; the attribution of a logit."""
    one = case.pair()
    ids = case.tokens()
    with torch.no_grad():
        _, cache = one.model.run_with_cache(ids)
    has_heads = any(name.endswith("attn.hook_z") for name in one.model.table)
    parts = cache.get_full_resid_decomposition(expand_neurons=False) if has_heads else cache.decompose_resid()
    case.same("the full decomposition", parts.sum(0), cache["resid_post", -1], 1e-5)
    attributed, bias = cache.logit_attrs(parts, ids, return_bias=True)
    own = cache["unembed.hook_out"] * one.model.declaration.logit_factor
    case.same("logit attributions", attributed.sum(0) + bias, own.gather(-1, ids[..., None])[..., 0], 1e-5)


@check(
    6, "reading any subset of names changes no bit: logits, random state, parameter gradients", judge="hf", share=0.6
)
def purity(case: Case) -> None:
    """By cache, by function, or both; in eval and in train mode, with dropout on."""
    one = case.pair(is_own=True, **case.family.dropout)
    ids, train = case.tokens(min_pos=2), case.flag("training")
    for model in (one.hf, one.reference):
        model.train(train)
    torch.manual_seed(7)
    expected = plain(one, ids)
    state = torch.get_rng_state()
    expected.pow(2).sum().backward()
    names = case.names(one.names())
    how = case.choice(("cache", "functions", "both"), "read by")

    def read(some: list[str]) -> torch.Tensor:
        torch.manual_seed(7)
        with one.model.hooks(fwd_hooks=[(name, look) for name in some] if how != "cache" else []):
            return one.model(ids) if how == "functions" else one.model.run_with_cache(ids, names_filter=some)[0]

    ours = read(names)
    assert torch.equal(torch.get_rng_state(), state), f"reading {names} drew random numbers"
    if not torch.equal(ours, expected):
        alone = [name for name in names if not torch.equal(read([name]), expected)] or names
        case.equal(f"the logits while {', '.join(alone[:5])} are read", ours, expected)
    ours.pow(2).sum().backward()
    for (name, parameter), theirs in zip(one.hf.named_parameters(), one.reference.parameters(), strict=True):
        told = f"the gradient of {name} while {names} are read"
        assert (parameter.grad is None) == (theirs.grad is None), f"{told} is there on one side only"
        if parameter.grad is not None:  # a router's correction has none
            case.equal(told, parameter.grad, theirs.grad)


@check(7, "an identity edit changes no bit", judge="hf")
def identity(case: Case) -> None:
    """A function that returns its argument, or an equal copy."""
    one, ids = case.pair(case.choice(DTYPES, "dtype")), case.tokens()
    same = (lambda x, hook: x) if case.flag("the argument itself") else (lambda x, hook: x.clone())
    with torch.no_grad():
        expected = plain(one, ids)
        for name in case.deal(one.names(), 5):
            ours = one.model.run_with_hooks(ids, fwd_hooks=[(name, same)])
            case.equal(f"the logits under an identity edit at {name}", ours, expected)


@check(12, "the cache holds what hook functions saw, also later", judge="law")
def aliasing(case: Case) -> None:
    """Entries equal clones taken inside functions; after another run, after the functions' own tensors were zeroed."""
    one, ids = case.pair(), case.tokens()
    seen: dict[str, torch.Tensor] = {}
    held: list[torch.Tensor] = []

    def keep(x: torch.Tensor, hook: Any) -> None:
        held.append(x)
        before = seen.get(hook.name)
        seen[hook.name] = x.clone() if before is None else torch.cat([before, x], dim=1)

    names = case.names(one.names())
    with torch.no_grad(), one.model.hooks(fwd_hooks=[(name, keep) for name in names]):
        _, cache = one.model.run_with_cache(ids, names_filter=names)
    with torch.no_grad():
        for x in held:
            x.zero_()
        one.model(ids.flip(1))
        one.model.run_with_hooks(ids, fwd_hooks=[(name, lambda x, hook: x.zero_()) for name in names])
    for name in names:
        case.equal(f"{name} in the cache", cache[name], seen[name])


@check(14, "a run leaves no trace in the next one", judge="law")
def stateless(case: Case) -> None:
    """run(A); run(B) is run(B), with values, whatever A was."""
    one, ids = case.pair(), case.tokens()
    [name] = case.deal(one.names())
    with torch.no_grad():
        first, before = one.model.run_with_cache(ids, names_filter=one.names())
        one.model.run_with_hooks(case.tokens(), fwd_hooks=[(name, case.family.edit_at(name))])
        one.model.generate(ids, 2, do_sample=False, stop_at_eos=False)
        again, after = one.model.run_with_cache(ids, names_filter=one.names())
    case.equal("the logits of the same run again", again, first)
    for name in one.names():
        case.equal(f"{name} in the same run again", after[name], before[name])


@check(20, "filters give exactly the subset, with the same values", judge="law")
def filters(case: Case) -> None:
    """A list and a predicate; what is computed beside HF may round differently beside other names."""
    with case.exact():
        one, ids = case.pair(torch.float64), case.tokens()
        names = case.names(one.names())
        with torch.no_grad():
            _, whole = one.model.run_with_cache(ids, names_filter=one.names())
            for given in (names, lambda name: name in names):
                with warnings.catch_warnings(action="ignore", category=CostWarning):
                    _, cache = one.model.run_with_cache(ids, names_filter=given)
                assert sorted(cache) == sorted(names), f"asked for {sorted(names)[:5]}, got {sorted(cache)[:5]}"
                for name in names:
                    case.same(f"{name} asked for among {len(names)}", cache[name], whole[name], 1e-12)


@check(22, "values have the declared dtype and shape", judge="law")
def dtypes(case: Case) -> None:
    """In each dtype, cached and handed."""
    one, ids = case.pair(case.choice(DTYPES, "dtype")), case.tokens()
    sizes = {**one.model.cfg.sizes, "batch": ids.shape[0], "pos": ids.shape[1], "query": ids.shape[1]}
    sizes["key"] = ids.shape[1]
    with torch.no_grad():
        _, cache = one.model.run_with_cache(ids, names_filter=one.names())
    for point in (one.model.table[name] for name in cache):
        declared = one.dtype if point.dtype == "model" else getattr(torch, point.dtype)
        assert cache[point.name].dtype == declared, f"{point.name} is {cache[point.name].dtype}, declared {declared}"
        shape = tuple(int(axis) if axis.isdigit() else sizes[axis] for axis in point.shape.split())
        assert tuple(cache[point.name].shape) == shape, (
            f"{point.name} has shape {tuple(cache[point.name].shape)}, declared {point.shape!r}: {shape}"
        )
