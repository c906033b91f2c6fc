"""The machine and the versions that numbers come from."""

import os
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

__all__ = ["PEAK", "load_average", "machine"]

PACKAGES = ("torch", "transformers", "lens-core", "lens-gpt2")
# For a program of its own: sets `peak`, in the system's own unit. ru_maxrss of a process that was forked starts at its
# parent's peak; VmHWM, where there is one, starts anew.
PEAK = """
import pathlib, resource
status = pathlib.Path("/proc/self/status")
lines = status.read_text().splitlines() if status.exists() else []
own = [line.split()[1] for line in lines if line.startswith("VmHWM")]
peak = int(own[0]) if own else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
"""


def machine(threads: int, packages: Sequence[str] = PACKAGES) -> dict[str, str]:
    """Describe processor, system and the versions of some packages; no names or paths."""
    return {
        "processor": f"{_processor()}, {os.cpu_count()} cores",
        "threads": f"{threads} of torch's, OMP_WAIT_POLICY={os.environ.get('OMP_WAIT_POLICY', 'unset')}",
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "versions": ", ".join(f"{name} {version(name)}" for name in packages),
    }


def load_average() -> float:
    """Give how many programs wanted a core in the last minute."""
    return os.getloadavg()[0]


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()
