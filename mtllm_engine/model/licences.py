"""What a model may be used for, as its folder or its name on the hub says."""

from pathlib import Path

from huggingface_hub import metadata_load, try_to_load_from_cache

from mtllm_engine.config import Config

UNKNOWN = "unknown"
# Beginnings of names, in lower case, where no README says it.
KNOWN = {
    "facebook/nllb-": "CC-BY-NC-4.0",
    "facebook/m2m100": "MIT",
    "cointegrated/sonar": "CC-BY-NC-4.0",
    "intfloat/multilingual-e5": "MIT",
    "meta-llama/llama-2": "Llama 2 Community License",
    "meta-llama/meta-llama-3": "Llama 3 Community License",
    "meta-llama/meta-llama-3.1": "Llama 3.1 Community License",
    "meta-llama/llama-3.1": "Llama 3.1 Community License",
    "meta-llama/llama-3.2": "Llama 3.2 Community License",
    "meta-llama/llama-3.3": "Llama 3.3 Community License",
    "huggingfacetb/smollm": "Apache-2.0",
}


def licence_of(model: str | Path) -> str:
    """The licence of a model's folder or hub id: what its README's front matter says, else what is
    known of its name, else "unknown". Nothing is fetched.
    """
    said = _front_matter(str(model))
    if (licence := said.get("license") or "other") != "other":
        return str(licence)
    if said.get("license_name"):
        return str(said["license_name"])
    name = public_name(model).lower()
    for beginning in sorted(KNOWN, key=len, reverse=True):
        # A folder has a hub id's last name.
        if name.startswith((beginning, beginning.partition("/")[2])):
            return KNOWN[beginning]
    return UNKNOWN


def licences_of(config: Config) -> dict[str, str]:
    """Of the encoder, the LLM and the adapters merged into it, by their public names."""
    models = (config.model.encoder, config.model.decoder, *config.model.adapters)
    return {public_name(model): licence_of(model) for model in models}


def public_name(model: str | Path) -> str:
    """A hub id as it is; of a folder its last name, for where it lies is nobody's business."""
    path = Path(model)
    for part in path.parts:  # of the hub's cache: models--OWNER--NAME/snapshots/REVISION
        if part.startswith("models--"):
            return part.removeprefix("models--").replace("--", "/")
    is_hub_id = len(path.parts) == 2 and path.parts[0] not in (".", "..", "~", "/")
    return str(model) if is_hub_id and not path.exists() else path.resolve().name


def _front_matter(model: str) -> dict:
    path = Path(model, "README.md")
    if not Path(model).is_dir() and model.count("/") == 1:
        cached = try_to_load_from_cache(model, "README.md")
        path = Path(cached) if isinstance(cached, str) else path
    if not path.is_file():
        return {}
    try:
        return metadata_load(path) or {}
    except Exception:  # PyYAML's own, and its users'
        return {}
