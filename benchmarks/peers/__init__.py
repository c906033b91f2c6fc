"""Measure lens beside what a user would pick instead: `python -m benchmarks.peers`, or `make bench-peers`.

Each library runs in the environment that `scripts/peers` made for it, in processes of its own, one at a time. There it
does the work of each row turn by turn with plain HF, so that what is compared across environments is a ratio to HF and
never a time. What it computed is compared with what HF computes, too: a fast wrong number is no competitor.

`settings` says how large and how long, `worker` measures one library, `rows` and `startup` are what it measures,
`libraries` does the rows in each library's own words, `report` writes the table of docs/performance.md.
"""
