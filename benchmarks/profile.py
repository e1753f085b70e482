"""Where a step's time goes, by kinds of kernels, and what each kind could give at best.

    python -m benchmarks.profile step.jsonl [--out profile.md]   # of the rows of benchmarks.step

Times are PyTorch's profiler's: of kernels on a GPU, of operators on a CPU. The least that a kind
could take is the sum over its calls of what the ops' own `cost` says: bytes at a copy's rate, or
operations at a large product's, whichever is longer. `idle` is what is left of a step that was not
watched: the device waits for the host. What is computed again in backward counts there.
"""

import argparse
import contextlib
import json
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from mtllm_engine.kernels.contract import Cost, Kernel, named_tensors

from benchmarks.measure import patched

# The innermost of an event and those around it that has a name decides. `Backward` may follow.
KINDS = {
    "attention": r"_Sdpa|_Cudnn|_varlen_attn|aten::_(scaled_dot|flash|cudnn|efficient).*attention",
    "norms": r"_RmsNorm|aten::(native_layer_norm|_fused_rms_norm)|LigerRMSNorm",
    "rope": r"_Rope|LigerRope",
    "swiglu": r"_SwiGlu|Liger(SiLU|GELU)Mul",
    "projection": r"_Projection",
    "loss": r"_DistillLoss",
    "frozen products": r"_LoraLinear",
    "optimizer": r"Optimizer\.|aten::_(fused_adam|foreach)",
    "other products": r"aten::(addmm_?|mm|bmm|baddbmm|_scaled_mm|linear|matmul)$",
    "copies": r"aten::(copy_|cat|clone|contiguous|_to_copy|constant_pad_nd|index|index_select"
    r"|embedding|gather|stack|fill_|zero_)$",
}
_KINDS = [(kind, re.compile(rf"(torch_attn::|autograd::\S+ )?({p})")) for kind, p in KINDS.items()]
ADAPTERS, FROZEN, OTHER = "adapters", "frozen products", "other"
PRODUCTS = (FROZEN, "other products")
PRODUCT = re.compile(r"aten::(addmm_?|mm|bmm|_scaled_mm)$|mtllm::\w*product\w*")
QUANTISES = re.compile("quanti[sz]e", re.IGNORECASE)  # a kernel of fp8 or NF4
IN_BACKWARD = "autograd::engine::evaluate_function"
MOST_ADAPTERS = 3  # share a product: those of q, k and v
OPS = {  # whose bound is the `cost` of their calls
    "attention": "attention",
    "rms_norm": "norms",
    "rope": "rope",
    "swiglu": "swiglu",
    "projection": "projection",
    "distill_loss": "loss",
    "lora_linear": FROZEN,
}

Key = tuple[str, str]
"""Kind, and forward or backward."""


class Rates(NamedTuple):
    """What this device reaches at best."""

    bytes_per_s: float
    flops_per_s: float

    def least_s(self, cost: Cost) -> float:
        return max(cost.bytes / self.bytes_per_s, cost.flops / self.flops_per_s)


@dataclass
class Bounds:
    """Seconds that a step's calls of our ops must take, counted while they are made."""

    dtype: torch.dtype
    rates: Rates
    least_s: dict[Key, float] = field(default_factory=lambda: defaultdict(float))

    @contextlib.contextmanager
    def counting(self) -> Iterator[None]:
        call = Kernel.__call__

        def counted(kernel: Kernel, *args: Any, **kwargs: Any) -> Any:
            self._count(kernel, args, kwargs)
            return call(kernel, *args, **kwargs)

        with patched((Kernel, "__call__", counted)):
            yield

    def _count(self, kernel: Kernel, args: tuple, kwargs: dict[str, Any]) -> None:
        tensors = named_tensors((args, tuple(kwargs.values()))).values()
        learns = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
        case, kind = CASES[kernel.name](*args, **kwargs), OPS[kernel.name]
        costs = kernel.cost(self.dtype, **case)
        bare = kernel.cost(self.dtype, **case | {"adapted": ()}) if kind == FROZEN else costs
        forward = "backward" if torch._C._current_graph_task_id() >= 0 else "forward"
        for direction, whole, alone in zip((forward, "backward"), costs, bare):
            if direction == forward or learns:
                self.least_s[kind, direction] += self.rates.least_s(alone)
                rest = self.rates.least_s(whole) - self.rates.least_s(alone)
                if rest:
                    self.least_s[ADAPTERS, direction] += rest


def _attention(q_SHK, k_SGK, v_SGK, *, lengths, causal, **_) -> dict[str, Any]:
    shape = {"heads": q_SHK.shape[1], "kv_heads": k_SGK.shape[1], "width": q_SHK.shape[2]}
    return shape | {"lengths": lengths, "causal": causal}


def _lora_linear(x_SD, weight_FD, bias_F=None, adapters=(), *_, **__) -> dict[str, Any]:
    widths = [len(lora_B_fR) for _, _, lora_B_fR in adapters]
    members = (*widths, weight_FD.shape[0] - sum(widths))
    rank = len(adapters[0][1]) if adapters else 0
    about = {"members": members, "adapted": tuple(range(len(adapters))), "rank": rank}
    shape = {"tokens": x_SD.shape[0], "width": x_SD.shape[1]}
    return shape | about | {"dropout": 0.0, "bias": bias_F is not None}


def _distill_loss(
    student_SD, teacher_TD, norm_D, eps, student_spans, teacher_spans, weight_P, aligned_S=None
) -> dict[str, Any]:
    sides = {"student": student_spans, "teacher": teacher_spans}
    lengths = {
        side: tuple(spans.bounds_P2.diff(dim=1).flatten().tolist()) for side, spans in sides.items()
    }
    return {"width": student_SD.shape[1], "gap": 0, "aligned": aligned_S is not None} | lengths


# Of a call the case that `cost` takes
CASES: dict[str, Callable[..., dict[str, Any]]] = {
    "attention": _attention,
    "lora_linear": _lora_linear,
    "distill_loss": _distill_loss,
    "rms_norm": lambda x_SD, weight_D, eps, residual_SD=None: {
        "tokens": x_SD.shape[0],
        "width": x_SD.shape[1],
        "residual": residual_SD is not None,
    },
    "rope": lambda heads_SXK, cos_Sk, sin_Sk, num_rotated: {
        "tokens": heads_SXK.shape[0],
        "heads": heads_SXK.shape[1],
        "rotated": num_rotated,
        "width": heads_SXK.shape[2],
        "pairs": cos_Sk.shape[1],
    },
    "swiglu": lambda gate_up_SF, activation="silu", update=None: {
        "tokens": gate_up_SF.shape[0],
        "width": gate_up_SF.shape[1] // 2,
        "ranks": update[0].shape[1] if update else 0,
    },
    "projection": lambda x_SE, norm_E, norm_bias_E, eps, weight_DE, bias_D: {
        "tokens": x_SE.shape[0],
        "width": x_SE.shape[1],
        "out_width": weight_DE.shape[0],
        "bias": bias_D is not None,
        "grad": x_SE.requires_grad,
    },
}


def by_kind(events: Sequence[Any], *, on_gpu: bool, rank: int) -> dict[Key, dict[str, float]]:
    """Seconds and kernels (on a CPU: operators) of each kind in a profile that holds shapes.

    Args:
        events: The profiler's `events()`.
        rank: Of adapters: thinner products are theirs.
    """
    kinds: dict[Key, dict[str, float]] = defaultdict(lambda: {"s": 0.0, "count": 0})
    for event in events:
        if event.device_type != torch.autograd.DeviceType.CPU:
            continue  # a kernel: what launched it has it too
        if not on_gpu:
            entry = kinds[_kind(event, rank)]
            entry["s"] += event.self_cpu_time_total / 1e6
            entry["count"] += event.name.startswith("aten::")
            continue
        for kernel in event.kernels:
            kind, direction = _kind(event, rank)
            if kind == ADAPTERS and QUANTISES.search(kernel.name):
                kind = "quantising"
            entry = kinds[kind, direction]
            entry["s"] += kernel.duration / 1e6
            entry["count"] += 1
    return dict(kinds)


def _kind(event: Any, rank: int) -> Key:
    names, around = [], event
    while around is not None:
        names.append(around.name)
        around = around.cpu_parent
    direction = "backward" if any(name.startswith(IN_BACKWARD) for name in names) else "forward"
    known = (kind for name in names for kind, pattern in _KINDS if pattern.match(name))
    kind = next(known, OTHER)
    if kind in PRODUCTS:
        kind = _whose_product(event, names, kind, rank)
    return kind, direction


def _whose_product(event: Any, names: Sequence[str], kind: str, rank: int) -> str:
    """Frozen or an adapter's: of a product that is thin, and of all else in an adapted linear."""
    inside = any(name.startswith("_LoraLinear") for name in names)
    if not PRODUCT.match(event.name):
        return ADAPTERS if inside and not any(map(PRODUCT.match, names)) else kind
    shapes = [shape for shape in event.input_shapes if len(shape) == 2]
    if shapes and min(min(shape) for shape in shapes) <= MOST_ADAPTERS * rank:
        return ADAPTERS
    return FROZEN if inside else "other products"


def rows(
    measured: dict[Key, dict[str, float]], least_s: dict[Key, float], idle_s: float | None
) -> list[dict[str, Any]]:
    """A row for each kind and direction, the longest first."""
    keys = sorted(measured, key=lambda key: -measured[key]["s"])
    listed = [
        {"kind": kind, "pass": direction, **measured[kind, direction]}
        | {"least_s": least_s.get((kind, direction))}
        for kind, direction in keys
    ]
    if idle_s is not None:
        listed.append({"kind": "idle", "pass": "", "s": idle_s, "count": 0, "least_s": 0.0})
    return listed


def cells(profile: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    """What a person sees of such rows."""
    total_s = sum(row["s"] for row in profile)
    return [
        {
            "kind": f"{row['kind']} {row['pass']}".strip(),
            "ms": f"{1e3 * row['s']:.2f}",
            "share": f"{row['s'] / total_s:.1%}",
            "calls": f"{row['count']:.0f}",
            "least ms": "-" if row["least_s"] is None else f"{1e3 * row['least_s']:.2f}",
            "at its bound": _of_bound(row),
            "could give": _gain(row, total_s),
        }
        for row in profile
    ]


def _of_bound(row: dict[str, Any]) -> str:
    return f"{row['least_s'] / row['s']:.0%}" if row["least_s"] and row["s"] else "-"


def _gain(row: dict[str, Any], total_s: float) -> str:
    if row["least_s"] is None:
        return "-"
    return f"{max(0.0, row['s'] - row['least_s']) / total_s:.1%}"


def markdown(step_rows: Sequence[dict[str, Any]]) -> str:
    """A table for each row of a step that has a profile."""
    parts = []
    for row in step_rows:
        about = f"{row['variant']}, lengths {row['lengths']}, {row['dtype']}, {row['device']}"
        rates = (
            f"product {row['gemm_tflops']:.4g} TFLOP/s, copy {row['copy_gbytes_per_s']:.4g} GB/s"
        )
        lines = cells(row["profile"])
        table = [list(lines[0]), ["---"] * len(lines[0]), *(list(line.values()) for line in lines)]
        head = f"**{about}** (weights {row['weights']}, commit {row['commit']}; {rates})"
        parts.append("\n".join([head, "", *(f"| {' | '.join(each)} |" for each in table)]))
    return "\n\n".join(parts) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Entry of `python -m benchmarks.profile`."""
    parser = argparse.ArgumentParser(prog="benchmarks.profile")
    parser.add_argument("file", type=Path, metavar="FILE", help="of benchmarks.step --out")
    parser.add_argument("--out", type=Path, metavar="FILE", help="for Markdown (default: printed)")
    arguments = parser.parse_args(argv)
    listed = [json.loads(line) for line in arguments.file.read_text().splitlines()]
    text = markdown([row for row in listed if "profile" in row])
    if text == "\n":
        print(f"benchmarks.profile: error: no row of {arguments.file} has a profile")
        return 1
    arguments.out.write_text(text) if arguments.out else print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
