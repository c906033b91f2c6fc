"""SmolLM2-135M under lens: its numbers checked against HuggingFace's, and how it finds an indirect object.

`make real` runs `python -m examples.smollm2`; docs/ioi.md tells what comes out.
"""
