#!/usr/bin/env python
"""Write docs/techniques.md's table of what runs on which family, by running it on the toys.

python scripts/technique_table.py            # write it
python scripts/technique_table.py --check    # exit 1 where it is out of date
"""

import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import attrs
import torch
from generated import update

import lens_core as lens
from lens_core.analysis import (
    activations,
    attention,
    attribution,
    circuits,
    comparing,
    direct,
    dose_response,
    evals,
    gradients,
    head_detection,
    head_kinds,
    logit_lens,
    paths,
    probing,
    prompts,
    singular,
    ssm_flow,
    ssm_knockout,
    ssm_patching,
    steering,
    tuned_lens,
)

DOCS = Path(__file__).parents[1] / "docs"
FAMILIES = {"GPT-2": "toy:gpt2", "Llama": "toy:llama", "Mamba": "toy:mamba", "Mamba-2": "toy:mamba2"}
CLEAN = "king apple river moon book king apple river"
CORRUPTED = CLEAN.replace("moon", "door")


@attrs.frozen(eq=False)
class Subject:
    """A toy, and its run on the clean prompt."""

    model: Any
    cache: Any

    def metric(self, logits: torch.Tensor) -> torch.Tensor:
        """Give the difference of two logits at the last position, one for each row."""
        moon, door = (self.model.to_single_token(word) for word in ("moon", "door"))
        return logits[:, -1, moon] - logits[:, -1, door]


def _cached(name: str) -> Callable[[Subject], Any]:
    def sweep(one: Subject) -> Any:
        _, cache = one.model.run_with_cache(CLEAN, names_filter=name)
        return lens.patching.patch_sweep(one.model, CORRUPTED, cache, one.metric, name, positions=-1)

    return sweep


def _states(one: Subject) -> Any:
    _, cache = one.model.run_with_cache(CLEAN, names_filter="ssm_state")
    return ssm_patching.sweep_states(one.model, CORRUPTED, cache, one.metric, positions=[4])


def _undone(one: Subject) -> Any:
    try:
        return one.model.process_weights()
    finally:
        one.model.undo_passes()


def _spliced(one: Subject) -> Any:
    class Same(torch.nn.Identity):
        encode = decode = torch.nn.Identity.forward

    with one.model.saes({"blocks.0.hook_resid_post": Same()}, use_error_term=True):
        return one.model.run_with_cache(CLEAN, names_filter="blocks.0.hook_resid_post.hook_sae_acts_post")


def _linear(one: Subject) -> Any:
    return one.model.run_with_hooks(CLEAN, fwd_hooks=gradients.linearized(one.model))


def _texts(one: Subject) -> tuple[list[str], list[int]]:
    return [CLEAN, CORRUPTED] * 6, [0, 1] * 6


def _probed(one: Subject) -> Any:
    texts, labels = _texts(one)
    return probing.fit_probes(activations.collect_activations(one.model, texts, positions=4), labels, folds=2)


def _dosed(one: Subject) -> Any:
    vector = steering.steering_vector(one.model, [CLEAN], [CORRUPTED])
    return dose_response.dose_response(one.model, vector, CORRUPTED, one.metric, scales=(1.0,), n_random=1)


TECHNIQUES: dict[str, list[tuple[str, Callable[[Subject], Any]]]] = {
    "[Weights](weights.md)": [
        ("weights by name", lambda one: [one.model.weight_names, one.model.W_E, one.model.n_params_total]),
        ("`QK`, `OV`", lambda one: [one.model.QK.norm(), one.model.OV.norm()]),
        ("composition scores", lambda one: one.model.all_composition_scores("K")),
        ("singular vectors of `OV`", lambda one: singular.singular_vectors(one.model, "OV", 1, head=0)),
        ("singular vectors of `W_out`", lambda one: singular.singular_vectors(one.model, "W_out", 1)),
        ("singular vectors of `W_out_proj`", lambda one: singular.singular_vectors(one.model, "W_out_proj", 1)),
    ],
    "[Weight passes](processing.md)": [
        (f"`{one.name}`", lambda subject, one=one: one(subject.model, copy=True)) for one in lens.passes.PASSES
    ]
    + [("all that hold, and back", _undone)],
    "[The residual stream](residual.md)": [
        ("`decompose_resid`, `logit_attrs`", lambda one: one.cache.logit_attrs(one.cache.decompose_resid(), "moon")),
        *(
            (
                f"direct logit attribution by {unit}",
                lambda one, unit=unit: direct.direct_logit_attribution(one.model, CLEAN, "moon", unit=unit),
            )
            for unit in ("component", "layer", "head", "neuron", "source")
        ),
    ],
    "[Lenses](lenses.md), [comparing](comparing.md)": [
        ("logit lens", lambda one: logit_lens.logit_lens(one.model, CLEAN)),
        ("tuned lens", lambda one: tuned_lens.fit_tuned_lens(one.model, [CLEAN], held_out=[CORRUPTED])),
        ("`lens.compare`", lambda one: comparing.compare(one.model, one.model, [CLEAN])),
    ],
    "[Heads](heads.md)": [
        ("`detect_head`", lambda one: head_detection.detect_head(one.model, CLEAN, "induction_head")),
        ("`score_heads`", lambda one: head_kinds.score_heads(one.model, n_texts=2, length=8)),
        (
            "`score_heads(effective=True)`",
            lambda one: head_kinds.score_heads(one.model, n_texts=2, length=8, effective=True),
        ),
        ("attention statistics", lambda one: attention.attention_statistics(one.model, [CLEAN])),
        ("effective attention", lambda one: one.cache.effective_attention(1)),
    ],
    "[Patching](patching.md)": [
        ("sweep of the residual stream", _cached("resid_pre")),
        ("sweep of heads", _cached("z")),
        ("sweep of patterns", _cached("pattern")),
        ("sweep of the MLP's neurons", _cached("mlp_post")),
        ("sweep of states", _cached("ssm_state")),
        ("sweep of states, a forward for each", _states),
        ("knockout of attention", lambda one: ssm_knockout.knockout(one.model, "attention", 2)),
    ],
    "[Attribution](attribution.md), [gradients](gradients.md)": [
        ("nodes", lambda one: attribution.attribute_nodes(one.model, CLEAN, CORRUPTED, one.metric)),
        ("edges (EAP)", lambda one: attribution.attribute_edges(one.model, CLEAN, CORRUPTED, one.metric)),
        (
            "integrated gradients (EAP-IG)",
            lambda one: attribution.attribute_edges(one.model, CLEAN, CORRUPTED, one.metric, method="ig-inputs"),
        ),
        ("time edges", lambda one: ssm_flow.attribute_states(one.model, CLEAN, CORRUPTED, one.metric)),
        ("linearised", _linear),
    ],
    "[Paths](paths.md), [circuits](circuits.md)": [
        ("path patching", lambda one: paths.path_sweep(one.model, CLEAN, CORRUPTED, "logits", one.metric)),
        ("ACDC", lambda one: circuits.acdc(one.model, CLEAN, CORRUPTED, 1.0, metric=one.metric)),
    ],
    "[Probing](probing.md), [steering](steering.md)": [("probes", _probed), ("steering, dose and response", _dosed)],
    "[Sparse autoencoders](saes.md)": [("splice with an error term", _spliced)],
    "[Prompts and evaluations](heads.md)": [
        ("`test_prompt`", lambda one: prompts.test_prompt(CLEAN, "moon", one.model, print_details=False)),
        ("induction loss", lambda one: evals.induction_loss(one.model, subseq_len=16)),
    ],
}


def _tried(run: Callable[[Subject], Any], one: Subject) -> str:
    """Run it: an empty string, or why it is refused."""
    try:
        run(one)
    except lens.LensError as error:
        return str(error).splitlines()[0]
    return ""


def _reasons(title: str, told: list[str]) -> Iterator[str]:
    """Say once what several families say alike."""
    for why in dict.fromkeys(why for why in told if why):
        alike = (family for family, one in zip(FAMILIES, told, strict=True) if one == why)
        yield f"- {title}, {', '.join(alike)}: {why}"


def lines() -> Iterator[str]:
    """Give the table, and what is said where something is refused."""
    subjects: list[Subject] = []
    for name in FAMILIES.values():
        model = lens.load(name)
        _, cache = model.run_with_cache(CLEAN)
        subjects.append(Subject(model, cache))
    reasons: list[str] = []
    yield "| technique | " + " | ".join(FAMILIES) + " |"
    yield "|---" * (len(FAMILIES) + 1) + "|"
    for page, techniques in TECHNIQUES.items():
        yield f"| **{page}** |" + " |" * len(FAMILIES)
        for title, run in techniques:
            told = [_tried(run, one) for one in subjects]
            reasons += _reasons(title, told)
            yield f"| {title} | " + " | ".join("no" if why else "yes" for why in told) + " |"
    yield from ("", "What the refusals say:", "", *reasons)


if __name__ == "__main__":
    logging.disable()
    torch.manual_seed(0)
    sys.exit(update(DOCS / "techniques.md", "techniques", "\n".join(lines()), check="--check" in sys.argv[1:]))
