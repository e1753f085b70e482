from collections.abc import Iterator

import pytest

from mtllm_engine import kernels


@pytest.fixture(autouse=True)
def _packages_are_looked_for_again() -> Iterator[None]:
    """An implementation remembers what it imported, which was a test's stand-in perhaps."""
    yield
    for implementation in kernels.discover()["attention"].implementations.values():
        if implementation.package:
            vars(implementation).pop("function", None)
