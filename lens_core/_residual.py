"""The residual stream taken apart."""


class ResidualAlgebra:
    """Methods of an activation cache that decompose the residual stream."""
