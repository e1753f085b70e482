"""Why a model of another architecture does not go in, and what to take instead."""

from typing import Any

from transformers import PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

MIXTURE = "it is a mixture of experts, which reads each token with other weights"
PLAIN = "float32, bfloat16 or float16 weights"
EXPERTS = (  # how many there are, by the names that families give it
    "num_experts",
    "num_local_experts",
    "n_routed_experts",
    "num_routed_experts",
    "moe_num_experts",
    "n_experts",
)
REASONS = {
    "it norms with LayerNorm, where those that go in have RMSNorm": (
        *("biogpt", "bloom", "codegen", "ctrl", "gpt2", "gpt_bigcode", "gpt_neo", "imagegpt"),
        *("mpt", "nemotron", "olmo", "openai-gpt", "opt", "stablelm", "starcoder2", "xglm"),
        *("gpt-sw3", "persimmon", "fuyu", "megatron_gpt2", "xlnet", "transfo-xl"),
    ),
    "its attention and MLP read the same state side by side": (
        *("cohere", "cohere2", "falcon", "gpt_neox", "gpt_neox_japanese", "gptj", "phi"),
    ),
    "some of its layers are no attention": (
        *("bamba", "falcon_h1", "falcon_mamba", "jamba", "lfm2", "mamba", "mamba2"),
        *("nemotron_h", "recurrent_gemma", "rwkv", "xlstm", "zamba", "zamba2", "olmo_hybrid"),
    ),
}


def why_not(config: PreTrainedConfig) -> str:
    """What of a model's configuration stands in the way, in words that follow its name; "" where
    nothing known does.
    """
    text = config.get_text_config()
    if quantised := getattr(config, "quantization_config", None):
        fix = f"name the model that it was made from, with {PLAIN}"
        return f"its weights are quantised ({_method(quantised)}); {fix}"
    if has_experts(text):
        return MIXTURE
    if getattr(text, "kv_lora_rank", None):
        return "its attention compresses keys and values (MLA)"
    for reason, families in REASONS.items():
        if text.model_type in families:
            return reason
    if config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        return "it is no LLM, but guesses masked words"
    return ""


def has_experts(config: PreTrainedConfig) -> bool:
    """Whether a model, an encoder too, is a mixture of experts."""
    counts = [getattr(config, key, None) or 0 for key in EXPERTS]
    return max(counts) > 1 or "moe" in config.model_type.replace("-", "_").split("_")


def _method(quantised: Any) -> str:
    """Such as gptq."""
    said = quantised if isinstance(quantised, dict) else vars(quantised)
    method = said.get("quant_method", "of a kind that it does not say")
    return str(getattr(method, "value", method))
