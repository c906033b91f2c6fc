"""A store as a `datasets.Dataset`."""

import numpy as np
import pytest
import torch

from lens_core.errors import StoreError
from lens_core.store import ActivationStore, _arrow

from .made_store import LAST, RESID, made

datasets = pytest.importorskip("datasets")


def test_every_entry_is_a_row(tmp_path, monkeypatch):
    """With its values and where they come from, though it was written in many pieces."""
    monkeypatch.setattr(_arrow, "_BYTES", 1000)
    written = made(tmp_path / "store")
    store = ActivationStore(written.folder)
    found = store.to_dataset(tmp_path / "acts.arrow")
    assert found.column_names == ["token", "document", "offset", "position", "source", *store.names]
    assert found.num_rows == len(store)
    columns = {name: np.array(column) for name, column in found[:].items()}
    for name in ("token", "document", "offset", "position"):
        assert np.array_equal(columns[name], written.entries[f"{name}s"].numpy())
    for name, values in written.values.items():
        expected = values.float().numpy() if name == LAST else values.numpy()
        assert np.array_equal(columns[name], expected)
        assert str(expected.dtype) in str(found.features[name])
    assert not list(tmp_path.glob(".*"))


def test_names_choose_and_an_empty_store_has_no_rows(tmp_path):
    """The columns are there all the same."""
    store = ActivationStore(made(tmp_path / "store", ((0,),)).folder)
    found = store.to_dataset(tmp_path / "acts.arrow", ("resid_post", 0))
    assert found.num_rows == 0
    assert found.column_names[-1] == RESID
    with pytest.raises(StoreError, match="cannot be written to"):
        store.to_dataset(tmp_path / "none" / "acts.arrow")
    assert torch.is_tensor(store["z"][:])
