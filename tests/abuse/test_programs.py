"""Ten thousand random programs on one model: at the end it is as it was, and so it is on the way."""

import subprocess
import sys
from pathlib import Path

import pytest
from abuse.programs import run_programs

TESTS = Path(__file__).parents[1]


@pytest.mark.filterwarnings("ignore::lens_core.CostWarning")
@pytest.mark.parametrize("kind", ["llama", "mamba", "mamba2"])
def test_random_programs_leave_the_model_as_it_was(kind):
    """After each of 500 no tap and no added hook is left; now and then all state and outputs are compared."""
    run_programs(kind, 500)


def test_ten_thousand_random_programs_leave_the_model_as_it_was():
    """The same in a process of its own: the checks of types that the tests run with cost three times the programs."""
    code = f"import sys; sys.path.insert(0, {str(TESTS)!r}); from abuse.programs import run_programs; "
    command = [sys.executable, "-W", "ignore", "-c", code + "run_programs('gpt2', 10_000)"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-5000:]
