"""What `mtllm plan` says, written where it is read: the first lines of configs/presets/*.toml, and
beside what was measured or published, benchmarks/results/plan.md.

    python -m benchmarks.handbook
"""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

from mtllm_engine.kernels.lora_linear.quantised import BYTES

from mtllm_engine import outlook
from mtllm_engine.config import load
from mtllm_engine.outlook import SHARDED, WHOLE, Estimate, Subject, chosen, examine, layouts_of
from mtllm_engine.plan import plan
from mtllm_engine.training import cost, memory
from mtllm_engine.training.cost import Step, Texts, Work
from mtllm_engine.training.gpus import GPUS, SHARES, Cluster

ROOT = Path(__file__).resolve().parent.parent
PRESETS = sorted((ROOT / "configs" / "presets").glob("*.toml"))
OUT = ROOT / "benchmarks" / "results" / "plan.md"
MEASURED = ROOT / "benchmarks" / "results" / "h200"
MACHINES = {  # of presets: GPUs of a node, nodes, and which GPUs there may be
    "llama3_8b_1x24gb": (1, 1, ("4090",)),
    "llama3_8b_1x48gb": (1, 1, ("l40s",)),
    "llama3_8b_1x80gb": (1, 1, ("a100-80", "h100")),
    "llama3_8b_1x141gb": (1, 1, ("h200",)),
    "llama3_8b_8x80gb": (8, 1, ("a100-80", "h100")),
    "llama3_70b_16x80gb": (8, 2, ("a100-80", "h100")),
}
EXAMPLE = "configs/presets/llama3_8b_8x80gb.toml"
LENGTHS = Texts(350, 350)  # tokens of the documents of benchmarks.step
COMMENT = re.compile(r"# memory of a GPU.*\n(?:#  .*\n)+")


def clusters(path: Path) -> list[Cluster]:
    """The machines that a preset is for."""
    gpus, nodes, names = MACHINES[path.stem]
    return [Cluster(gpu=GPUS[name], gpus=gpus, nodes=nodes) for name in names]


def estimate(path: Path, cluster: Cluster) -> Estimate:
    """Of a preset as it stands, with texts of the benchmark's length."""
    subject = replace(examine(load(path), []), texts=LENGTHS)
    options = [subject.estimate(cluster, each) for each in layouts_of(subject.config, cluster)]
    return chosen(subject.config, options)


def comment(path: Path) -> str:
    """The lines with which a preset says what it needs and takes."""
    estimates = [estimate(path, each) for each in clusters(path)]
    first, steps = estimates[0], [each.step for each in estimates]
    lines = [f"#   {row.name:<22}{row.bytes / 1e9:7.2f}  {row.how}\n" for row in first.rows]
    card = f"of {first.step.cluster.gpu.gbytes:g}; logits: none"
    lines.append(f"#   {'total':<22}{first.bytes / 1e9:7.2f}  {card}\n")
    title = "# memory of a GPU in GB, and a run's time with texts of 350 tokens, by `mtllm plan`:\n"
    for step in steps:
        count = load(path).optim.steps
        took = f"{step.pairs_per_s:7,.0f}  pairs/s: {step.seconds:.2f} s a step, "
        took += f"{count * step.seconds / 3600:.1f} hours ({step.bound})"
        lines.append(f"#   {step.cluster.size} x {step.cluster.gpu.name:<18}{took}\n")
    return title + "".join(lines)


def with_comment(path: Path) -> str:
    """The preset's text as it must be."""
    return COMMENT.sub(lambda _: comment(path), path.read_text("utf-8"))


def example() -> str:
    """What the handbook shows, on a machine that has neither models nor corpora."""
    with mock.patch.object(outlook, "_at_hand", lambda name: None):
        return plan(str(ROOT / EXAMPLE), gpu="h100", gpus=8)


def with_example(handbook: str) -> str:
    """The handbook with what the command prints now."""
    block = re.compile(rf"(mtllm plan {EXAMPLE} .*?\n```\n\n```text\n).*?(?=```)", re.DOTALL)
    return block.sub(lambda found: f"{found[1]}{example()}\n", handbook)


def rows_measured() -> list[tuple[str, float, float]]:
    """(what, predicted, measured) of the steps on an H200."""
    found = []
    for file, form in (("step", "none"), ("step_fp8", "fp8")):
        lines = (MEASURED / f"{file}.jsonl").read_text("utf-8").splitlines()
        (row,) = (row for row in map(json.loads, lines) if row["variant"] == "ours")
        subject, step = measured_step(form, row)
        words = f"a step of Llama-3-8B on one H200, {form.replace('none', 'bf16')}"
        found.append((f"{words}: seconds", step.seconds, row["step_s"]["median"]))
        taken = memory.total(memory.rows(subject.config, subject.models, 1)) - memory.ASSUMED
        found.append((f"{words}: GB at the peak", taken / 1e9, row["peak_bytes"] / 1e9))
        forward, backward = ("encoder", "teacher", "student"), ("backward",)
        for name, parts in (("forward", forward), ("backward", backward)):
            own = sum(step.parts[part] for part in parts)
            found.append((f"{words}, {name}", own, sum(row["split_s"][part] for part in parts)))
    return found


def measured_step(form: str, row: dict[str, Any]) -> tuple[Subject, Step]:
    """What is predicted of a row of step.jsonl."""
    path = ROOT / "configs" / "presets" / "llama3_8b_1x141gb.toml"
    tokens = round(row["pair_tokens"])
    settings = ["data.lanes=1", f"memory.max_tokens={tokens}", f"data.pack_tokens={tokens}"]
    config = load(path, [*settings, f"model.quantization={form}"])
    subject = examine(config, [])
    work = Work(1, 1, row["documents"], tokens, tokens)
    step = cost.predict(config, subject.models, Cluster(gpu=GPUS["h200"]), work)
    return subject, step


def reference_hours(*, recomputes: bool) -> float:
    """The reference's stage 1 on 8 A100-80GB: 10,000 steps of 32 documents of 512 padded tokens a
    GPU, teacher and student one after the other, linears made full from NF4 for each product.

    Products reach the share of the peak that the padded baseline of step.jsonl reached on an H200,
    padding counted as work.

    Args:
        recomputes: Whether backward runs the student's forward once more.
    """
    lines = (MEASURED / "step.jsonl").read_text("utf-8").splitlines()
    (padded,) = (row for row in map(json.loads, lines) if row["variant"] == "padded")
    _, ours = measured_step("none", padded)
    tokens, seconds = padded["documents"] * 512, padded["step_s"]["median"]
    share = ours.flops * tokens / seconds / (1e12 * GPUS["h200"].tflops)
    gpu, weights = GPUS["a100-80"], ours.flops / 6
    passes = 4 if recomputes else 3  # of 2N, 2N and 2N, the student's forward twice
    compute_s = 2 * passes * weights * 32 * 512 / (1e12 * gpu.tflops * share)
    # 16 documents in a micro-batch: the baseline's activations of 32 are more than 80 GB.
    made_full = weights * (BYTES["nf4"] + 2) / (1e9 * gpu.gbytes_per_s * SHARES["memory"])
    return 10_000 * (compute_s + 2 * passes * made_full) / 3600


def our_hours(texts: Texts) -> dict[str, float]:
    """configs/paper_stage1.toml on 8 A100-80GB, by layout."""
    subject = replace(examine(load(ROOT / "configs" / "paper_stage1.toml"), []), texts=texts)
    cluster = Cluster(gpu=GPUS["a100-80"], gpus=8)
    steps = {each.name: subject.estimate(cluster, each).step for each in (WHOLE, SHARDED)}
    return {name: 10_000 * step.seconds / 3600 for name, step in steps.items()}


def table() -> str:
    """benchmarks/results/plan.md."""
    lines = ["<!-- python -m benchmarks.handbook -->", "# Predicted, and measured or published", ""]
    lines += ["| what | predicted | measured | error |", "|---|---|---|---|"]
    for words, predicted, measured in rows_measured():
        error = predicted / measured - 1
        lines.append(f"| {words} | {predicted:.3g} | {measured:.3g} | {error:+.1%} |")
    published = 22.0
    for words, repeats in (("", False), (", if it recomputes the student's forward", True)):
        hours = reference_hours(recomputes=repeats)
        name = f"the reference's stage 1, 8 A100-80GB{words}: hours"
        error = hours / published - 1
        lines.append(f"| {name} | {hours:.1f} | {published:.0f}, published | {error:+.1%} |")
    for words, texts in (("512", Texts(512, 512)), ("350", LENGTHS)):
        for layout, hours in our_hours(texts).items():
            name = f"ours, configs/paper_stage1.toml, texts of {words} tokens, {layout}: hours"
            lines.append(f"| {name} | {hours:.1f} | | |")
    return "\n".join([*lines, "", *REMARKS, ""])


REMARKS = (
    'Measured: the rows "ours" of h200/step.jsonl and h200/step_fp8.jsonl (median). The peak is',
    "PyTorch's, so CUDA's own 2 GB are left out of the estimate. The shares of the peaks come from",
    "h200/kernels.jsonl alone, where each kernel ran by itself; no share was set by a row of this",
    "table but the reference's, which is that of the padded baseline beside ours.",
    "",
    "- The step is predicted too short, most of all its backward, where gradients are added up in",
    "  more passes than are counted; in a step the chip is warmer than under one kernel.",
    "- In fp8 no product was measured alone. Its share of the peak is assumed; with bf16's, which",
    "  was tried first, the step came out 20 % too short, so that this row is no test of it.",
    "- For the reference two things decide: that a padded loop reaches the same share of the peak",
    "  on an A100 as on an H200, and whether backward runs the student again, which is not said.",
)


def write() -> None:
    """Writes the presets' comments and the table anew."""
    for path in PRESETS:
        path.write_text(with_comment(path), "utf-8")
    OUT.write_text(table(), "utf-8")
