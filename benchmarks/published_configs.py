"""What the published models' own configuration files say, as plain facts: enough to build them, weights aside, offline."""

from __future__ import annotations

from typing import Any

Facts = dict[str, Any]

_T5: Facts = {
    "model_type": "t5",
    "architectures": ["T5ForConditionalGeneration"],
    "vocab_size": 32128,
    "d_kv": 64,
    "num_layers": 24,
    "relative_attention_num_buckets": 32,
    "dropout_rate": 0.1,
    "layer_norm_epsilon": 1e-6,
    "is_encoder_decoder": True,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "decoder_start_token_id": 0,
}
_LLAMA: Facts = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 32000,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 4096,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
_CLIP_L: Facts = {
    "model_type": "clip_text_model",
    "architectures": ["CLIPTextModel"],
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "projection_dim": 768,
}
_T5_XXL = _T5 | {"d_model": 4096, "d_ff": 10240, "num_heads": 64, "feed_forward_proj": "gated-gelu"}
_GEMMA_2: Facts = {
    "model_type": "gemma2",
    "architectures": ["Gemma2Model"],
    "vocab_size": 256000,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "max_position_embeddings": 8192,
}

LANGUAGE_MODELS: dict[str, Facts] = {
    "google/flan-t5-xl": _T5 | {"d_model": 2048, "d_ff": 5120, "num_heads": 32, "feed_forward_proj": "gated-gelu"},
    "google-t5/t5-large": _T5 | {"d_model": 1024, "d_ff": 4096, "num_heads": 16, "feed_forward_proj": "relu"},
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": _LLAMA
    | {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "max_position_embeddings": 2048,
    },
    "meta-llama/Llama-2-7b-hf": _LLAMA
    | {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "meta-llama/Llama-2-13b-hf": _LLAMA
    | {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40},
    "Qwen/Qwen3-1.7B": {
        "model_type": "qwen3",
        "architectures": ["Qwen3ForCausalLM"],
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 40960,
        "tie_word_embeddings": True,
    },
}
"""By name on the hub, the config.json."""

LANGUAGE_MODEL_PARAMETERS: dict[str, int] = {
    "google/flan-t5-xl": 1_223_527_424,  # its encoder
    "google-t5/t5-large": 334_939_648,  # its encoder
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": 1_034_512_384,  # without the head that gives words, here and below
    "meta-llama/Llama-2-7b-hf": 6_607_343_616,
    "meta-llama/Llama-2-13b-hf": 12_852_024_320,
    "Qwen/Qwen3-1.7B": 1_720_574_976,
}

_KL: Facts = {
    "_class_name": "AutoencoderKL",
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "latent_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}
_SD_1: Facts = {
    "unet": {
        "_class_name": "UNet2DConditionModel",
        "sample_size": 64,
        "in_channels": 4,
        "out_channels": 4,
        "act_fn": "silu",
        "attention_head_dim": 8,
        "block_out_channels": [320, 640, 1280, 1280],
        "cross_attention_dim": 768,
        "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
        "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
        "layers_per_block": 2,
        "norm_num_groups": 32,
    },
    "vae": _KL,
    "scheduler": {
        "_class_name": "PNDMScheduler",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "num_train_timesteps": 1000,
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
        "steps_offset": 1,
    },
    "text_encoder": _CLIP_L,
}
_SANA_VAE: Facts = {
    "_class_name": "AutoencoderDC",
    "encoder_block_out_channels": [128, 256, 512, 512, 1024, 1024],
    "latent_channels": 32,
    "scaling_factor": 0.41407,
}
_SANA_SCHEDULER: Facts = {
    "_class_name": "DPMSolverMultistepScheduler",
    "num_train_timesteps": 1000,
    "prediction_type": "flow_prediction",
    "use_flow_sigmas": True,
    "flow_shift": 3.0,
}
_SANA: Facts = {
    "_class_name": "SanaTransformer2DModel",
    "in_channels": 32,
    "out_channels": 32,
    "caption_channels": 2304,
    "attention_bias": False,
    "attention_head_dim": 32,
    "mlp_ratio": 2.5,
    "norm_elementwise_affine": False,
    "norm_eps": 1e-6,
    "patch_size": 1,
}

DENOISERS: dict[str, Facts] = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": _SD_1,
    "CompVis/stable-diffusion-v1-4": _SD_1,
    "stabilityai/stable-diffusion-xl-base-1.0": {
        "unet": {
            "_class_name": "UNet2DConditionModel",
            "sample_size": 128,
            "in_channels": 4,
            "out_channels": 4,
            "act_fn": "silu",
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
            "attention_head_dim": [5, 10, 20],
            "block_out_channels": [320, 640, 1280],
            "cross_attention_dim": 2048,
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
            "layers_per_block": 2,
            "transformer_layers_per_block": [1, 2, 10],
            "use_linear_projection": True,
            "norm_num_groups": 32,
        },
        "vae": _KL | {"scaling_factor": 0.13025},
        "scheduler": {
            "_class_name": "EulerDiscreteScheduler",
            "beta_start": 0.00085,
            "beta_end": 0.012,
            "beta_schedule": "scaled_linear",
            "num_train_timesteps": 1000,
            "prediction_type": "epsilon",
            "steps_offset": 1,
            "timestep_spacing": "leading",
        },
    },
    "PixArt-alpha/PixArt-XL-2-512x512": {
        "transformer": {
            "_class_name": "Transformer2DModel",
            "activation_fn": "gelu-approximate",
            "attention_bias": True,
            "attention_head_dim": 72,
            "caption_channels": 4096,
            "cross_attention_dim": 1152,
            "in_channels": 4,
            "norm_elementwise_affine": False,
            "norm_eps": 1e-6,
            "norm_type": "ada_norm_single",
            "num_attention_heads": 16,
            "num_embeds_ada_norm": 1000,
            "num_layers": 28,
            "out_channels": 8,
            "patch_size": 2,
            "sample_size": 64,
        },
        "vae": _SD_1["vae"],
        "scheduler": {
            "_class_name": "DPMSolverMultistepScheduler",
            "beta_start": 0.0001,
            "beta_end": 0.02,
            "beta_schedule": "linear",
            "num_train_timesteps": 1000,
            "prediction_type": "epsilon",
        },
        "text_encoder": _T5_XXL,
    },
    "Efficient-Large-Model/Sana_600M_512px_diffusers": {
        "transformer": _SANA
        | {
            "num_layers": 28,
            "num_attention_heads": 36,
            "num_cross_attention_heads": 16,
            "cross_attention_head_dim": 72,
            "cross_attention_dim": 1152,
            "sample_size": 16,
        },
        "vae": _SANA_VAE,
        "scheduler": _SANA_SCHEDULER,
        "text_encoder": _GEMMA_2,
    },
    "Efficient-Large-Model/Sana_1600M_1024px_diffusers": {
        "transformer": _SANA
        | {
            "num_layers": 20,
            "num_attention_heads": 70,
            "num_cross_attention_heads": 20,
            "cross_attention_head_dim": 112,
            "cross_attention_dim": 2240,
            "sample_size": 32,
        },
        "vae": _SANA_VAE,
        "scheduler": _SANA_SCHEDULER,
        "text_encoder": _GEMMA_2,
    },
}
"""By name on the hub, the configuration in each folder of the pipeline."""

DENOISER_PARAMETERS: dict[str, int] = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": 859_520_964,
    "CompVis/stable-diffusion-v1-4": 859_520_964,
    "stabilityai/stable-diffusion-xl-base-1.0": 2_567_463_684,
    "PixArt-alpha/PixArt-XL-2-512x512": 610_856_096,
    "Efficient-Large-Model/Sana_600M_512px_diffusers": 591_747_872,
    "Efficient-Large-Model/Sana_1600M_1024px_diffusers": 1_604_462_752,
}
"""Of the network that denoises."""
