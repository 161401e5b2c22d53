"""The faults of `mutations.py` still have their place in the code."""

from pathlib import Path

import pytest
from mutations import FAULTS, ROOT


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.what)
def test_faults_have_a_place(fault):
    assert fault.change(Path(ROOT, "v4jax", fault.file).read_text()).count(fault.new)
    for name in fault.tests.split():
        assert Path(ROOT, name).exists(), name
