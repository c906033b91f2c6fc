"""One law suite for every family: each test runs for each subject (model type) and attention implementation.

For whoever adds a family
    1. Write the oracle `lens_conformance/golden/<family>.py` (no code of lens, nothing of transformers) with the
       interface of `gpt2.py` beside it, and prove it in `tests/golden` against HF in true float64.
    2. Write `tests/families/<family>.py` with `SUBJECTS: list[Subject]`; the fields are explained in `subject.py`.
    3. Add the module to `ALL` in `subjects.py`. The tests of this folder then run for it.
    4. Tests of what only this family has go to `tests/families/test_<family>_*.py`.

What a test asks for
    `subject` alone, or with `attn` (each of the subject's implementations).
    `wide` is the pair in float64, and the test runs inside `true_float64()`; `narrow` is the pair in float32. Both are
    shared by all tests: a test that trains, or changes parameters or mode, builds its own with `families.subject.pair`.

Markers
    `in_full`: only for subjects with `full`. `sampled`: not for `light` ones; those that are not `full` under their
    first implementation only. `once`: under the first implementation only. `subjects(fn)`: only those for which
    `fn(subject)` holds. Without a marker: all subjects, under each of their implementations.
"""

from collections.abc import Iterator

import pytest
import torch
from families.subject import Pair, shared_pair, true_float64
from families.subjects import SUBJECTS


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test that asks for `subject` for every subject, and for `attn` for each of its implementations."""
    if "subject" not in metafunc.fixturenames:
        return
    wanted = metafunc.definition.get_closest_marker("subjects")
    in_full, sampled, once = (metafunc.definition.get_closest_marker(name) for name in ("in_full", "sampled", "once"))
    chosen = [s for s in SUBJECTS if wanted is None or wanted.args[0](s)]
    chosen = [s for s in chosen if s.full or not (in_full or (sampled and s.light))]
    if "attn" in metafunc.fixturenames:
        few = [s for s in chosen if once or (sampled and not s.full)]
        cases = [(s, attn) for s in chosen for attn in s.implementations[: 1 if s in few else None]]
        metafunc.parametrize(("subject", "attn"), cases, ids=[f"{s.name}-{attn}" for s, attn in cases])
    else:
        metafunc.parametrize("subject", chosen, ids=[s.name for s in chosen])


@pytest.fixture
def wide(subject, attn) -> Iterator[Pair]:
    """Give the shared float64 pair, and let the test run in true float64."""
    with true_float64():
        yield shared_pair(subject.name, torch.float64, attn)


@pytest.fixture
def narrow(subject, attn) -> Pair:
    """Give the shared float32 pair: HF just as it is."""
    return shared_pair(subject.name, torch.float32, attn)
