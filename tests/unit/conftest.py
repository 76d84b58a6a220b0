"""Fixtures for the tests of batches."""

from functools import partial

import pytest

from tests.tools.batches import write_notebook


@pytest.fixture
def notebook(tmp_path):
    """Write a notebook of code cells, the first of them tagged `parameters`, and return its path."""
    return partial(write_notebook, tmp_path)
