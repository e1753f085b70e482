"""The bytes that ranks send one another in a step: weights that ZeRO-3 gathers, as its coordinator
would, and gradients.
"""

from collections import Counter, deque
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Literal, NamedTuple

from torch import nn

from mtllm_engine.config import Config
from mtllm_engine.model.decoder import DecoderLayer
from mtllm_engine.model.encoder import Encoder, EncoderLayer
from mtllm_engine.model.stack import Stack
from mtllm_engine.training.gpus import Cluster
from mtllm_engine.training.memory import Models, Piece, pieces, zero_options

Command = Literal["train", "targets", "read"]
"""What is done with texts: learned from, by whatever learns; read by the teacher; by the stack."""


class Traffic(NamedTuple):
    """Bytes that reach a GPU in a step: weights, and others' gradients."""

    gathered: int
    reduced: int


class Movement(NamedTuple):
    """What reaches a GPU in a step, of one kind and in one phase."""

    phase: str
    kind: Literal["gathered", "reduced"]
    bytes: int
    seconds: float


Gather = tuple[str, Piece]
"""A parameter that is gathered, and in which phase."""


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
    first, later, kept = gathers(config, models.stack, world, learns=bool(learning))
    sizes: Counter[tuple[str, int]] = Counter()
    for count, several in ((1, first), (micro_batches - 1, later), (1, kept)):
        for phase, piece in several:
            group = cluster.gpus if has_copies and not piece.learns else world
            sizes[phase, group] += count * piece.slice_bytes(group) * (group - 1)
    for (phase, group), size in sizes.items():
        found.append(Movement(phase, "gathered", size, size / cluster.bytes_per_s(group)))
    size = micro_batches * sum(each.slice_bytes(world) * (world - 1) for each in learning)
    return [*found, Movement("backward", "reduced", size, size / ring)]


def gathers(
    config: Config, stack: Stack, world_size: int, *, learns: bool = True
) -> tuple[Sequence[Gather], Sequence[Gather], Sequence[Gather]]:
    """What ZeRO-3 gathers in a step's first micro-batch, in each later one, and after the update,
    which is all that is kept whole."""
    zero = zero_options(config, stack, world_size)
    names = ("param_persistence_threshold", "max_live_parameters", "prefetch_bucket_size")
    limits = _Limits(*(zero[f"stage3_{key}"] for key in (*names, "max_reuse_distance")))
    leaves = tuple(pieces(config, leaf) for leaf in stack.leaves)
    first, later = _simulated(_uses(stack, learns=learns), leaves, limits)
    small = [each for each in pieces(config, stack) if each.numbers <= limits.whole]
    return first, later, [("update", each) for each in small if learns]


class _Limits(NamedTuple):
    """DeepSpeed's, in numbers."""

    whole: int
    live: int
    ahead: int
    reuse: int


class _Use(NamedTuple):
    """A module in the order in which ZeRO-3 sees them."""

    phase: str
    leaf: int
    """Whose parameters it needs; -1: it only holds others."""
    holds: frozenset[int]
    """The leaves in it."""
    is_layer: bool
    """Or a leaf looks ahead for its own parameters alone."""


class _Coordinator:
    """DeepSpeed's parameter coordinator (runtime/zero/partitioned_param_coordinator.py, 0.19): what
    a module needs is gathered, then what follows in the trace, as far as the limits let it; after a
    module what no module soon after it needs is released.

    Parameters are (leaf, number) here.
    """

    def __init__(self, uses: Sequence[_Use], leaves: Sequence[Sequence[Piece]], limits: _Limits):
        self.uses, self.leaves, self.limits = uses, leaves, limits
        self.sizes = [sum(each.numbers for each in leaf) for leaf in leaves]
        self.live: set[tuple[int, int]] = set()

    def micro_batch(self) -> Iterator[Gather]:
        """The gathers of one; what is not released stays for the next."""
        queue = deque((key, at) for at, use in enumerate(self.uses) for key in self._keys(use.leaf))
        fetched: dict[tuple[int, int], int] = {}  # when what was looked at last will be used
        for at, use in enumerate(self.uses):
            needed = self._keys(use.leaf)
            yield from self._gather(use.phase, needed)
            pending = {key for key in needed if fetched.get(key, -1) < at}
            seen: set[tuple[int, int]] = set()
            while queue and len(seen) < len(pending):
                key, when = queue.popleft()
                fetched[key] = when
                seen.add(key)
            yield from self._gather(use.phase, self._ahead(queue, fetched))
            self._release(at, {key for key in needed if fetched.get(key, -1) <= at + 1})

    def _keys(self, leaf: int) -> list[tuple[int, int]]:
        return [(leaf, number) for number in range(len(self.leaves[leaf]))] if leaf >= 0 else []

    def _piece(self, key: tuple[int, int]) -> Piece:
        return self.leaves[key[0]][key[1]]

    def _is_there(self, key: tuple[int, int]) -> bool:
        return key in self.live or self._piece(key).numbers <= self.limits.whole

    def _gather(self, phase: str, keys: Sequence[tuple[int, int]]) -> Iterator[Gather]:
        for key in keys:
            if not self._is_there(key):
                self.live.add(key)
                yield phase, self._piece(key)

    def _ahead(self, queue: deque, fetched: dict[tuple[int, int], int]) -> list[tuple[int, int]]:
        held = sum(self._piece(key).numbers for key in self.live)
        room, chosen, size = min(self.limits.live - held, self.limits.ahead), [], 0
        while queue and size < room:
            key, when = queue.popleft()
            fetched[key] = max(fetched.get(key, -1), when)
            if not self._is_there(key) and key not in chosen:
                chosen.append(key)
                size += self._piece(key).numbers
        return chosen

    def _release(self, at: int, keys: set[tuple[int, int]]) -> None:
        leaf, passed = self.uses[at].leaf, 0
        for use in self.uses[at + 1 :]:
            if passed >= self.limits.reuse:
                break
            held = use.holds if self.uses[at].is_layer else {use.leaf} - {-1}
            if leaf in held:
                return
            passed += sum(self.sizes[each] for each in held)
        self.live -= keys


@lru_cache(maxsize=256)  # a plan asks for the same again and again
def _simulated(
    uses: tuple[_Use, ...], leaves: tuple[tuple[Piece, ...], ...], limits: _Limits
) -> tuple[tuple[Gather, ...], tuple[Gather, ...]]:
    """A step's first micro-batch, and a later one."""
    coordinator = _Coordinator(uses, leaves, limits)
    return tuple(coordinator.micro_batch()), tuple(coordinator.micro_batch())


def _uses(stack: Stack, *, learns: bool) -> tuple[_Use, ...]:
    """The order of a micro-batch."""
    decoder, below = stack.decoder, list[nn.Module]()
    if isinstance(stack.encoder, Encoder):
        below = [stack.encoder, stack.encoder.embedding, *stack.encoder.layers]
    below += [stack.projection] if stack.reads_stack else []
    forward = [stack, *below, decoder.embedding, decoder, *decoder.layers, stack.objective]
    backward = [stack, stack.objective, decoder, *reversed(decoder.layers)]
    backward += [stack.projection] if stack.reads_stack else []
    order = [("forward", each) for each in forward]
    order += [("backward", each) for each in backward] if learns else []
    number = {id(leaf): index for index, leaf in enumerate(stack.leaves)}
    return tuple(
        _Use(
            phase,
            number.get(id(module), -1),
            frozenset(number[id(each)] for each in module.modules() if id(each) in number),
            isinstance(module, EncoderLayer | DecoderLayer),
        )
        for phase, module in order
    )
