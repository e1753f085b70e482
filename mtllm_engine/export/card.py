"""What an exported folder says of itself: README.md as the hub's model card."""

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from mtllm_engine import config as configs
from mtllm_engine.config import Config
from mtllm_engine.data.shards import Manifest
from mtllm_engine.export.clients import class_of
from mtllm_engine.languages import NAMES
from mtllm_engine.model.licences import UNKNOWN, licences_of, public_name
from mtllm_engine.model.tensors import resolve
from mtllm_engine.training.checkpoint import record_of
from mtllm_engine.training.origins import summed_in
from mtllm_engine.training.trained import Trained, run_of

NON_COMMERCIAL = "cc-by-nc-4.0"
WHAT = {
    "distil": "distillation from the bare LLM (stage 1)",
    "distil from a task": "distillation from the fine-tuned LLM (stage 2)",
    "finetune": "fine-tuning on an English task",
}


def about(trained: Trained) -> dict[str, Any]:
    """What a person wants to know of what was trained, in words that are true on any machine."""
    if trained.is_exported:
        return dict(trained.record["about"])
    model = trained.config.model
    return {
        "encoder": public_name(model.encoder),
        "encoder_class": class_of(resolve(model.encoder)),
        "llm": public_name(model.decoder),
        "adapters": list(map(public_name, model.adapters)),
        "licences": licences_of(trained.config),
        "quantization": model.quantization,
        "is_sum": bool(summed_in(trained.folder)),
        "runs": _distinct(_runs(trained.folder)),
    }


def _distinct(runs: Iterator[dict[str, Any]]) -> list[dict[str, Any]]:
    """Several may stand on the same one."""
    return list({json.dumps(run, sort_keys=True): run for run in runs}.values())


def _runs(checkpoint: Path) -> Iterator[dict[str, Any]]:
    """The runs that a checkpoint stands on, then its own."""
    run = run_of(checkpoint)
    config = configs.load(run / "config.toml") if run else None
    origins = [*config.model.init_from, config.model.teacher] if config else summed_in(checkpoint)
    for origin in origins:
        if origin:
            yield from _runs(Path(origin).resolve())
    if run is None or config is None:
        return
    record = record_of(checkpoint) or {}
    taught = " from a task" if config.model.teacher and config.objective.kind == "distil" else ""
    yield {
        "what": config.objective.kind + taught,
        "task": config.task.name if taught or config.objective.kind == "finetune" else "",
        "steps": record.get("step"),
        "lr": config.optim.lr,
        "rank": config.lora.rank,
        "alpha": config.lora.alpha,
        "linears": list(config.lora.target_modules),
        "corpora": list(_corpora(config, record.get("identity", {}).get("data.train", []))),
        "validation": _validation(run, record.get("step")),
        "commit": _read_json(run / "environment.json").get("commit"),
    }


def _corpora(config: Config, fingerprints: Sequence[str]) -> Iterator[dict[str, str]]:
    """Of each its fingerprint, and what its manifest says where it still is there."""
    known = {}
    for folder in config.data.train:
        with contextlib.suppress(ValueError):
            manifest = Manifest.load(folder)
            about = {"language": manifest.language, "licence": manifest.licence}
            known[manifest.fingerprint] = about
    for fingerprint in fingerprints:
        yield {"fingerprint": fingerprint} | known.get(fingerprint, {})


def _validation(run: Path, step: int | None) -> dict[str, float]:
    """The last one until a step."""
    path, last = run / "metrics.jsonl", dict[str, float]()
    for line in path.read_text().splitlines() if path.is_file() else ():
        row = json.loads(line)
        if "validation_documents" in row and (step is None or row["step"] <= step):
            last = row
    return {key: value for key, value in last.items() if key.startswith(("step", "validation_"))}


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.is_file() else {}


def written(about: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    """README.md. Args: about: as `about`. settings: the folder's config.json."""
    sections = [
        _front_matter(about, settings),
        f"# {about['llm']} under {about['encoder']}",
        _licences(about),
        _summary(about, settings),
        _use(settings),
        _recipe(about),
        _limits(about, settings),
    ]
    return "\n\n".join(sections) + "\n"


def _front_matter(about: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    licence = about["licences"].get(about["encoder"], UNKNOWN).lower()
    parts = (about["encoder"], about["llm"], *about.get("adapters", ()))
    hub_ids = [name for name in parts if "/" in name]
    data = ModelCardData(
        license=licence if licence == NON_COMMERCIAL else "other",
        language=sorted({code[:3] for code in settings["languages"]}),
        base_model=hub_ids or None,
        library_name="transformers",
        pipeline_tag="feature-extraction",
        tags=["mt-llm", "sentence-transformers", "feature-extraction", "multilingual"],
    )
    return f"---\n{data.to_yaml()}\n---"


def _licences(about: Mapping[str, Any]) -> str:
    # The one that forbids most stands first.
    licences = sorted(about["licences"].items(), key=lambda each: each[1].lower() != NON_COMMERCIAL)
    lines = [f"- {name}: **{licence}**" for name, licence in licences]
    return "\n".join(["Its parts have these licences, and all of them bind you:", "", *lines])


def _summary(about: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    known = [NAMES.get(code, code) for code in settings["languages"]]
    verb = "reads" if settings["language_tokens"] or not known else "knows"
    reads = f"{len(known)} languages" if known else f"what {about['encoder']} reads"
    if settings["parts"] != "whole":
        reads += f", {settings['parts']} one by one"
    sight = "only what comes before" if settings["causal"] else "both sides"
    tasks = ", ".join(f"{task} ({head['kind']})" for task, head in settings["tasks"].items())
    what = "A machine-translation encoder" if settings["language_tokens"] else "An encoder"
    text = [
        f"{what} under an LLM (MT-LLM, arXiv 2406.12739). The encoder reads a text in any of its",
        "languages, a linear projection takes its states to the LLM, and the LLM goes on with",
        "adapters: they were trained on English to give the states that the LLM has when it reads",
        "a text itself.",
        *merged_first(about),
        *_encoder(about, settings),
        f"It {verb} {reads}; a token of the LLM sees {sight}; a text's vector is the mean of all",
        f"states; texts longer than {settings['max_length']} tokens are cut.",
        *([f"It answers: {tasks}."] if tasks else []),
        *([f"Languages: {', '.join(dict.fromkeys(known))}."] if known else []),
    ]
    return "\n".join(text)


def _encoder(about: Mapping[str, Any], settings: Mapping[str, Any]) -> Iterator[str]:
    if name := about.get("encoder_class"):
        yield f"The encoder is transformers' {name}."
    if prefix := settings["encoder_prefix"]:
        each = {"whole": "text", "lines": "line", "sentences": "sentence"}[settings["parts"]]
        yield f"Before each {each} it reads {json.dumps(prefix, ensure_ascii=False)}."


def merged_first(about: Mapping[str, Any]) -> list[str]:
    """The sentence that says which adapters are in the LLM's weights, if there are any."""
    chain = " and then ".join(about.get("adapters", ()))
    return [f"The LLM is {about['llm']} with the adapters {chain} merged into it."] if chain else []


def _use(settings: Mapping[str, Any]) -> str:
    codes = settings["languages"]
    code = "swh_Latn" if "swh_Latn" in codes or not codes else codes[0]
    language = f', language="{code}"' if settings["language_tokens"] else ""
    how = "Languages are codes of FLORES-200."
    if not language:
        how = "The encoder is not told the language, and `language=` may be left out."
    text = {"swh_Latn": "Habari ya dunia", "eng_Latn": "Hello, world"}.get(code, "...")
    return f"""## Use

With mtllm-engine, which trained it:

```python
from mtllm_engine import MTLLM

model = MTLLM.from_pretrained(DIR)
vectors = model.encode(["{text}"]{language})  # float32 (1, D)
```

With transformers 5 alone:

```python
from transformers import AutoModel

model = AutoModel.from_pretrained(DIR, trust_remote_code=True)
vectors = model.encode(["{text}"]{language})
```

With sentence-transformers 6{", one language a call" if language else ""}:

```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer(DIR, trust_remote_code=True)
vectors = model.encode(["{text}"]{language})
```

`DIR` is this folder, or its name on the hub. {how}"""


def _recipe(about: Mapping[str, Any]) -> str:
    lines = ["## How it was made", ""]
    if about["is_sum"]:
        lines += ["It is the sum of the adapters of several runs; the sum itself learned nothing."]
    lines += [line for run in about["runs"] for line in _run(run)]
    if about["quantization"] != "none":
        held = f"In training the LLM's weights were held as {about['quantization']}"
        lines += ["", f"{held}; this folder has them in full, so vectors differ a little."]
    if moved := about.get("moved"):
        mean, largest = (f"{100 * moved[key]:.2g} %" for key in ("mean", "largest"))
        lines += ["", "The adapters are merged into the LLM's weights. That moved the vectors of"]
        lines += [f"100 sentences by {mean} of their length on average, by {largest} at most."]
    return "\n".join(lines)


def _run(run: Mapping[str, Any]) -> Sequence[str]:
    task = f", {run['task']}" if run["task"] else ""
    adapters = f"rank {run['rank']}, alpha {run['alpha']:g}, on {', '.join(run['linears'])}"
    lines = [f"- {WHAT[run['what']]}{task}: {run['steps']} steps, lr {run['lr']:g}; {adapters}"]
    for corpus in run["corpora"]:
        language = f" in {corpus['language']}" if "language" in corpus else ""
        licence = f", licence {corpus['licence']}" if "licence" in corpus else ""
        lines.append(f"  - corpus{language}, manifest `{corpus['fingerprint']}`{licence}")
    if run["validation"]:
        named = {key: value for key, value in run["validation"].items() if key != "step"}
        values = ", ".join(
            f"{key.removeprefix('validation_')} {value:.4g}" for key, value in named.items()
        )
        at = f"after step {run['validation']['step']}, commit {run['commit'] or 'unknown'}"
        lines.append(f"  - held out: {values} ({at})")
    return lines


def _limits(about: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    lines = ["- A text must be in the language that is said; the encoder does not find it out."]
    if not settings["language_tokens"]:
        lines = ["- A text in any other language is read too, and nobody says how well."]
    lines.append(f"- What {about['encoder']} reads badly, this reads badly.")
    if settings["merged"]:
        lines.append('- Merged: `reader="teacher"`, the LLM without adapters, is no longer there.')
    for code, given in settings["fallback"].items():
        lines.append(f"- {code} is given to the encoder as {given}.")
    return "\n".join(["## Limits", "", *lines])
