"""What a step takes on a GPU that need not be there: its time, what bounds it, and the bytes that
ranks send one another. An estimate: a sum over the step's operations, each as long as its
arithmetic or its memory traffic takes.

FLOPs and bytes are the kernels' own (`cost`). Peaks are the vendor's; which share of them is
reached was measured on one H200, kernel by kernel, and is taken to be the same elsewhere (SHARES).
Reading data, validation and checkpoints are not in it.
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import nn

from mtllm_engine.config import Config
from mtllm_engine.kernels.attention import attention
from mtllm_engine.kernels.contract import Cost
from mtllm_engine.kernels.distill_loss import distill_loss
from mtllm_engine.kernels.lora_linear import lora_linear
from mtllm_engine.kernels.lora_linear.quantised import BYTES
from mtllm_engine.kernels.projection import projection
from mtllm_engine.kernels.rms_norm import rms_norm
from mtllm_engine.kernels.rope import rope
from mtllm_engine.kernels.swiglu import swiglu
from mtllm_engine.model.decoder import DecoderLayer
from mtllm_engine.model.encoder import Encoder, EncoderLayer
from mtllm_engine.model.families import DecoderSpec
from mtllm_engine.model.padded import MAX_PADDING, PaddedEncoder
from mtllm_engine.model.stack import Stack
from mtllm_engine.training.log import pair_tokens
from mtllm_engine.training.memory import Models, Piece, pieces, zero_options

Command = Literal["train", "targets", "read"]
"""What is done with texts: learned from, by whatever learns; read by the teacher; by the stack."""


class Gpu(NamedTuple):
    """One kind of GPU, as its vendor gives it: dense rates, one direction of a link."""

    name: str
    gbytes: float
    tflops: float
    """Of bf16 products."""
    fp8_tflops: float
    """0: it has none."""
    gbytes_per_s: float
    """Of its memory."""
    link_gbytes_per_s: float
    """To the other GPUs of its node."""
    network_gbytes_per_s: float
    """Of a node's network, for each of its GPUs."""
    source: str


GPUS = {
    "a100-40": Gpu(
        "A100-40GB", 40, 312, 0, 1555, 300, 25, "A100 datasheet (SXM); DGX A100: 200 Gb/s a GPU"
    ),
    "a100-80": Gpu(
        "A100-80GB", 80, 312, 0, 2039, 300, 25, "A100 datasheet (SXM); DGX A100: 200 Gb/s a GPU"
    ),
    "h100": Gpu(
        "H100", 80, 989, 1979, 3350, 450, 50, "H100 datasheet (SXM); DGX H100: 400 Gb/s a GPU"
    ),
    "h200": Gpu(
        "H200", 141, 989, 1979, 4800, 450, 50, "H200 datasheet (SXM); DGX H200: 400 Gb/s a GPU"
    ),
    "b200": Gpu(
        "B200", 180, 2250, 4500, 8000, 900, 50, "DGX B200 datasheet, an eighth; 400 Gb/s a GPU"
    ),
    "l40s": Gpu(
        "L40S", 48, 362, 733, 864, 32, 12.5, "L40S datasheet; PCIe 4.0 x16; 100 Gb/s a GPU assumed"
    ),
    "4090": Gpu(
        "4090",
        24,
        165,
        330,
        1008,
        32,
        1.6,
        "Ada whitepaper 2.02, fp32 sums; PCIe 4.0 x16; 100 Gb/s for eight assumed",
    ),
}

SHARES = {
    # Frozen products of Llama-3-8B's layers, 16,384 tokens: 0.73 to 0.82, 0.75 by time.
    "product": 0.75,
    # No product in fp8 was measured alone; of CUTLASS's row-scaled ones 0.6 to 0.7 is reported.
    "fp8 product": 0.65,
    # FlashAttention 2, width 128, 512 tokens, bidirectional; 322 and 207 TFLOP/s of 989.
    "attention": 0.33,
    "attention backward": 0.21,
    # Of the memory's bandwidth, a layer's norms, SwiGLU and rope together; a device copy 0.89.
    "memory": 0.81,
    # Likewise, what adapters add to a frozen product: 0.71 forward, 0.66 backward.
    "adapters": 0.68,
    # Of a link's, by rings: NCCL's all-gathers of layers are reported at 0.75 to 0.9 of it.
    "link": 0.8,
}
"""The share of a peak that is reached. Source: benchmarks/results/h200/kernels.jsonl; fp8's
and the link's are assumed."""
TILE = 128
"""FlashAttention's blocks of queries and keys: a document of 40 tokens costs what one of 128 does
(in kernels.jsonl its time over that of 512 says the same)."""
LAUNCH_S = 6e-6
"""The host's time for a kernel, assumed; the device waits where its kernels are shorter."""
KERNELS = {"decoder": 120, "encoder": 14, "other": 60}
"""Of a layer and of the rest, in a micro-batch: 4,028 in step.jsonl, with 32 and 12 layers."""


OPTIMIZER_BYTES = 32
"""Of a trained number: its gradient twice, value and moments read and written, gradient zeroed."""


class Texts(NamedTuple):
    """Mean tokens of a document."""

    student: float
    teacher: float
    is_known: bool = True
    """Or documents were taken to be as long as they may be."""

    @property
    def longer(self) -> float:
        return max(self.student, self.teacher)


class Work(NamedTuple):
    """What the rank with most lanes does in a step."""

    packs: int
    micro_batches: int
    documents: float
    student: float
    """Tokens that the stack reads, or, where the LLM learns by itself, nobody."""
    teacher: float


class Traffic(NamedTuple):
    """Bytes that reach a GPU in a step: weights, and others' gradients."""

    gathered: int
    reduced: int


class Op(NamedTuple):
    """One operation: of what part of a step, what bounds its arithmetic, and what it takes."""

    part: str
    kind: str
    flops: float
    bytes: float


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Equal nodes of equal GPUs."""

    gpu: Gpu
    gpus: int = 1
    """Of a node."""
    nodes: int = 1

    @property
    def size(self) -> int:
        return self.gpus * self.nodes

    def bytes_per_s(self, group: int) -> float:
        """What a GPU receives by a ring over so many. A ring crosses a node's border once, and each
        GPU's share of the network carries one ring."""
        gpu = self.gpu
        across = self.gpus * gpu.network_gbytes_per_s if group > self.gpus else math.inf
        return 1e9 * SHARES["link"] * min(gpu.link_gbytes_per_s, across)


@dataclass(frozen=True, kw_only=True)
class Step:
    """A predicted step."""

    cluster: Cluster
    work: Work
    traffic: Traffic
    parts: Mapping[str, float]
    """Seconds of the device's work: encoder, teacher, student, backward, optimizer."""
    bounds: Mapping[str, float]
    """Seconds by what bounds them: compute, memory, network, launches; they add up to the step."""
    pairs: float
    """Pair tokens of a step, over all ranks."""
    flops: int
    """6N, of one of them."""

    @property
    def seconds(self) -> float:
        return sum(self.bounds.values())

    @property
    def pairs_per_s(self) -> float:
        return self.pairs / self.seconds

    @property
    def mfu(self) -> float:
        return self.flops * self.pairs_per_s / (1e12 * self.cluster.gpu.tflops * self.cluster.size)

    @property
    def bound(self) -> str:
        """In words: all that bounds a tenth of it or more."""
        order = sorted(self.bounds, key=lambda name: -self.bounds[name])
        shares = {name: self.bounds[name] / self.seconds for name in order}
        return ", ".join(f"{name} {each:.0%}" for name, each in shares.items() if each >= 0.1)


def find_gpu(name: str) -> Gpu:
    """Raises: ValueError: There is no such name."""
    if name not in GPUS:
        raise ValueError(f"--gpu {name}: there is no such GPU; choose one of {', '.join(GPUS)}")
    return GPUS[name]


def gpu_of(device: str, num_bytes: int) -> str | None:
    """The name of a device that PyTorch sees; None: it is none of GPUS."""
    named = [key for key in GPUS if key.partition("-")[0].upper() in device.upper()]
    fits = [key for key in named if 0.8 < num_bytes / (1e9 * GPUS[key].gbytes) < 1.25]
    return fits[0] if fits else None


def work_of(config: Config, texts: Texts, world_size: int) -> Work:
    """Of a step, on the rank with most lanes. Packs of unknown texts are taken to be full."""
    data = config.data
    packs = math.ceil(data.lanes / world_size)
    documents = float(data.pack_documents)
    if data.pack_tokens:
        # What does not fit goes into the next pack, so half a document's room is left on average.
        room = data.pack_tokens - (texts.longer / 2 if texts.is_known else 0)
        documents = max(1.0, room / texts.longer)
    joined = max(1, int(config.memory.max_tokens / (documents * texts.longer) + 1e-9))
    return Work(
        packs=packs,
        micro_batches=math.ceil(packs / joined),
        documents=packs * documents,
        student=packs * documents * texts.student,
        teacher=packs * documents * texts.teacher,
    )


def predict(
    config: Config,
    models: Models,
    cluster: Cluster,
    work: Work,
    *,
    command: Command = "train",
    has_copies: bool = False,
) -> Step:
    """A step of a configuration whose `zero.stage` is 0 or 3.

    Args:
        work: Of one rank.
        has_copies: Each node has a second copy of the frozen weights, from which it gathers.
    """
    parts: Counter[str] = Counter()
    device: dict[str, Counter[str]] = {name: Counter() for name in PHASES.values()}
    for op in operations(config, models, work, cluster.size, command=command):
        seconds, bound = _seconds(op, cluster.gpu)
        parts[op.part] += seconds
        device[PHASES[op.part]][bound] += seconds
    options = {"command": command, "has_copies": has_copies}
    moved = movements(config, models, cluster, work.micro_batches, **options)
    launches_s = work.micro_batches * LAUNCH_S * _kernels(models) / 2
    bounds: Counter[str] = Counter()
    for phase, own in device.items():
        network_s = sum(each.seconds for each in moved if each.phase == phase)
        if phase == "update":  # nothing else runs then
            bounds.update({**own, "network": network_s})
        else:
            bounds.update(_longest(own, network_s, launches_s * (sum(own.values()) > 0)))
    read = _read(config, work, command)
    scale = config.data.lanes / work.packs
    return Step(
        cluster=cluster,
        work=work,
        traffic=Traffic(
            gathered=sum(each.bytes for each in moved if each.kind == "gathered"),
            reduced=sum(each.bytes for each in moved if each.kind == "reduced"),
        ),
        parts=dict(parts),
        bounds={name: seconds for name, seconds in bounds.items() if seconds},
        pairs=scale * pair_tokens(read.learning, read.taught),
        flops=6 * models.num_weights,
    )


class _Reading(NamedTuple):
    """Tokens of a step by what becomes of them."""

    encoder: float
    learning: float
    """By the LLM, forward and backward."""
    taught: float
    """By the LLM as the teacher, forward alone."""


def _read(config: Config, work: Work, command: Command) -> _Reading:
    if command != "train":
        is_stack = command == "read"
        return _Reading(work.student * is_stack, 0, work.student if is_stack else work.teacher)
    if config.objective.reader == "llm":
        return _Reading(0, work.teacher, 0)
    is_taught = config.objective.kind == "distil" and not config.data.teacher_states
    return _Reading(work.student, work.student, work.teacher * is_taught)


PHASES = {"encoder": "forward", "teacher": "forward", "student": "forward", "loss": "forward"}
PHASES |= {"backward": "backward", "optimizer": "update"}
"""Of a step's parts. Ranks gather the weights of a phase's next layers while it runs."""


def operations(
    config: Config, models: Models, work: Work, world_size: int, *, command: Command = "train"
) -> Iterator[Op]:
    """All that a rank's device does in a step."""
    count = work.micro_batches
    one = Work(work.packs, 1, *(each / count for each in work[2:]))
    reading, layers = _read(config, one, command), models.decoder.num_layers
    every: list[tuple[str, list[_Cost]]] = []
    if reading.encoder:
        every += [("encoder", _encoder(config, models, reading.encoder, one))]
    if reading.taught:
        block = _Block(config, models.decoder, reading.taught, one.documents)
        every += [("teacher", layers * block.forward(adapted=bool(config.model.teacher)))]
    if reading.learning:
        block = _Block(config, models.decoder, reading.learning, one.documents)
        every += [("student", layers * block.forward(adapted=True))]
        every += [("backward", layers * (block.again() + block.backward()))]
    if reading.learning and reading.taught:
        every += _loss(config, models.decoder, reading, one.documents)
    for part, costs in every:
        for kind, cost in costs:
            yield Op(part, kind, count * cost.flops, count * cost.bytes)
    if reading.learning:
        share = world_size if config.zero.stage == 3 else 1
        trained = sum(each.numbers for each in pieces(config, models.stack) if each.learns)
        yield Op("optimizer", "product", 0, OPTIMIZER_BYTES * trained / share)


_Cost = tuple[str, Cost]


class _Block:
    """A decoder layer on so many tokens of so many equally long documents."""

    def __init__(self, config: Config, spec: DecoderSpec, tokens: float, documents: float) -> None:
        self.config, self.spec = config, spec
        self.dtype, self.form = getattr(torch, config.model.dtype), config.model.quantization
        self.tokens, self.documents = round(tokens), documents
        q_width, kv_width = (num * spec.head_width for num in (spec.num_heads, spec.num_kv_heads))
        width, inner = spec.width, spec.inner_width
        self.linears = {
            "qkv": (width, (q_width, kv_width, kv_width)),
            "out": (q_width, (width,)),
            "gate_up": (width, (inner, inner)),
            "down": (inner, (width,)),
        }

    def forward(self, *, adapted: bool) -> list[_Cost]:
        found = [self._attention()[0], *self._passes(0)]
        for name in self.linears:
            found += self._linear(name, 0, adapted=adapted)
        return found

    def backward(self) -> list[_Cost]:
        """With what backward makes again; see `memory.recompute`."""
        found = [self._attention()[1], *self._passes(1)]
        for name in self.linears:
            found += self._linear(name, 1, adapted=True)
        return found

    def again(self) -> list[_Cost]:
        """What backward computes once more."""
        kind = self.config.memory.recompute
        if kind == "layer":
            return self.forward(adapted=True)
        found = [_pass(swiglu.cost(self.dtype, tokens=self.tokens, width=self.spec.inner_width)[0])]
        found += [_pass(each[0]) for each in self._norms(residual=False)]
        return found + (self._linear("gate_up", 0, adapted=True) if kind == "mlp" else [])

    def _linear(self, name: str, side: int, *, adapted: bool) -> list[_Cost]:
        """A fused linear: its frozen product, its adapters, what its form takes. Args: side: 0
        forward, 1 backward."""
        in_width, members = self.linears[name]
        rank, names = self.config.lora.rank, self.spec.linears[name]
        targets = [each.split(".")[-1] in self.config.lora.target_modules for each in names]
        shape = {"tokens": self.tokens, "width": in_width, "dropout": 0.0, "bias": False}
        options = {**shape, "members": members, "rank": rank}
        frozen = lora_linear.cost(self.dtype, **options, adapted=())[side]
        kind = "fp8 product" if self.form == "fp8" else "product"
        found = [(kind, frozen), *self._form(in_width, sum(members), side)]
        if adapted and any(targets):
            indices = tuple(range(len(members))) if all(targets) else (0,)
            low = lora_linear.cost(self.dtype, **options, adapted=indices)[side]
            # Forward reads the input again and adds to the output; backward reads the output's
            # gradient twice and the input, and adds to the input's gradient.
            numbers = in_width + 2 * sum(members) + 2 * in_width * side
            moved = self.tokens * numbers * self.dtype.itemsize
            found.append(("adapters", Cost(bytes=moved, flops=low.flops - frozen.flops)))
        return found

    def _form(self, in_width: int, out_width: int, side: int) -> list[_Cost]:
        """What a quantised weight takes before its product."""
        weights = in_width * out_width
        if self.form == "fp8":  # what comes in is read, and written in a byte
            moved = self.tokens * (out_width if side else in_width) * (self.dtype.itemsize + 1)
            if side and self.config.zero.stage == 3:  # and the weight's transpose is made
                moved += 2 * weights
            return [_pass(Cost(bytes=moved, flops=0))]
        if self.form == "nf4":  # made full, then read by the product like any other
            return [_pass(Cost(bytes=int(weights * (BYTES["nf4"] + self.dtype.itemsize)), flops=0))]
        return []

    def _attention(self) -> tuple[_Cost, _Cost]:
        spec, length = self.spec, self.tokens / self.documents
        heads = {"heads": spec.num_heads, "kv_heads": spec.num_kv_heads, "width": spec.head_width}
        costs = _attention(self.dtype, length, self.documents, self.config.model.causal, heads)
        return ("attention", costs[0]), ("attention backward", costs[1])

    def _norms(self, *, residual: bool) -> list[tuple[Cost, Cost]]:
        """Of the layer's norms. Args: residual: The MLP's adds the layer's input first."""
        found = []
        for name in self.spec.norms:
            tokens, width = self.tokens, self.spec.width
            if name in ("q_norm", "k_norm"):
                heads = self.spec.num_heads if name == "q_norm" else self.spec.num_kv_heads
                tokens, width = tokens * heads, self.spec.head_width
            adds = residual and name == "mlp_norm"
            found.append(rms_norm.cost(self.dtype, tokens=tokens, width=width, residual=adds))
        return found

    def _passes(self, side: int) -> list[_Cost]:
        """What reads and writes states and multiplies nothing. Args: as of `_linear`."""
        spec, dtype, tokens = self.spec, self.dtype, self.tokens
        rotated = spec.num_heads + spec.num_kv_heads
        heads = {"heads": rotated + spec.num_kv_heads, "rotated": rotated, "width": spec.head_width}
        every = self._norms(residual=True)
        every += [rope.cost(dtype, tokens=tokens, **heads)]
        every += [swiglu.cost(dtype, tokens=tokens, width=spec.inner_width)]
        # The layer's sum in forward; in backward each half's gradient joins the residual's.
        sums = Cost(bytes=3 * (1 + side) * tokens * spec.width * dtype.itemsize, flops=0)
        return [*(_pass(each[side]) for each in every), _pass(sums)]


def _pass(cost: Cost) -> _Cost:
    """Bound by memory, whatever little it computes."""
    return "product", Cost(bytes=cost.bytes, flops=0)


def _attention(
    dtype: torch.dtype, length: float, documents: float, causal: bool, heads: Mapping[str, int]
) -> tuple[Cost, Cost]:
    """Of documents of one length, in whole tiles."""
    tiles = TILE * math.ceil(length / TILE)
    moved = attention.cost(dtype, lengths=(round(length * documents),), causal=causal, **heads)
    worked = attention.cost(dtype, lengths=(tiles,), causal=causal, **heads)
    forward, backward = (
        Cost(bytes=one.bytes, flops=int(two.flops * documents)) for one, two in zip(moved, worked)
    )
    return forward, backward


def _encoder(config: Config, models: Models, tokens: float, work: Work) -> list[_Cost]:
    """The encoder's forward and the projection's."""
    like, encoder = models.encoder, models.stack.encoder
    dtype, width = getattr(torch, config.model.dtype), like.hidden_size
    is_padded = isinstance(encoder, PaddedEncoder)
    matrices = [item.weight for item in encoder.linears] if is_padded else []
    if not is_padded:
        matrices = [item for item in encoder.layers.parameters() if item.dim() == 2]
    run = round(tokens / (1 - MAX_PADDING * is_padded))
    weights, outputs = sum(each.numel() for each in matrices), sum(map(len, matrices))
    # Each linear's input and output, two norms, two sums and an activation.
    layers = like.num_hidden_layers
    states = 2 * outputs + layers * 12 * width
    heads = like.num_attention_heads
    shape = {"heads": heads, "kv_heads": heads, "width": max(1, width // heads)}
    attended, _ = _attention(dtype, run / work.documents, work.documents, False, shape)
    linear = Cost(bytes=(weights + run * states) * dtype.itemsize, flops=2 * run * weights)
    sizes = {"tokens": run, "width": width, "out_width": models.decoder.width}
    projected, _ = projection.cost(dtype, **sizes, bias=True, grad=False)
    return [("product", linear), *(layers * [("attention", attended)]), ("product", projected)]


def _loss(
    config: Config, spec: DecoderSpec, reading: _Reading, documents: float
) -> list[tuple[str, list[_Cost]]]:
    count = max(1, round(documents))
    sides = {
        name: (max(1, round(tokens / count)),) * count
        for name, tokens in (("student", reading.learning), ("teacher", reading.taught))
    }
    dtype, aligned = getattr(torch, config.model.dtype), config.objective.token_weight > 0
    costs = distill_loss.cost(dtype, width=spec.width, gap=0, aligned=aligned, **sides)
    return [("loss", [_pass(costs[0])]), ("backward", [_pass(costs[1])])]


def _seconds(op: Op, gpu: Gpu) -> tuple[float, str]:
    """How long an operation takes, and what bounds it."""
    peak = gpu.fp8_tflops or gpu.tflops if op.kind == "fp8 product" else gpu.tflops
    compute_s = op.flops / (1e12 * peak * SHARES[op.kind])
    share = SHARES["adapters" if op.kind == "adapters" else "memory"]
    memory_s = op.bytes / (1e9 * gpu.gbytes_per_s * share)
    return max((compute_s, "compute"), (memory_s, "memory"))


def _longest(
    device: Mapping[str, float], network_s: float, launches_s: float
) -> Mapping[str, float]:
    """What a phase takes: the device, the network and the host work at the same time."""
    own = sum(device.values())
    if own >= max(network_s, launches_s):
        return device
    return {"network": network_s} if network_s > launches_s else {"launches": launches_s}


def _kernels(models: Models) -> int:
    encoder = models.encoder.num_hidden_layers if models.stack.reads_stack else 0
    layers = models.decoder.num_layers
    return KERNELS["decoder"] * layers + KERNELS["encoder"] * encoder + KERNELS["other"]


class Movement(NamedTuple):
    """What reaches a GPU in a step, of one kind and in one phase."""

    phase: str
    kind: Literal["gathered", "reduced"]
    bytes: int
    seconds: float


def movements(
    config: Config,
    models: Models,
    cluster: Cluster,
    micro_batches: int,
    *,
    command: Command = "train",
    has_copies: bool = False,
) -> list[Movement]:
    """Of a step. Under ZeRO-3 each micro-batch gathers weights and reduces gradients anew;
    otherwise gradients are summed once, which sends them twice."""
    world, found, ring = cluster.size, [], cluster.bytes_per_s(cluster.size)
    learning = [each for each in pieces(config, models.stack) if each.learns]
    learning = learning if command == "train" else []
    if config.zero.stage == 0:
        numbers = sum(each.numbers for each in learning)
        size = 4 * numbers * 2 * (world - 1) // world
        return [Movement("update", "reduced", size, size / ring)]
    sizes: Counter[tuple[str, int]] = Counter()
    for gather in gathers(config, models.stack, world, learns=bool(learning)):
        group = cluster.gpus if has_copies and not gather.piece.learns else world
        count = 1 if gather.is_once else micro_batches
        sizes[gather.phase, group] += count * gather.piece.slice_bytes(group) * (group - 1)
    for (phase, group), size in sizes.items():
        found.append(Movement(phase, "gathered", size, size / cluster.bytes_per_s(group)))
    size = micro_batches * sum(each.slice_bytes(world) * (world - 1) for each in learning)
    return [*found, Movement("backward", "reduced", size, size / ring)]


class Gather(NamedTuple):
    """A parameter that ZeRO-3 gathers in a phase: in each micro-batch, or once a step."""

    phase: str
    piece: Piece
    is_once: bool


def gathers(
    config: Config, stack: Stack, world_size: int, *, learns: bool = True
) -> Iterator[Gather]:
    """What ZeRO-3 gathers in a step; after the update that is what is kept whole."""
    zero = zero_options(config, stack, world_size)
    limit = zero["stage3_param_persistence_threshold"]
    order = _order(stack, learns=learns)
    for leaf in stack.leaves:
        next_use = _kept_for(config, stack, order, leaf, zero["stage3_max_reuse_distance"])
        for piece in pieces(config, leaf):
            if piece.numbers <= limit:
                if learns:
                    yield Gather("update", piece, True)
                continue
            runs_again = order.count(leaf) > 1
            yield Gather("forward", piece, next_use is not None and not runs_again)
            if runs_again and next_use is None:
                yield Gather("backward", piece, False)


def _order(stack: Stack, *, learns: bool) -> list[nn.Module]:
    """The modules in the order in which ZeRO-3 sees them in a micro-batch, those that hold others
    too."""
    decoder, below = stack.decoder, list[nn.Module]()
    if isinstance(stack.encoder, Encoder):
        below = [stack.encoder, stack.encoder.embedding, *stack.encoder.layers]
    below += [stack.projection] if stack.reads_stack else []
    forward = [stack, *below, decoder.embedding, decoder, *decoder.layers, stack.objective]
    if not learns:
        return forward
    backward = [stack, stack.objective, decoder, *reversed(decoder.layers)]
    return forward + backward + ([stack.projection] if stack.reads_stack else [])


def _kept_for(
    config: Config, stack: Stack, order: Sequence[nn.Module], leaf: nn.Module, reach: int
) -> nn.Module | None:
    """What a leaf's weights are kept for after its forward; None: they are released.

    ZeRO-3 looks ahead for as long as the modules on the way have fewer numbers than `reach`, and
    keeps what one of them has. For a layer a module counts with all that it holds; for the others,
    with its own parameters.
    """
    is_layer, passed = isinstance(leaf, EncoderLayer | DecoderLayer), 0
    for module in order[order.index(leaf) + 1 :]:
        if passed >= reach:
            return None
        if module is leaf or (is_layer and leaf in module.modules()):
            return module
        own = pieces(config, module) if is_layer else module.parameters(recurse=False)
        passed += sum(each.numbers if is_layer else each.numel() for each in own)
    return None
