"""Ten thousand random programs on one model, and some on others: at the end it is as it was, and so on the way."""

import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parents[1]
COUNTS = {"gpt2": 10_000, "llama": 500, "mamba": 500, "mamba2": 500}
CODE = """
import sys
sys.path.insert(0, {tests!r})
from abuse.programs import run_programs
for kind, count in {counts!r}.items():
    run_programs(kind, count)
"""


def test_random_programs_leave_the_model_as_it_was():
    """In a process of its own: the checks of types that the tests run with cost three times the programs."""
    command = [sys.executable, "-W", "ignore", "-c", CODE.format(tests=str(TESTS), counts=COUNTS)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-5000:]
