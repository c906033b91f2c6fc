"""Measure lens against plain HuggingFace, in one process and interleaved: `python -m benchmarks`, or `make bench`.

Every group gives rows of paired measurements; a row has a goal where the project set one. `pairs` times, `rows` judges,
`report` shows. Nothing here is asserted in a test: a busy machine makes numbers worse, not the library wrong.
"""
