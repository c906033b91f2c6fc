"""Every model type that the kit knows, held to it; `--lens-level` asks for every check of every type at that level.

Where it does not, the first type of each family has every check at the default level, one type of each kind of block at
the fast one, and their kin the checks that see the whole model, so that all of it takes a few minutes.
"""

from lens_conformance._pytest import try_one
from lens_conformance.checks import all_checks
from lens_conformance.families import known_families

FIRST = ("gpt2", "llama", "mamba", "mamba2")
OF_A_KIND = (
    *("gemma2", "olmo2", "phi3", "granite", "stablelm", "hunyuan_v1_dense", "persimmon", "cohere2", "gpt_bigcode"),
    *("opt", "mixtral", "granitemoeshared", "gpt_oss", "glm4_moe", "falcon_mamba", "jamba", "nemotron_h", "falcon_h1"),
)
# Compiles the model: one type of each plugin tells whether lens can.
COMPILED = ("gpt2", "llama", "mamba", "mamba2", "opt", "jamba")
BRIEF = ("runs", "declaration", "logits", "fires", "equations", "values", "purity", "edits", "weights", "split")


def pytest_generate_tests(metafunc):
    """Choose the checks of each type."""
    is_whole = metafunc.config.getoption("--lens-level") is not None
    pairs = [
        (model_type, check)
        for check in all_checks()
        for model_type in known_families()
        if is_whole or check in BRIEF or model_type in (COMPILED if check == "capabilities" else (*FIRST, *OF_A_KIND))
    ]
    metafunc.parametrize(("model_type", "check"), pairs)


def test_conformance(model_type, check, request):
    """A check that is absent or not judged is a skip with its reason."""
    try_one(model_type, check, request, "default" if model_type in FIRST else "fast")
