"""GPT-NeoX, held to the laws of lens."""

from lens_conformance import conformance

test_conformance = conformance("gpt_neox")
