"""Pieces of GEMMs: a product that the interpreter gets right, the order of tiles, and dropout's hash in registers."""

import os

import triton
import triton.language as tl

INTERPRET = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
HASHES = ("hash0", "hash1", "hash2", "hash3")  # arguments not to specialise on: one in 16 happens to divide by 16


@triton.jit
def dot(a, b, acc):
    """acc + a b with fp32 sums; the interpreter would multiply the bit patterns of bf16."""
    if INTERPRET:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def place(num_rows, num_columns, GROUP, BLOCK_ROWS, BLOCK_COLUMNS):
    """First row and column of this program's tile: down GROUP blocks of rows, which thus share the columns' operand
    while it is in L2, then on to the next columns."""
    row_blocks, column_blocks = tl.cdiv(num_rows, BLOCK_ROWS), tl.cdiv(num_columns, BLOCK_COLUMNS)
    program = tl.program_id(0)
    first = program // (GROUP * column_blocks) * GROUP
    height = min(row_blocks - first, GROUP)
    rest = program % (GROUP * column_blocks)
    return (first + rest % height) * BLOCK_ROWS, rest // height * BLOCK_COLUMNS


@triton.jit
def row_hash(seeds_ptr, rows, num_rows, linear_hash):
    """A column: what `keep` starts from, the same for all channels of a token."""
    seeds = tl.load(seeds_ptr + rows, rows < num_rows, other=0).to(tl.uint32, bitcast=True)
    hashes = _scramble32(seeds ^ tl.cast(linear_hash, tl.uint32))
    return (hashes ^ (hashes >> 16))[:, None]


@triton.jit
def keep(row_hash, channels, threshold):
    """dropout.kept's bits, from a column of `row_hash`es and a row of channels."""
    hashes = _scramble32(row_hash + channels.to(tl.uint32) * 0x9E3779B9)
    return hashes.to(tl.int32, bitcast=True) >= threshold


@triton.jit
def _scramble32(x):
    x = (x ^ (x >> 16)) * 0x85EBCA6B
    return (x ^ (x >> 13)) * 0xC2B2AE35
