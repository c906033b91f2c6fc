"""The tiny models that SAEs are spliced into."""

import pytest
from sae.sae_subject import MAKERS, Subject


@pytest.fixture(scope="module")
def subjects():
    """Make every tiny model once."""
    return {kind: Subject(kind) for kind in MAKERS}
