"""Dropout's masks in registers: the bits of `dropout.kept`, hashed where they are used."""

import triton
import triton.language as tl

# Arguments not to specialise on: one in 16 happens to divide by 16
HASHES = ("hash0", "hash1", "hash2", "hash3")


@triton.jit
def row_hash(seeds_ptr, rows, num_rows, linear_hash):
    """What `keep` starts from, the same for all channels of a token."""
    seeds = tl.load(seeds_ptr + rows, rows < num_rows, other=0).to(tl.uint32, bitcast=True)
    hashes = _scramble32(seeds ^ tl.cast(linear_hash, tl.uint32))
    return hashes ^ (hashes >> 16)


@triton.jit
def keep(row_hashes, channels, threshold):
    """dropout.kept's bits, from `row_hash`es along one axis and channels along the other."""
    hashes = _scramble32(row_hashes + channels.to(tl.uint32) * 0x9E3779B9)
    return hashes.to(tl.int32, bitcast=True) >= threshold


@triton.jit
def _scramble32(x):
    x = (x ^ (x >> 16)) * 0x85EBCA6B
    return (x ^ (x >> 13)) * 0xC2B2AE35
