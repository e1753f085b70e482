"""The stack for sentence-transformers:

SentenceTransformer(DIR, trust_remote_code=True).encode(texts, language="swh_Latn")
"""

from collections.abc import Sequence
from typing import Any

import torch
from sentence_transformers.base.modules import InputModule
from transformers import AutoModel


class MTLLMSentences(InputModule):
    """Reads texts of one language a call; by default of the configuration's `default_language`."""

    forward_kwargs = {"language"}

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    @classmethod
    def load(
        cls,
        model_name_or_path: str,
        token: bool | str | None = None,
        cache_folder: str | None = None,
        revision: str | None = None,
        local_files_only: bool = False,
        trust_remote_code: bool = False,
        model_kwargs: dict[str, Any] | None = None,
        **_: Any,
    ) -> "MTLLMSentences":
        hub = {"token": token, "cache_dir": cache_folder, "revision": revision}
        options = {"trust_remote_code": trust_remote_code, "local_files_only": local_files_only}
        model = AutoModel.from_pretrained(
            model_name_or_path, **hub, **options, **(model_kwargs or {})
        )
        return cls(model)

    def preprocess(
        self,
        inputs: Sequence[str],
        prompt: str | None = None,
        language: str | None = None,
        **_: Any,
    ) -> dict[str, torch.Tensor]:
        """Raises: ValueError: No language, or several."""
        if language is not None and not isinstance(language, str):
            # Texts are sorted by length before they come here, so languages would be mixed up.
            raise ValueError("language= is one language; call encode once for each")
        if not all(isinstance(text, str) for text in inputs):
            raise ValueError("texts are strings; pairs are for the model's own classify")
        return self.model.tokenize([f"{prompt or ''}{text}" for text in inputs], language)

    def forward(
        self, features: dict[str, torch.Tensor], language: str | None = None
    ) -> dict[str, torch.Tensor]:
        names = ("input_ids", "attention_mask", "part_ids")
        output = self.model(**{name: features[name] for name in names})
        features["token_embeddings"] = output.last_hidden_state
        features["sentence_embedding"] = output.pooler_output
        return features

    def get_embedding_dimension(self) -> int:
        return self.model.llm.config.hidden_size

    @property
    def max_seq_length(self) -> int:
        return self.model.config.max_length

    @max_seq_length.setter
    def max_seq_length(self, tokens: int) -> None:
        self.model.config.max_length = tokens

    def save(self, output_path: str, *_: Any, **__: Any) -> None:
        raise NotImplementedError("copy the folder that this was opened from: it is all there is")
