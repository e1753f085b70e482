"""Pieces of GEMMs: a product that the interpreter gets right, and the order of tiles."""

import os

import triton
import triton.language as tl

INTERPRET = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def dot(a, b, acc):
    """acc + a b with fp32 sums; the interpreter would multiply the bit patterns of bf16."""
    if INTERPRET:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def tile_origin(num_rows, num_columns, GROUP, BLOCK_ROWS, BLOCK_COLUMNS):
    """First row and column of this program's tile.

    Tiles go down GROUP blocks of rows, which thus share the columns' operand while it is in L2,
    then on to the next columns.
    """
    row_blocks, column_blocks = tl.cdiv(num_rows, BLOCK_ROWS), tl.cdiv(num_columns, BLOCK_COLUMNS)
    program = tl.program_id(0)
    first = program // (GROUP * column_blocks) * GROUP
    height = min(row_blocks - first, GROUP)
    rest = program % (GROUP * column_blocks)
    return (first + rest % height) * BLOCK_ROWS, rest // height * BLOCK_COLUMNS
