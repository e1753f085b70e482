"""Import bridge: the ops of the top-level folder `kernels/` as `mtllm_engine.kernels.<op>`.

That folder has no `__init__.py`: as a package of its own it would shadow Hugging Face's `kernels`
wherever the repository root is on `sys.path`. Installed from a wheel it lies inside this package,
in a checkout beside it.
"""

import importlib
import pkgutil
from pathlib import Path

_here = Path(__file__).resolve().parent
__path__ = [
    str(folder) for folder in (_here / "kernels", _here.parent / "kernels") if folder.is_dir()
][:1]


def discover() -> dict:
    """Name -> `Kernel` of every op folder."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__) if module.ispkg)
    return {name: getattr(importlib.import_module(f"{__name__}.{name}"), name) for name in names}
