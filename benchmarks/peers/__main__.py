"""Measure every library, one process at a time: `python -m benchmarks.peers`."""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.peers.record import merged, read_results, write_results
from benchmarks.peers.settings import FULL, LIBRARIES, QUICK, ROWS, Settings

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).parent / "results"
SMOKE = ROOT / "build" / "peers"


def main(argv: Sequence[str] | None = None) -> None:
    """Make the models, measure, and put what was found into the results."""
    from benchmarks.peers.models import make

    options = _parser().parse_args(argv)
    settings = QUICK if options.quick else FULL
    changed = {"harvest_tokens": options.tokens} if options.tokens else {}
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        for model in options.models or settings.rows_of:
            rows = [row for row in settings.rows_of[model] if not options.rows or row in options.rows]
            if not rows:
                continue
            make(model, Path(folder) / model, is_quick=settings.is_quick)
            for library in options.only or LIBRARIES:
                print(f"{library}, {model} (after {time.perf_counter() - start:.0f} s)", flush=True)
                found = _run(library, model, Path(folder), rows, settings, changed)
                _keep((options.results or (SMOKE if options.quick else RESULTS)) / f"{library}.json", found)


def _run(
    library: str, model: str, folder: Path, rows: Sequence[str], settings: Settings, changed: Mapping[str, Any]
) -> Path:
    """Measure in the library's own environment, where nothing of this one is seen."""
    environment = LIBRARIES[library].environment
    python = sys.executable if environment is None else str(ROOT / ".venv" / environment / "bin" / "python")
    if environment is not None and not Path(python).exists():
        sys.exit(f"{library} has no environment: run scripts/peers, or `make bench-peers`, which does")
    # Threads that wait for each other sleep: spinning ones take the cores from one another on a busy machine.
    variables = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": str(settings.threads),
        "OMP_WAIT_POLICY": "PASSIVE",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if environment is not None:
        variables.pop("PYTHONPATH", None)
    result = folder / f"{library}.json"
    command = [python, "-m", "benchmarks.peers.worker", library, model, str(folder / model), *rows]
    command += ["--json", str(result), "--settings", json.dumps(dict(changed))]
    log = folder / "log"
    with log.open("w", encoding="utf-8") as errors:
        done = subprocess.run(
            command + (["--quick"] if settings.is_quick else []),
            cwd=ROOT, env=variables, stderr=errors, check=False,
        )  # fmt: skip
    if done.returncode:
        sys.exit(f"{library} on {model} failed:\n{log.read_text(encoding='utf-8')[-4000:]}")
    return result


def _keep(path: Path, found: Path) -> None:
    facts, cells = read_results(found)
    old = read_results(path)[1] if path.exists() else []
    write_results(path, facts, merged(old, cells))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description="Measure lens beside its peers.")
    parser.add_argument("--quick", action="store_true", help="a smoke test on tiny models; its numbers mean nothing")
    parser.add_argument("--only", nargs="+", choices=LIBRARIES, help="measure only these libraries")
    parser.add_argument("--rows", nargs="+", choices=ROWS, help="measure only these rows; the others stay as they were")
    parser.add_argument("--models", nargs="+", choices=FULL.rows_of, help="measure only on these models")
    parser.add_argument("--tokens", type=int, help=f"tokens to harvest (default: {FULL.harvest_tokens})")
    parser.add_argument(
        "--results",
        type=Path,
        help="the folder that results are kept in (default: results beside this file; with --quick, build/peers)",
    )
    return parser


if __name__ == "__main__":
    main()
