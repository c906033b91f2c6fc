"""What each process of tests/core/test_tensor_parallel.py does: run every check and write what it found to a file.

Called by torchrun as `tensor_parallel_worker.py FOLDER`: the folder holds checkpoints of two blocks, by variant, and
gets `RANK.json` with a record for each check. The reference is the same checkpoint, loaded whole into the same process.
All is in true float64, where rounding is below 1e-12 and any mistake far above.
"""

import datetime
import json
import sys
import traceback
import warnings
from functools import cache
from pathlib import Path

import torch
from torch import distributed

sys.path.insert(0, str(Path(__file__).parents[1]))

from lens_conformance.float64 import true_float64
from transformers.distributed import DistributedConfig

import lens_core as lens

FOLDER = Path(sys.argv[-1])  # the only argument; pytest imports this file, too
TOKENS = torch.randint(0, 28, (2, 6), generator=torch.Generator().manual_seed(0))
CLEAN = torch.randint(0, 28, (2, 6), generator=torch.Generator().manual_seed(1))
VARIANTS = ("llama", "qwen3", "phi3", "mixtral")
CHECKS = []


def check(*variants):
    """Let a function be run on these variants; it gives a record that JSON can hold."""

    def register(function):
        CHECKS.extend((function, variant) for variant in variants)
        return function

    return register


@cache
def pair(variant):
    """Load a checkpoint whole, and cut over the processes."""
    whole = lens.load(str(FOLDER / variant))
    cut = lens.load(str(FOLDER / variant), distributed_config=DistributedConfig(tp_size=2))
    if hasattr(whole.hf_model.config, "num_experts_per_tok"):
        for model in (whole, cut):
            model.hf_model.set_experts_implementation("eager")  # the only way that takes float64
    return whole, cut


def names(model):
    """List every hook point, starred ones too."""
    return list(model.table)


def distance(found, expected):
    """Give the largest difference as a share of the largest value; infinite for another shape, -inf or dtype."""
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return float("inf")
    finite = expected.isfinite()
    if not torch.equal(finite, found.isfinite()):
        return float("inf")
    scale = expected[finite].abs().max().clamp(min=1e-30)
    return ((found[finite] - expected[finite]).abs().max() / scale).item()


def bend(value, hook):
    """Change every finite value, by different amounts, also where the first and the second half are alike."""
    if not value.is_floating_point():
        return None
    ramp = torch.linspace(0.5, 1.0, value.shape[-1], dtype=value.dtype)
    return torch.where(value.isfinite(), value * value * ramp + 0.03, value)


# ---------------------------------------------------------------------- every hook point, on each variant


@check(*VARIANTS)
@torch.no_grad()
def values(variant):
    """Every hook point's value; all at once, and one at a time."""
    whole, cut = pair(variant)
    logits, expected = whole.run_with_cache(TOKENS, names_filter=names(whole))
    found, together = cut.run_with_cache(TOKENS, names_filter=names(cut))
    assert set(expected) == set(together) == set(whole.table)
    record = {"logits": distance(found, logits)}
    record |= {name: distance(together[name], expected[name]) for name in expected}
    assert torch.equal(found, cut.hf_model(TOKENS).logits), "looking changed the logits"
    alone = {name: cut.run_with_cache(TOKENS, names_filter=name)[1][name] for name in expected if ".0." in name}
    return record | {f"{name} alone": distance(alone[name], expected[name]) for name in alone}


def edited(variant):
    """Edit each place of the first block and of the ends: how far from the reference, and how far that moved."""
    whole, cut = pair(variant)
    bare = whole(TOKENS)
    record = {}
    for name in names(whole):
        if name.startswith("blocks.1") or whole.table[name].dtype.startswith("int"):
            continue
        expected = whole.run_with_hooks(TOKENS, fwd_hooks=[(name, bend)])
        found = cut.run_with_hooks(TOKENS, fwd_hooks=[(name, bend)])
        record[name] = [distance(found.detach(), expected.detach()), distance(expected.detach(), bare.detach())]
    return record


@check(*VARIANTS)
@torch.no_grad()
def edits(variant):
    """Without gradients, where HF's linear maps take local tensors."""
    return edited(variant)


@check("llama")
def edits_with_gradients(variant):
    """With gradients, where HF's linear maps take distributed ones."""
    return edited(variant)


@check("llama", "mixtral")
def gradients(variant):
    """The gradient at every hook point, and of every parameter, while all are kept; then behind an edit."""
    record = {}
    for label, hooks in (
        ("", []),
        ("after an edit ", [("blocks.0.attn.hook_z", bend), ("blocks.0.mlp.hook_in", bend)]),
    ):
        grads, parameters = [], []
        for model in pair(variant):
            kept = [point.name for point in model.hook_points() if not point.dtype.startswith("int")]
            model.zero_grad()
            with model.hooks(fwd_hooks=hooks), model.caching(kept, detach=False) as activations:
                (model(TOKENS)[:, -1] ** 2).sum().backward()
            grads.append(activations.grad)
            parameters.append({name: one.grad for name, one in model.named_parameters() if one.grad is not None})
        expected, found = grads
        assert set(expected) == set(found)
        record |= {f"{label}{name}": distance(found[name], expected[name]) for name in expected}
        expected, found = parameters
        full = {name: getattr(grad, "full_tensor", lambda own=grad: own)() for name, grad in found.items()}
        assert set(expected) == set(full)
        record |= {f"{label}{name}.grad": distance(full[name], expected[name]) for name in expected}
    return record


@check(*VARIANTS)
def weights(variant):
    """Every weight view is whole."""
    whole, cut = pair(variant)
    record = {}
    for view in whole.declaration.weights:
        if view.per_layer:
            expected, found = whole.stacked_weight(view.name)[1], cut.stacked_weight(view.name)[1]
        else:
            expected, found = whole.weight(view.name), cut.weight(view.name)
        record[view.name] = distance(found.detach(), expected.detach())
    return record


# ---------------------------------------------------------------------- what one does with hooks


@check("llama")
@torch.no_grad()
def generation(variant):
    """Greedy decoding with a hook at each place inside of attention and the MLP, and what a cache keeps of it."""
    options = {"max_new_tokens": 4, "do_sample": False, "return_type": "tokens"}
    record = {}
    for place in ("attn.hook_z", "attn.hook_pattern", "attn.hook_rot_k", "hook_resid_mid"):
        kept, texts = [], []
        for model in pair(variant):
            with model.hooks([(f"blocks.0.{place}", bend)]), model.caching(["q", "pattern", "mlp_out"]) as activations:
                texts.append(model.generate(TOKENS, **options))
            kept.append(activations)
        assert torch.equal(*texts), f"another text with a hook at {place}"
        record |= {f"{place}: {name}": distance(kept[1][name], kept[0][name]) for name in kept[0]}
    return record


@check("llama")
@torch.no_grad()
def sweeps(variant):
    """Patching sweeps by the packed engine and by the exact one."""
    record = {}
    for place in ("resid_pre", "z", "mlp_out", "pattern"):
        for exact in (False, True):
            found = []
            for model in pair(variant):
                _, clean = model.run_with_cache(CLEAN, names_filter=place)
                result = lens.patching.patch_sweep(
                    model, TOKENS, clean, lambda logits: logits[:, -1, 3], place, positions=-1, exact=exact
                )
                found.append(result.values)
            record[f"{place} {exact}"] = distance(found[1], found[0])
    return record


@check("llama")
@torch.no_grad()
def partial_runs_and_states(variant):
    """stop_at_layer, start_at_layer, and a sequence in two calls."""
    found = []
    for model in pair(variant):
        residual = model(TOKENS, stop_at_layer=1)
        rest = model.run_with_hooks(residual, start_at_layer=1, fwd_hooks=[("blocks.1.attn.hook_z", bend)])
        _, state = model(TOKENS[:, :4], return_state=True)
        found.append([residual, rest, model(TOKENS[:, 4:], past_key_values=state), model(TOKENS)[:, 4:]])
    record = {f"{index}": distance(cut, whole) for index, (whole, cut) in enumerate(zip(*found, strict=True))}
    return record | {"two calls are one": distance(found[1][2], found[1][3])}


@check("llama")
@torch.no_grad()
def heads_attributed(variant):
    """The cache's algebra, which takes weights and activations together."""
    found = []
    for model in pair(variant):
        _, activations = model.run_with_cache(TOKENS)
        stack = activations.stack_head_results()
        found.append([stack, activations.logit_attrs(stack, 3)])
    return {f"{index}": distance(cut, whole) for index, (whole, cut) in enumerate(zip(*found, strict=True))}


# ---------------------------------------------------------------------- what is refused


def said(action):
    """Give the error that an action raises."""
    try:
        action()
    except lens.LensError as error:
        return [type(error).__name__, str(error)]
    return ["nothing", ""]


@check("llama")
def hf_names(variant):
    """HF's own modules: linear maps and what is outside of the cut parts; the rest is refused."""
    whole, cut = pair(variant)
    record = {}
    for name, _ in whole.hf_model.named_modules():
        if name.startswith("model.layers.0") or name in ("lm_head", "model.norm"):
            for side in ("input", "output"):
                place = f"hf.{name}.{side}"
                try:
                    expected = whole.run_with_cache(TOKENS, names_filter=place)[1][place]
                except lens.LensError:
                    continue  # no tensor there, or it is not called
                try:
                    record[place] = distance(cut.run_with_cache(TOKENS, names_filter=place)[1][place], expected)
                except lens.UnsupportedHookError as error:
                    record[place] = str(error)
    return record


@check("llama")
def refusals(variant):
    """What would need whole weights in place, or whole states in a file."""
    _, cut = pair(variant)
    _, state = cut(TOKENS, return_state=True)
    return {
        "passes": said(lambda: cut.process_weights(fold_ln=True)),
        "save": said(lambda: cut.save_state(state, FOLDER / "state.safetensors")),
        "load": said(lambda: cut.load_state(FOLDER / "state.safetensors")),
    }


@check("toy:gpt2")
def no_plan(variant):
    """A type without a plan of HF's is not loaded."""
    return {variant: said(lambda: lens.load(variant, distributed_config=DistributedConfig(tp_size=2)))}


@check("phi3-even")
@torch.no_grad()
def packed(variant):
    """A plan that gives each process some rows of both halves of a fused projection: no one stretch of it."""
    plan = {"model.layers.*.mlp.gate_up_proj": "packed_colwise", "model.layers.*.mlp.down_proj": "rowwise"}
    config = DistributedConfig(tp_size=2, tp_plan=plan)
    whole, cut = lens.load(str(FOLDER / variant)), lens.load(str(FOLDER / variant), distributed_config=config)
    places = {
        name: f"blocks.0.{name}" for name in ("mlp.hook_pre", "mlp.hook_pre_linear", "mlp.hook_out", "attn.hook_z")
    }
    record = {"logits": distance(cut(TOKENS), whole(TOKENS))}
    for name, place in places.items():
        try:
            found = cut.run_with_cache(TOKENS, names_filter=place)[1][place]
            record[name] = distance(found, whole.run_with_cache(TOKENS, names_filter=place)[1][place])
        except lens.UnsupportedHookError as error:
            record[name] = str(error)
    return record


@check("mixtral-even")
@torch.no_grad()
def other_meshes(variant):
    """Experts spread over processes are another mesh than tensor parallelism's."""
    config = DistributedConfig(tp_size=2, ep_size=2)
    cut = lens.load(str(FOLDER / variant), distributed_config=config)
    return {"experts": said(lambda: cut.run_with_cache(TOKENS))}


def main():
    """Run all checks, in one order on every process."""
    distributed.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    warnings.simplefilter("ignore")
    found = {}
    with true_float64():
        for function, variant in CHECKS:
            try:
                found[f"{function.__name__} {variant}"] = function(variant)
            except Exception:
                found[f"{function.__name__} {variant}"] = {"error": traceback.format_exc()}
    (FOLDER / f"{distributed.get_rank()}.json").write_text(json.dumps(found))
    distributed.barrier()
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
