"""What holds for every test, and must hold before torch and Triton are imported."""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "0")  # on busy cores OpenMP threads that spin cost ten times what sleepers do

import pytest
import torch
from hypothesis import settings

if not torch.cuda.is_available():  # Triton reads this once, when it is first imported: its kernels then run on the CPU
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Files that begin first where several run at once.
LONGEST = ("test_zero", "test_compile", "test_kernels", "test_recipe")

settings.register_profile("reproducible", derandomize=True, deadline=None, max_examples=50)
settings.load_profile("reproducible")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Those files in that order, then the others in their own."""
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))


@pytest.fixture(autouse=True, scope="session")
def cache_folder(tmp_path_factory):
    """Shard indices go to a folder of this session."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield
