"""The Hugging Face hub: what of a repository is fetched, and what to do where it gives nothing.

A repository may hold the same weights several times; one format of them is fetched.
"""

import re
from collections.abc import Callable, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import TypeVar

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

EXPORTED = "mtllm.json"
"""The record of an exported folder, whose models lie in folders of it."""
SAFETENSORS = ("*model.safetensors", "*model-*-of-*.safetensors")
SAFETENSORS += ("*projection.safetensors", "*head.safetensors")
TORCH = ("*model.bin", "*model-*-of-*.bin")
FILES = ("*.json", "*.model", "vocab.txt", "merges.txt", *SAFETENSORS, *TORCH)
"""What is read of a repository: others' copies, such as `consolidated.safetensors`, are not."""
T = TypeVar("T")
HUB_ID = re.compile(r"\w[\w.-]*(?:/\w[\w.-]*)?")


def fetch(name: str) -> Path:
    """The snapshot of a hub id, downloaded if need be.

    Raises:
        ValueError: There is none; the message says what to do.
    """
    names = _ask(name, lambda: _listed(name))
    if names is None:  # what was fetched earlier must do
        return cached(name)
    wanted = wanted_files(names)
    _check_weights(name, names, wanted)
    return Path(_ask(name, lambda: snapshot_download(name, allow_patterns=wanted)))


def snapshot(name: str) -> str:
    """The path of a hub id of the form OWNER/NAME, as `fetch`; of all else the name itself."""
    is_id = "/" in name and HUB_ID.fullmatch(name) and not Path(name).exists()
    return str(fetch(name)) if is_id else name


def look(name: str) -> Path | None:
    """The snapshot of a hub id that was fetched earlier, without asking the hub; None: it has one,
    and nothing of it is fetched.

    Raises:
        ValueError: As `fetch`.
    """
    try:
        return cached(name)
    except (LocalEntryNotFoundError, HFValidationError):
        _ask(name, lambda: _listed(name))
        return None


def wanted_files(names: Sequence[str]) -> list[str]:
    """Of the files of a repository those that are read."""
    if EXPORTED not in names:  # whose folders hold others' formats and earlier steps
        names = [name for name in names if "/" not in name]
    has_safetensors = any(fnmatch(name, form) for name in names for form in SAFETENSORS)
    forms = FILES[: -len(TORCH)] if has_safetensors else FILES
    return [name for name in names if any(fnmatch(name, form) for form in forms)]


def _listed(name: str) -> list[str] | None:
    """A repository's files; None: it cannot be asked, and there is a copy in the cache."""
    if not HUB_ID.fullmatch(name):
        raise HFValidationError(name)
    validate_repo_id(name)
    try:
        return [each.rfilename for each in HfApi().model_info(name).siblings or ()]
    except Exception:
        try:
            cached(name)
        except LocalEntryNotFoundError:
            pass
        else:
            return None
        raise


def cached(name: str) -> Path:
    """The snapshot that was fetched earlier, whatever files it has; the hub is not asked.

    Raises:
        LocalEntryNotFoundError: There is none.
    """
    # No file is asked for: the listing may name formats that were never fetched.
    return Path(snapshot_download(name, allow_patterns=["-"], local_files_only=True))


def _check_weights(name: str, names: Sequence[str], wanted: Sequence[str]) -> None:
    """Raises: ValueError: All that a repository has are files for other programs."""
    packed = [each for each in names if each.endswith(".gguf")]
    if packed and not any(each.endswith((".safetensors", ".bin")) for each in wanted):
        steps = f"`hf download {name} {packed[0]}`, then `mtllm models import FILE --out DIR`"
        raise ValueError(f"{name} has GGUF files alone; take one by {steps}, and name DIR")


def _ask(name: str, question: Callable[[], T]) -> T:
    """Raises: ValueError: Whatever went wrong, in a line."""
    try:
        return question()
    except Exception as error:  # the client raises a dozen unrelated types
        raise ValueError(_reason(name, error)) from error


def _reason(name: str, error: Exception) -> str:
    """Why the hub gave nothing, and what to do."""
    lack, log_in = f"{name} is neither a folder nor a model", "`hf auth login` (or set HF_TOKEN)"
    absent = f"there is no folder {name}, and no such model in the hub's cache"
    absent += ": mind the spelling; if it is the hub's,"
    if isinstance(error, HFValidationError):
        return f"{lack}'s name on the hub, which is OWNER/NAME: mind the folder's spelling"
    if isinstance(error, GatedRepoError):
        page = f"{constants.ENDPOINT}/{name}"
        return f"{name} is gated on the hub: accept its conditions at {page}, then {log_in}"
    if isinstance(error, RepositoryNotFoundError):
        return f"{lack} of the hub: mind the spelling; if it is private, {log_in}"
    if isinstance(error, OfflineModeIsEnabled):
        fetched = f"run `hf download {name}` where there is a network"
        return f"{absent} HF_HUB_OFFLINE is set: unset it, or {fetched}"
    said = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, HfHubHTTPError):
        return f"the hub does not give {name}; try again later: {said}"
    if isinstance(error, OSError) and error.errno is not None:
        return f"{name} cannot be written into {constants.HF_HUB_CACHE}: {error.strerror}"
    elsewhere = f"name a folder that `hf download {name} --local-dir DIR` made elsewhere"
    return f"{absent} {constants.ENDPOINT} cannot be reached: {elsewhere}"
