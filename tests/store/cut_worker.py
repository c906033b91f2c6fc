"""A harvest by a Llama that `torchrun` cut over its processes: `cut_worker.py MODEL FOLDER`."""

import sys

from store.subject import id_rows
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

import lens_core as lens

NAMES = ["blocks.0.mlp.hook_post", "blocks.1.hook_resid_pre", "blocks.1.attn.hook_z"]
SETTINGS = {"context": 9, "unit_documents": 20, "shard_rows": 7, "batch_size": 3}

if __name__ == "__main__":
    hf = AutoModelForCausalLM.from_pretrained(sys.argv[1], distributed_config=DistributedConfig(tp_plan="auto"))
    model = lens.load(hf.eval(), tokenizer=False)
    lens.store.harvest(model, id_rows(), sys.argv[2], NAMES, **SETTINGS)
