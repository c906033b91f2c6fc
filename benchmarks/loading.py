"""Peak memory of loading a checkpoint from a folder, each time in a fresh process."""

import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

from transformers.utils import logging

from benchmarks.machine import PEAK
from benchmarks.models import random_model
from benchmarks.rows import Row
from benchmarks.settings import Settings

__all__ = ["rows"]

HF = "from transformers import AutoModelForCausalLM; model = AutoModelForCausalLM.from_pretrained(sys.argv[1])"
LENS = "import lens_core; model = lens_core.load(sys.argv[1], tokenizer=False)"


def rows(settings: Settings) -> Iterator[Row]:
    """Save a model, and load it again and again."""
    ratios: list[float] = []
    logging.disable_progress_bar()
    end = time.perf_counter() + 40 * settings.share
    with tempfile.TemporaryDirectory() as folder:
        random_model(settings.large)[0].save_pretrained(folder)
        while len(ratios) < min(3, settings.at_least) or (time.perf_counter() < end and len(ratios) < 7):
            ratios.append(1 / _peak(HF, folder) * _peak(LENS, folder))
    yield Row(group="memory", name="peak of loading a folder", unit="× HF", values=tuple(ratios), goal=1.05)


def _peak(code: str, folder: str) -> int:
    """Give the most memory that the process held, in the system's own unit."""
    command = [sys.executable, "-c", f"import sys\n{code}\n{PEAK}\nprint(peak)", folder]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])
