import pytest
from transformers import CONFIG_MAPPING

from mtllm_engine.model.families import FAMILIES
from mtllm_engine.model.refusals import why_not

REFUSED = {
    "a mixture of experts": (
        *("mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v2", "deepseek_v3", "gpt_oss", "llama4"),
        *("olmoe", "phimoe", "granitemoe", "jamba", "nllb-moe"),
    ),
    "LayerNorm": ("gpt2", "gpt_neo", "opt", "bloom", "stablelm", "starcoder2", "olmo"),
    "side by side": ("gpt_neox", "gptj", "falcon", "phi", "cohere", "cohere2"),
    "MLA": ("minicpm3",),
    "no attention": ("mamba", "recurrent_gemma", "zamba2"),
    "masked words": ("bert", "xlm-roberta"),
}
QUANTISED = {
    "gptq": {"quant_method": "gptq", "bits": 4},
    "awq": {"quant_method": "awq", "bits": 4},
    "bitsandbytes": {"quant_method": "bitsandbytes", "load_in_4bit": True},
    "fp8": {"quant_method": "fp8"},
    "mxfp4": {"quant_method": "mxfp4"},
    "compressed-tensors": {"quant_method": "compressed-tensors"},
    "of a kind that it does not say": {"bits": 4},
}


@pytest.mark.parametrize(
    ("family", "reason"),
    [(family, reason) for reason, families in REFUSED.items() for family in families],
)
def test_other_architectures_are_refused_with_the_reason(family: str, reason: str):
    assert family not in FAMILIES
    assert reason in why_not(CONFIG_MAPPING[family]())


@pytest.mark.parametrize("family", [*FAMILIES, "m2m_100", "gemma3", "mistral3"])
def test_of_what_goes_in_nothing_is_said(family: str):
    assert why_not(CONFIG_MAPPING[family]()) == ""


@pytest.mark.parametrize(("method", "saved"), QUANTISED.items(), ids=QUANTISED)
def test_quantised_weights_are_refused_with_what_they_are(method: str, saved: dict):
    for family in ("llama", "m2m_100"):
        reason = why_not(CONFIG_MAPPING[family](quantization_config=saved))
        assert f"quantised ({method}); name the model that it was made from" in reason
