"""Settings of small models of many architectures, as transformers' configurations take them."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from fedtune.tasks import Task, get_task

__all__ = ["ARCHITECTURES", "IMAGES", "LANGUAGE", "PIXELS", "SPECIAL", "TEXT", "WORDS", "Architecture"]

TEXT = get_task("text-classification")
LANGUAGE = get_task("text-generation")
IMAGES = get_task("image-classification")
WORDS = [f"word{number}" for number in range(44)]
PIXELS = 32
SPECIAL = ["<pad>", "<unk>", "<s>", "</s>"]
_VOCABULARY = len(WORDS) + len(SPECIAL)

_IDS = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "vocab_size": _VOCABULARY}
_PLAIN = {
    **_IDS,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "max_position_embeddings": 32,
}
_GROUPED = {**_PLAIN, "num_key_value_heads": 1}
_EXPERTS = {**_GROUPED, "moe_intermediate_size": 16, "num_experts_per_tok": 2}
_OLD = {**_IDS, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
_HEADS = {**_GROUPED, "head_dim": 8}
_VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "image_size": PIXELS,
    "patch_size": 8,
}
_PAIRED = {
    **_IDS,
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "max_position_embeddings": 32,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
}


class Architecture(NamedTuple):
    """``kind`` begins the names of transformers' classes; the model is saved as its ``auto`` class makes it."""

    kind: str
    task: Task
    settings: Mapping[str, Any]


ARCHITECTURES: dict[str, Architecture] = {
    "bert": Architecture("Bert", TEXT, _PLAIN),
    "roberta": Architecture("Roberta", TEXT, _PLAIN),
    "xlm-roberta": Architecture("XLMRoberta", TEXT, _PLAIN),
    "distilbert": Architecture(
        "DistilBert",
        TEXT,
        {**_IDS, "dim": 16, "hidden_dim": 32, "n_heads": 2, "n_layers": 2, "max_position_embeddings": 32},
    ),
    "deberta-v2": Architecture(
        "DebertaV2",
        TEXT,
        {
            **_PLAIN,
            "relative_attention": True,
            "position_buckets": 8,
            "pos_att_type": ["p2c", "c2p"],
            "norm_rel_ebd": "layer_norm",
        },
    ),
    "albert": Architecture("Albert", TEXT, {**_PLAIN, "embedding_size": 8}),
    "electra": Architecture("Electra", TEXT, {**_PLAIN, "embedding_size": 8}),
    "mpnet": Architecture("MPNet", TEXT, _PLAIN),
    "modernbert": Architecture("ModernBert", TEXT, {**_PLAIN, "cls_token_id": 2, "sep_token_id": 3}),
    "t5": Architecture(
        "T5",
        TEXT,
        {
            **_IDS,
            "eos_token_id": 3,
            "d_model": 16,
            "d_kv": 8,
            "d_ff": 32,
            "num_layers": 2,
            "num_heads": 2,
            "decoder_start_token_id": 0,
        },
    ),
    "bart": Architecture("Bart", TEXT, _PAIRED),
    "mbart": Architecture("MBart", TEXT, _PAIRED),
    "gpt2": Architecture("GPT2", LANGUAGE, _OLD),
    "gpt2-classifier": Architecture("GPT2", TEXT, _OLD),
    "gpt-neo": Architecture(
        "GPTNeo",
        LANGUAGE,
        {
            **_IDS,
            "hidden_size": 16,
            "num_layers": 2,
            "num_heads": 2,
            "attention_types": [[["global", "local"], 1]],
            "max_position_embeddings": 32,
        },
    ),
    "gpt-neox": Architecture("GPTNeoX", LANGUAGE, _PLAIN),
    "gpt-j": Architecture("GPTJ", LANGUAGE, {**_OLD, "rotary_dim": 4}),
    "opt": Architecture("OPT", LANGUAGE, {**_PLAIN, "ffn_dim": 32, "word_embed_proj_dim": 16}),
    "opt-classifier": Architecture("OPT", TEXT, {**_PLAIN, "ffn_dim": 32, "word_embed_proj_dim": 16}),
    "bloom": Architecture("Bloom", LANGUAGE, {**_IDS, "hidden_size": 16, "n_layer": 2, "n_head": 2}),
    "falcon": Architecture("Falcon", LANGUAGE, _PLAIN),
    "llama": Architecture("Llama", LANGUAGE, _GROUPED),
    "llama-classifier": Architecture("Llama", TEXT, _GROUPED),
    "mistral": Architecture("Mistral", LANGUAGE, _HEADS),
    "mixtral": Architecture("Mixtral", LANGUAGE, {**_GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2": Architecture("Qwen2", LANGUAGE, {**_GROUPED, "tie_word_embeddings": True}),
    "qwen2-classifier": Architecture("Qwen2", TEXT, _GROUPED),
    "qwen2-moe": Architecture(
        "Qwen2Moe", LANGUAGE, {**_EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 16}
    ),
    "qwen3": Architecture("Qwen3", LANGUAGE, _HEADS),
    "gemma": Architecture("Gemma", LANGUAGE, _HEADS),
    "gemma2": Architecture("Gemma2", LANGUAGE, {**_HEADS, "sliding_window": 4, "query_pre_attn_scalar": 8}),
    "gemma3": Architecture("Gemma3", LANGUAGE, {**_HEADS, "sliding_window": 4, "query_pre_attn_scalar": 8}),
    "phi": Architecture("Phi", LANGUAGE, _PLAIN),
    "phi3": Architecture("Phi3", LANGUAGE, {**_GROUPED, "original_max_position_embeddings": 32}),
    "stablelm": Architecture("StableLm", LANGUAGE, _GROUPED),
    "cohere": Architecture("Cohere", LANGUAGE, _GROUPED),
    "olmo": Architecture("Olmo", LANGUAGE, _GROUPED),
    "olmo2": Architecture("Olmo2", LANGUAGE, _GROUPED),
    "granite": Architecture("Granite", LANGUAGE, _GROUPED),
    "smollm3": Architecture("SmolLM3", LANGUAGE, _GROUPED),
    "mamba": Architecture(
        "Mamba", LANGUAGE, {**_IDS, "hidden_size": 16, "state_size": 4, "num_hidden_layers": 2, "time_step_rank": 2}
    ),
    "vit": Architecture("ViT", IMAGES, _VISION),
    "deit": Architecture("DeiT", IMAGES, _VISION),
    "beit": Architecture("Beit", IMAGES, {**_VISION, "use_relative_position_bias": True, "use_mask_token": False}),
    "swin": Architecture(
        "Swin",
        IMAGES,
        {
            "image_size": PIXELS,
            "patch_size": 4,
            "embed_dim": 8,
            "depths": [1, 1],
            "num_heads": [2, 2],
            "window_size": 4,
        },
    ),
    "mobilevit": Architecture(
        "MobileViT",
        IMAGES,
        {
            "image_size": PIXELS,
            "hidden_sizes": [16, 16, 16],
            "neck_hidden_sizes": [8, 8, 8, 8, 8, 8, 16],
            "num_attention_heads": 2,
        },
    ),
    "resnet": Architecture(
        "ResNet",
        IMAGES,
        {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"},
    ),
    "convnext": Architecture("ConvNext", IMAGES, {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2}),
    "mobilenet-v2": Architecture(
        "MobileNetV2", IMAGES, {"image_size": PIXELS, "depth_multiplier": 0.25, "depth_divisible_by": 4, "min_depth": 4}
    ),
    "efficientnet": Architecture(
        "EfficientNet",
        IMAGES,
        {
            "image_size": PIXELS,
            "width_coefficient": 0.25,
            "depth_coefficient": 0.5,
            "hidden_dim": 320,
            "kernel_sizes": [3, 3],
            "in_channels": [32, 16],
            "out_channels": [16, 24],
            "strides": [1, 2],
            "num_block_repeats": [1, 2],
            "expand_ratios": [1, 6],
            "depthwise_padding": [],
        },
    ),
    "regnet": Architecture(
        "RegNet", IMAGES, {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "groups_width": 8}
    ),
    "bit": Architecture(
        "Bit", IMAGES, {"embedding_size": 8, "hidden_sizes": [32, 64], "depths": [1, 1], "num_groups": 4}
    ),
    "levit": Architecture(
        "Levit",
        IMAGES,
        {
            "image_size": PIXELS,
            "hidden_sizes": [16, 16, 16],
            "num_attention_heads": [2, 2, 2],
            "depths": [1, 1, 1],
            "key_dim": [8, 8, 8],
            "mlp_ratio": [2, 2, 2],
            "attention_ratio": [2, 2, 2],
            "down_ops": [["Subsample", 8, 2, 4, 2, 2], ["Subsample", 8, 2, 4, 2, 2], [""]],
        },
    ),
}
