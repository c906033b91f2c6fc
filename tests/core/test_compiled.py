"""Compiled models: compiled where nothing is hooked, before and after; eager where something is, and said."""

import threading
import warnings

import pytest
import torch
from golden.tiny import fresh, random_tokens, tiny_gpt2
from torch._dynamo.utils import counters

import lens_core as lens
from lens_core import _compiled

TOKENS = random_tokens()
NAME = "blocks.1.hook_resid_post"


class Counting:
    """A backend that runs what it is given as it is, and counts."""

    def __init__(self):
        self.compiled = self.runs = 0

    def __call__(self, graph, inputs):
        """Compile one graph."""
        self.compiled += 1

        def run(*args):
            self.runs += 1
            return graph.forward(*args)

        return run


def by_wrapper(hf, backend):
    """Wrap the model."""
    return torch.compile(hf, backend=backend)


def in_place(hf, backend):
    """Compile the model's own call."""
    hf.compile(backend=backend)
    return hf


def by_base(hf, backend):
    """Compile the model without its head."""
    hf.transformer.compile(backend=backend)
    return hf


def by_block(hf, backend):
    """Compile each block, as is usual for deep models."""
    for block in hf.transformer.h:
        block.compile(backend=backend)
    return hf


def by_part(hf, backend):
    """Compile a module that has no hook point of its own, around one that has."""
    hf.transformer.h[1].mlp.compile(backend=backend)
    return hf


def by_forward(hf, backend):
    """Put a compiled function in forward's place, as HF's documentation does."""
    hf.forward = torch.compile(hf.forward, backend=backend)
    return hf


WAYS = {way.__name__: way for way in (by_wrapper, in_place, by_base, by_block, by_part, by_forward)}


@pytest.fixture(autouse=True)
def _reset():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def square(value, hook):
    """Edit."""
    return value * value * 0.1


def counted():
    """Give torch's own counts of frames, graphs and guards that failed."""
    return {key: dict(counters[key]) for key in ("frames", "stats", "recompiles", "graph_break")}


@torch.no_grad()
@pytest.mark.parametrize("way", WAYS)
def test_a_compiled_model_stays_compiled_and_is_eager_under_hooks(way):
    """Counted at the backend: as many graphs run after hooked runs as before, and none is compiled anew."""
    hf, backend = tiny_gpt2(), Counting()
    reference = lens.load(fresh(hf))
    model = lens.load(WAYS[way](hf, backend))
    for _ in range(2):
        model(TOKENS)
        model.hf_model(TOKENS)  # fills a cache, which is a graph of its own
    before = counted()
    compiled, runs = backend.compiled, backend.runs
    assert compiled >= 1
    plain = model(TOKENS)
    model.hf_model(TOKENS)
    each = backend.runs - runs
    assert each >= 2
    assert torch.equal(plain, reference(TOKENS))

    names = [point.name for point in model.hook_points() if point.default]
    with pytest.warns(lens.CompileWarning, match="run eagerly"):
        logits, cache = model.run_with_cache(TOKENS)
    expected, known = reference.run_with_cache(TOKENS)
    assert list(cache) == names
    assert torch.equal(logits, expected)
    for name in names:
        assert torch.equal(cache[name], known[name]), name
    for name in (NAME, "blocks.1.mlp.hook_post", "blocks.1.attn.hook_pattern", "hook_logits"):
        hooks = {"fwd_hooks": [(name, square)]}
        edited = model.run_with_hooks(TOKENS, **hooks)  # a second warning would be an error here
        assert torch.equal(edited, reference.run_with_hooks(TOKENS, **hooks)), name
    assert torch.equal(model(TOKENS, stop_at_layer=2), reference(TOKENS, stop_at_layer=2))

    runs = backend.runs
    assert torch.equal(model(TOKENS), plain)
    assert torch.equal(model.hf_model(TOKENS).logits, plain)
    assert backend.runs - runs == each
    assert backend.compiled == compiled
    assert counted() == before


@torch.no_grad()
def test_the_first_call_may_be_a_hooked_one():
    """Nothing of the hooks gets into what is compiled later."""
    hf, backend = tiny_gpt2(), Counting()
    expected = fresh(hf)(TOKENS).logits
    model = lens.load(torch.compile(hf, backend=backend))
    with pytest.warns(lens.CompileWarning):
        model.run_with_hooks(TOKENS, fwd_hooks=[(NAME, square)])
    assert backend.compiled == backend.runs == 0
    assert torch.equal(model(TOKENS), expected)
    assert (backend.compiled, backend.runs) == (1, 1)


@torch.no_grad()
def test_generation_with_hooks_is_eager():
    """Static caches, as is usual where steps are compiled: every step is hooked, and compiled again without hooks."""
    hf, backend = tiny_gpt2(), Counting()
    options = {"max_new_tokens": 4, "do_sample": False, "return_type": "tokens", "cache_implementation": "static"}
    options["stop_at_eos"] = False
    reference = lens.load(fresh(hf))
    model = lens.load(by_block(hf, backend))
    plain = model.generate(TOKENS, **options)
    model.generate(TOKENS, **options)
    compiled, runs = backend.compiled, backend.runs
    assert torch.equal(model.generate(TOKENS, **options), plain)
    each = backend.runs - runs
    assert each >= 12  # three blocks, four steps
    steps = []
    with (
        pytest.warns(lens.CompileWarning),
        model.hooks(fwd_hooks=[("blocks.0.attn.hook_k", lambda value, hook: steps.append(hook.step) or value * 3)]),
    ):
        edited = model.generate(TOKENS, **options)
    assert steps == [0, 1, 2, 3]
    with reference.hooks(fwd_hooks=[("blocks.0.attn.hook_k", lambda value, hook: value * 3)]):
        assert torch.equal(edited, reference.generate(TOKENS, **options))
    runs = backend.runs
    assert torch.equal(model.generate(TOKENS, **options), plain)
    assert (backend.runs - runs, backend.compiled) == (each, compiled)


@torch.no_grad()
def test_gradients_of_a_compiled_model_under_hooks_are_eager_ones():
    """A backward hook, and the parameters' gradients."""
    hf = tiny_gpt2()
    other = fresh(hf)
    model, reference = lens.load(torch.compile(hf, backend="eager")), lens.load(other)
    seen = {}
    with torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", lens.CompileWarning)
        for each in (model, reference):
            keep = (NAME, lambda gradient, hook, each=each: seen.update({each: gradient.clone()}))
            each.run_with_hooks(TOKENS, fwd_hooks=[(NAME, square)], bwd_hooks=[keep], return_type="loss").backward()
    assert torch.equal(seen[model], seen[reference])
    for ours, theirs in zip(hf.parameters(), other.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore::lens_core.errors.CompileWarning")
def test_blocks_that_end_in_any_order_leave_torch_compiling():
    """Torch has one switch for the process: the last block that needs it gives it back."""
    backend = Counting()
    first, second = (lens.load(torch.compile(tiny_gpt2(), backend=backend)) for _ in range(2))
    fired = []
    fwd_hooks = [("hook_embed", lambda value, hook: fired.append(1))]
    one, other = first.hooks(fwd_hooks=fwd_hooks), second.hooks(fwd_hooks=fwd_hooks)
    one.__enter__()
    other.__enter__()
    first(TOKENS)
    one.__exit__(None, None, None)
    second(TOKENS)
    other.__exit__(None, None, None)
    assert fired == [1, 1]
    assert backend.runs == 0
    assert not _compiled._switch
    first(TOKENS)
    assert backend.runs == 1


@torch.no_grad()
@pytest.mark.filterwarnings("ignore::lens_core.errors.CompileWarning")
def test_threads_with_compiled_models_do_not_take_the_switch_from_one_another():
    """Each thread's runs are hooked while those of others begin and end."""
    models = [lens.load(torch.compile(tiny_gpt2(), backend="eager")) for _ in range(3)]
    wrong = []

    def work(model):
        for _ in range(20):
            seen = []
            model.run_with_hooks(TOKENS, fwd_hooks=[(NAME, lambda value, hook, seen=seen: seen.append(1))])
            if seen != [1]:
                wrong.append(seen)

    threads = [threading.Thread(target=work, args=(model,)) for model in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert not _compiled._switch


@torch.no_grad()
def test_calling_a_compiled_wrapper_beside_the_model_is_never_silently_unhooked():
    """Hooks put on a model are missed by a wrapper compiled before: the context says so."""
    hf = tiny_gpt2()
    wrapper = torch.compile(hf, backend="eager")
    wrapper(TOKENS)
    model = lens.load(hf)
    seen = []
    try:
        with model.hooks(fwd_hooks=[("hook_embed", lambda value, hook: seen.append(hook.name))]):
            wrapper(TOKENS)
    except lens.HookError:
        assert not seen
    else:
        assert seen == ["hook_embed"]
