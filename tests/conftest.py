"""What holds for every test, and must hold before torch and Triton are imported."""

import os

# On busy cores OpenMP threads that spin cost ten times what sleepers do.
os.environ.setdefault("GOMP_SPINCOUNT", "0")

import pytest
import torch
from hypothesis import HealthCheck, settings

# Triton reads this once, when it is first imported: its kernels then run on the CPU.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from tests.support.machine import threads

# Files that take ten seconds or more, the longest first: they begin first where several run at
# once, and `make check` leaves them out.
SLOW = (
    "test_zero",
    "test_zero_encoders",
    "test_zero_quantised",
    "test_compile",
    "test_kernels",
    "test_recipe",
    "test_commands",
    "test_gpu_suite",
    "test_slurm",
)
SLOW += ("test_prose", "test_poison", "test_step_benchmark", "test_native", "test_babel")
SLOW += ("test_convergence",)
SLOW += ("test_finetune", "test_run_folder", "test_launch", "test_origins", "test_provenance")
SLOW += ("test_probe", "test_systems", "test_span", "test_packaging", "test_quantised")
SLOW += ("test_sum_start", "test_sums", "test_checkpoint", "test_chain", "test_merged")
SLOW += ("test_folder", "test_sentences", "test_card", "test_encode", "test_show")
SLOW += ("test_encoders", "test_families", "test_family_runs", "test_inference")
SLOW += (
    "test_validate",
    "test_dry_run",
    "test_inference_tasks",
    "test_encoder_languages",
    "test_other_encoders",
)

# On busy cores drawing takes its time too, which is no test's failure.
PATIENT = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("reproducible", derandomize=True, max_examples=50, **PATIENT)
settings.register_profile("long", max_examples=500, **PATIENT)  # for `make prove`
settings.load_profile("reproducible")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow files in that order, then the others in their own."""
    order = {name: index for index, name in enumerate(SLOW)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))
    for item in items:
        if item.path.stem in order:
            item.add_marker("slow")


@pytest.fixture(autouse=True, scope="session")
def cache_folder(tmp_path_factory):
    """Shard indices go to a folder of this session."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def one_thread():
    """For a module of small tensors: `pytestmark = pytest.mark.usefixtures("one_thread")`."""
    with threads(1):
        yield
