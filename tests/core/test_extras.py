"""Packages that only some functions need."""

import pytest

from lens_core import MissingPackageError
from lens_core._extras import need


def test_a_package_that_is_there_is_imported():
    """The module that was asked for, not its package."""
    assert need("scipy.stats", "an interval").__name__ == "scipy.stats"


def test_a_package_that_is_not_there_is_named_with_its_remedy():
    """And can be caught as an ImportError."""
    with pytest.raises(MissingPackageError, match=r"a data frame needs fandas.*pip install 'lens-core\[analysis\]'"):
        need("fandas", "a data frame")
    assert issubclass(MissingPackageError, ImportError)


def test_a_package_that_lacks_something_itself_is_not_called_missing(tmp_path, monkeypatch):
    """The reader should look for the other one."""
    (tmp_path / "halfway.py").write_text("import nowhere_to_be_found")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="nowhere_to_be_found"):
        need("halfway", "a data frame")
