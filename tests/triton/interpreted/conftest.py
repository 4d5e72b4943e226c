"""Everything here runs in the checked interpreter: test_interpreted.py starts it with TRITON_INTERPRET=1."""

from collections.abc import Iterator

import pytest

from tests.triton.checked import Counts, checked


@pytest.fixture(autouse=True)
def counts() -> Iterator[Counts]:
    with checked() as counted:
        yield counted
