"""Licences: what a README says, what a name says, and names that tell nobody where things lie."""

from pathlib import Path

import pytest

from mtllm_engine.model.licences import licence_of, licences_of, public_name
from tests.support.tiny import build_config


@pytest.mark.parametrize(
    ("model", "licence"),
    [
        ("facebook/nllb-200-distilled-600M", "CC-BY-NC-4.0"),
        ("/models/nllb-200-3.3B", "CC-BY-NC-4.0"),
        ("meta-llama/Meta-Llama-3-8B", "Llama 3 Community License"),
        ("meta-llama/Meta-Llama-3.1-8B-Instruct", "Llama 3.1 Community License"),
        ("/cache/models--meta-llama--Llama-3.2-1B/snapshots/0", "Llama 3.2 Community License"),
        ("someone/something", "unknown"),
    ],
)
def test_a_name_says_it_where_no_readme_does(model, licence):
    assert licence_of(model) == licence


@pytest.mark.parametrize(
    ("front_matter", "licence"),
    [
        ("license: apache-2.0", "apache-2.0"),
        ("license: other\nlicense_name: own-terms", "own-terms"),
        ("tags: [x]", "CC-BY-NC-4.0"),  # then the name does
        ("license: [", "CC-BY-NC-4.0"),  # no YAML
    ],
)
def test_a_readme_says_it_first(tmp_path, front_matter, licence):
    folder = tmp_path / "nllb-200"
    folder.mkdir()
    (folder / "README.md").write_text(f"---\n{front_matter}\n---\n# A model\n")
    assert licence_of(folder) == licence


def test_names_tell_nobody_where_a_model_lies(tmp_path):
    folder = tmp_path / "own" / "nllb"
    folder.mkdir(parents=True)
    assert public_name(folder) == "nllb"
    assert public_name(Path("facebook/nllb-200")) == "facebook/nllb-200"
    config = build_config(tmp_path, model={"encoder": str(folder), "decoder": "a/b"})
    assert licences_of(config) == {"nllb": "unknown", "a/b": "unknown"}
