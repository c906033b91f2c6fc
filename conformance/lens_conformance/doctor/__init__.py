"""What a model type that no plugin serves is, found out from tiny models of it: the kit's part of `lens doctor`."""

from lens_conformance.doctor.examination import Diagnosis, examine

__all__ = ["Diagnosis", "examine"]
