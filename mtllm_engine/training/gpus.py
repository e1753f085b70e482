"""GPUs as their vendor describes them, and which share of that is reached."""

import math
from dataclasses import dataclass
from typing import NamedTuple


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
    # Assumed: no product in fp8 was measured alone. With bf16's share a step came out 20 % short.
    "fp8 product": 0.65,
    # FlashAttention 2, width 128, 512 tokens, bidirectional; 322 and 207 TFLOP/s of 989.
    "attention": 0.33,
    "attention backward": 0.21,
    # Of the memory's bandwidth, a layer's norms, SwiGLU and rope together; a device copy 0.89.
    "memory": 0.81,
    # Likewise, what adapters add to a frozen product: 0.71 forward, 0.66 backward.
    "adapters": 0.68,
    # Assumed: of a link's, by rings.
    "link": 0.8,
}
"""The share of a peak that is reached. Source: benchmarks/results/h200/kernels.jsonl; fp8's
and the link's are assumed."""
TILE = 128
"""FlashAttention's blocks of queries and keys: a document of 40 tokens costs what one of 128 does
(in kernels.jsonl its time over that of 512 says the same)."""


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
