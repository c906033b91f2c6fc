"""Random programs of what users do with hooks, and what must be left when each of them is over: nothing."""

import contextlib
import random
from collections.abc import Callable
from typing import Any

import torch
from abuse.models import GREEDY, TOKENS, Victim, victim

from lens_core._context import active_runs
from lens_core.errors import LensError


class TheirError(Exception):
    """Raised by a user's function or block."""


def changes(x: Any, hook: Any) -> Any:
    """Return another value."""
    return x * 0.5 if x.is_floating_point() else None


def reads(x: Any, hook: Any) -> None:
    """Look, and take a note."""
    hook.ctx["seen"] = hook.positions


def raises(x: Any, hook: Any) -> None:
    """Fail."""
    raise TheirError


def wrong(x: Any, hook: Any) -> Any:
    """Return what cannot stand there."""
    return x[:, :0]


FUNCTIONS = (changes, changes, reads, raises, wrong)
BAD_NAMES = (
    "blocks.1.hook_nothing",
    ("q", 99),
    "blocks.9.hook_resid_pre",
    "*nothing*",
    3,
    (),
    None,
    "hf.no.such.output",
)
POSITIONS = (None, None, 0, -1, [0, 2], slice(1, None), 7, "x", 1.5)
STEPS = ("add", "add", "remove", "call", "call", "block", "block", "bare", "stop", "bad", "own", "own")


class Program:
    """One random program: each step is chosen, written down and done at once; blocks hold further steps."""

    def __init__(self, victim: Victim, seed: int) -> None:
        self.victim, self.model, self.hf = victim, victim.model, victim.hf
        self.rng = random.Random(seed)
        self.log: list[str] = []
        self.handles: list[Any] = []
        self.open: list[tuple[Any, ...]] = []

    def run(self) -> None:
        """Do some steps, then take away what a user would have to take away; whatever was raised is over."""
        with contextlib.suppress(LensError, TheirError):
            self.steps(self.rng.randint(1, 3), depth=0)
        self.rng.shuffle(self.open)
        for context in self.open:  # blocks that were entered by hand end in any order
            with contextlib.suppress(LensError):
                context[0].__exit__(None, None, None)
        self.rng.shuffle(self.handles)
        for handle in self.handles:
            handle.remove()
        if any(entry.is_permanent for entry in self.model.added_hooks) and self.rng.random() < 0.5:
            self.model.reset_hooks()
            assert all(entry.is_permanent for entry in self.model.added_hooks), "reset_hooks left a hook"
        self.model.reset_hooks(including_permanent=True)

    def steps(self, count: int, depth: int) -> None:
        """Do some random steps."""
        for _ in range(count):
            kind = self.rng.choice(STEPS)
            self.log.append("  " * depth + kind)
            do: Callable[[int], None] = getattr(self, kind)
            try:
                do(depth)
            except (LensError, TheirError) as error:
                self.log[-1] += f" -> {type(error).__name__}"
                if self.rng.random() < 0.3:
                    raise

    def entry(self) -> tuple[Any, ...]:
        """Choose a hook: mostly sound, now and then not."""
        name = self.rng.choice(self.victim.names) if self.rng.random() < 0.95 else self.rng.choice(BAD_NAMES)
        fn, positions = self.rng.choice(FUNCTIONS), self.rng.choice(POSITIONS)
        self.log.append(f"    hook {name!r} {fn.__name__} {positions!r}")
        return (name, fn) if positions is None else (name, fn, positions)

    def entries(self) -> dict[str, Any]:
        """Choose hooks of a call or block."""
        forward = [self.entry() for _ in range(self.rng.randint(0, 2))]
        backward = [self.entry()[:2] for _ in range(self.rng.random() < 0.15)]
        return {"fwd_hooks": forward, "bwd_hooks": backward}

    # ------------------------------------------------------------------ the steps

    def add(self, depth: int) -> None:
        """Add a hook until it is taken away."""
        name, fn, *positions = self.entry()
        options = {"is_permanent": self.rng.random() < 0.3, "level": self.rng.choice([None, 1, 2])}
        direction = self.rng.choice(["fwd", "fwd", "fwd", "bwd"])
        self.model.add_hook(name, fn, direction, **options, positions=positions[0] if positions else None)

    def remove(self, depth: int) -> None:
        """Take hooks away, by one of the ways there are."""
        point = self.model.hook_dict[self.rng.choice(self.victim.names)]
        point.remove_hooks(including_permanent=True)
        assert not point.has_hooks()
        if self.rng.random() < 0.5:
            self.model.reset_hooks(level=self.rng.choice([None, 1]), direction=self.rng.choice(["fwd", "bwd", "both"]))

    def call(self, depth: int) -> None:
        """Call the model in one of its ways."""
        way, options = self.rng.random(), self.entries()
        if way < 0.02:
            self.model.generate(TOKENS, 2, **GREEDY)
        elif way < 0.06:
            loss = self.model.run_with_hooks(TOKENS, return_type="loss", **options)
            loss.backward()
        elif way < 0.3:
            self.model.run_with_cache(TOKENS, names_filter=self.rng.choice(self.victim.names))
        else:
            with torch.no_grad():
                self.model.run_with_hooks(TOKENS, **options)

    def bare(self, depth: int) -> None:
        """Call the model, or HF's."""
        with torch.no_grad():
            (self.model if self.rng.random() < 0.5 else self.hf)(TOKENS)

    def stop(self, depth: int) -> None:
        """Leave blocks out."""
        with torch.no_grad():
            self.model(TOKENS, stop_at_layer=self.rng.choice([0, 1, -1, 9]))

    def block(self, depth: int) -> None:
        """Do steps in a block, which may be left by an exception, or entered and left by hand."""
        if depth == 3:
            return
        context = self.model.hooks(**self.entries()) if self.rng.random() < 0.7 else self.model.caching(("z", 0))
        if self.rng.random() < 0.25:
            self.open.append((context, context.__enter__()))
            return
        with context:
            self.steps(self.rng.choice([0, 1, 1, 2]), depth + 1)
            if self.rng.random() < 0.2:
                self.log.append("  " * depth + "left by an exception")
                raise TheirError

    def bad(self, depth: int) -> None:
        """Ask for what there is not."""
        self.model.run_with_cache(TOKENS, names_filter=self.rng.choice(BAD_NAMES[:-2]))

    def own(self, depth: int) -> None:
        """Put a torch hook of the user's own on a module, or take one away."""
        if self.handles and self.rng.random() < 0.5:
            self.handles.pop(self.rng.randrange(len(self.handles))).remove()
            return
        module = self.rng.choice(list(self.hf.modules()))
        register = self.rng.choice([module.register_forward_hook, module.register_forward_pre_hook])
        self.handles.append(register(lambda *_: None, prepend=self.rng.random() < 0.5))


EVERY = 250
"""After how many programs all of the model's state is compared."""


def run_programs(kind: str, count: int) -> None:
    """Run programs on one model of a kind, and assert after each that nothing is left of it."""
    one = victim(kind)
    modules = list(one.hf.modules())
    for seed in range(count):
        program = Program(one, seed)
        program.run()
        told = f"program {seed}:\n" + "\n".join(program.log)
        assert one.model.added_hooks == [], told
        assert not active_runs(), told
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in modules), told
        if seed % EVERY == 0 or seed == count - 1:
            one.hf.zero_grad(set_to_none=True)
            assert one.left() + one.generates_otherwise() == [], told
