"""The machine and the versions that numbers come from."""

import os
import platform
from importlib.metadata import version
from pathlib import Path

__all__ = ["load_average", "machine"]


def machine(threads: int) -> dict[str, str]:
    """Describe processor, system and versions; no names or paths."""
    packages = ("torch", "transformers", "lens-core", "lens-gpt2")
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
