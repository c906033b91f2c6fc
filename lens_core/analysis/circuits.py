"""Circuits: the edges of a model's graph that do a job, run by themselves, found, and judged.

An edge leads from what writes to the residual stream to what reads it (see `lens_core.analysis.graph`). To cut it is to
give that one reader, in place of what the writer writes, something else: what it wrote on a corrupted input
(resampling), a mean, or nothing. All edges are cut in one forward. A circuit is a set of edges; everything outside of
it is cut.

`run_circuit` runs one, `acdc` and `circuit_of_scores` find one, `faithfulness` and `completeness` judge circuits by
size, `component_effects` whether one is minimal. `edge_effects` cuts each edge by itself: what attribution to edges
approximates.
"""

from lens_core.analysis._acdc import acdc
from lens_core.analysis._circuit import Circuit, circuit_of_scores
from lens_core.analysis._circuit_curves import CircuitCurve, completeness, faithfulness
from lens_core.analysis._circuit_runs import ComponentEffects, EdgeEffects, component_effects, edge_effects, run_circuit

__all__ = [
    "Circuit",
    "CircuitCurve",
    "ComponentEffects",
    "EdgeEffects",
    "acdc",
    "circuit_of_scores",
    "completeness",
    "component_effects",
    "edge_effects",
    "faithfulness",
    "run_circuit",
]
