"""Ctrl-C at any moment of a run: the model is usable and clean afterwards."""

import contextlib
import random
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from abuse.models import GREEDY, KINDS, TOKENS, victim

import lens_core
from lens_core import _functions

CORE = str(Path(lens_core.__file__).parent)
CRITICAL = ("_plan.py", "_taps.py", "_functions.py", "_context.py", "_graph.py", "/contextlib.py", "/utils/hooks.py")
"""Where taps, slots and modes are put in and taken out: interrupted at one line after the other."""


@pytest.fixture(autouse=True)
def free_lock():
    """Free the core's lock where the trace raised between the end of its block and its exit.

    Python runs a line event there and no signal handler: the exit of a lock is one call of C. Held on, it would let the
    threads of later tests wait for ever.
    """
    yield
    while _functions._lock._is_owned():
        _functions._lock.release()


def halve(x, hook):
    """Return half the value."""
    return x * 0.5


def jobs(model):
    """List what is interrupted: reading, editing, a block, skipping layers, generating."""
    inside = next(name for name in model.table if name.endswith(("hook_pattern", "hook_ssm_state")))
    residual = torch.zeros(1, 3, model.cfg.d_model)

    def block():
        with model.hooks([(("resid_post", 1), halve)], [(("resid_pre", 1), halve)]):
            model.hf_model(TOKENS).logits.sum().backward()
        model.hf_model.zero_grad(set_to_none=True)

    return {
        "cache": lambda: model.run_with_cache(TOKENS, names_filter=[inside, ("resid_pre", 1)]),
        "edit": lambda: model.run_with_hooks(TOKENS, fwd_hooks=[(inside, halve)]),
        "block": block,
        "skip": lambda: model(residual, start_at_layer=1, stop_at_layer=2),
        "generate": lambda: model.generate(TOKENS, 2, return_cache=True, names_filter=("resid_pre", 1), **GREEDY),
    }


class Interrupter:
    """Raises KeyboardInterrupt at the n-th line that is run where taps are put in and taken out."""

    def __init__(self, at):
        self.at, self.lines = at, 0

    def __call__(self, frame, event, arg):
        """Trace a frame if it is one of those, and count its lines."""
        name, caller = frame.f_code.co_filename, frame.f_back.f_code.co_filename
        ours = (
            name.startswith(CORE)
            or (caller.startswith(CORE) and name.endswith("/contextlib.py"))
            or "utils/hooks" in name
        )
        if not ours or not name.endswith(CRITICAL):
            return self if ours else None
        if event == "line":
            self.lines += 1
            if self.lines == self.at:
                sys.settrace(None)
                raise KeyboardInterrupt
        return self

    def run(self, job):
        """Run a job, interrupted or to its end."""
        before = sys.gettrace()
        sys.settrace(self)
        try:
            with contextlib.suppress(KeyboardInterrupt):
                job()
        finally:
            sys.settrace(before)


def left_on(model):
    """Say quickly what is left: taps, dispatchers, live runs, modes."""
    from lens_core import _context, _functions

    hooked = [path for path, m in model.hf_model.named_modules() if m._forward_hooks or m._forward_pre_hooks]
    modes = torch.overrides._get_current_function_mode_stack()
    found = [f"taps on {hooked}"] if hooked else []
    found += [f"slot {key[1]}" for key in _functions._taken] + [f"run {run}" for run in _context.active_runs()]
    return found + ([] if torch.is_grad_enabled() else ["no gradients"]) + [f"mode {mode}" for mode in modes]


STRIDES = {"gpt2": 7, "llama": 41, "mamba": 41, "mamba2": 41}


@pytest.mark.parametrize("job", ["cache", "edit", "block", "skip", "generate"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_interrupt_at_any_line_leaves_nothing(kind, job):
    """One interrupt wherever lens puts something in or takes it out: nothing stays, while the traceback is dropped."""
    one = victim(kind)
    run = jobs(one.model)[job]
    run()
    count = Interrupter(0)
    count.run(run)
    assert count.lines > 50
    for at in range(1, count.lines + 1, STRIDES[kind]):
        Interrupter(at).run(run)
        one.hf.zero_grad(set_to_none=True)
        assert left_on(one.model) == [], f"after an interrupt at line {at} of {count.lines}"
    assert one.left() + one.generates_otherwise() == []


def signalled(job, delay):
    """Run a job and send SIGINT to this thread after a delay, during it or just after it."""
    main = threading.get_ident()

    def send():
        time.sleep(delay)
        signal.pthread_kill(main, signal.SIGINT)

    sender = threading.Thread(target=send)
    with contextlib.suppress(KeyboardInterrupt):
        sender.start()
        job()
        sender.join()
        time.sleep(0)
    sender.join()


@pytest.mark.skipif(threading.current_thread() is not threading.main_thread(), reason="signals reach the main thread")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # the interrupt in a weakref's callback
@pytest.mark.parametrize("kind", KINDS)
def test_a_real_sigint_leaves_the_model_usable(kind):
    """SIGINT at random moments of every job; Python may lose one, and lens leaves nothing in any case."""
    one, rng = victim(kind), random.Random(0)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        for job in jobs(one.model).values():
            job()
            start = time.perf_counter()
            job()
            duration = time.perf_counter() - start
            for _ in range(6):
                signalled(job, rng.random() * duration)
                one.hf.zero_grad(set_to_none=True)
                torch.set_grad_enabled(True)  # an interrupt inside of torch's own no_grad is torch's
                hooked = [path for path, m in one.hf.named_modules() if m._forward_hooks or m._forward_pre_hooks]
                assert hooked == []
    finally:
        signal.signal(signal.SIGINT, before)
    assert one.left() + one.generates_otherwise() == []


@pytest.mark.parametrize("kind", KINDS)
def test_an_interrupt_inside_a_function_reaches_the_user(kind):
    """KeyboardInterrupt in a forward or backward function is not wrapped, and leaves nothing."""
    one = victim(kind)

    def stop(x, hook):
        raise KeyboardInterrupt

    for name in [name for name in one.names if name.startswith("blocks.1.")]:
        with pytest.raises(KeyboardInterrupt):
            one.model.run_with_hooks(TOKENS, fwd_hooks=[(name, stop)])
    for name in ("blocks.1.hook_resid_pre", "hook_embed"):
        logits = one.model.run_with_hooks(TOKENS, bwd_hooks=[(name, stop)])
        with pytest.raises(KeyboardInterrupt):
            logits.sum().backward()
    with one.model.hooks([("hook_embed", stop)]), pytest.raises(KeyboardInterrupt):
        one.model.generate(TOKENS, 2, **GREEDY)
    with pytest.raises(KeyboardInterrupt), one.model.hooks([("hook_embed", stop)]):
        list(one.model.generate_stream(TOKENS, 2, **GREEDY))
    one.hf.zero_grad(set_to_none=True)
    assert one.left() + one.generates_otherwise() == []
