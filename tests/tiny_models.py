"""Tiny random models of every supported family, and inputs for them, made in memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor

VISION_FAMILIES = ("llava", "llava_next", "llava_onevision", "internvl", "qwen2_vl", "qwen2_5_vl", "qwen3_vl")
TEXT_FAMILIES = ("llama", "mistral", "qwen2", "qwen3")

PAD, BEGIN, VISION_START, VISION_END, IMAGE, VIDEO = 0, 1, 2, 3, 4, 5  # token ids; plain words start at 8
WORDS, VOCABULARY = 8, 99

TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": PAD,
    "bos_token_id": BEGIN,
    "eos_token_id": None,
    "initializer_range": 0.5,  # wide, so that attention is far from uniform
    "tie_word_embeddings": False,
}
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}


@dataclass(frozen=True)
class Tiny:
    """A model in evaluation mode, and how many visual tokens a picture becomes."""

    family: str
    model: Any
    picture_tokens: int


def tiny(family: str, seed: int = 0, **text: Any) -> Tiny:
    """A random model of `family`, fp32 on the CPU; `text` changes its text configuration."""
    torch.manual_seed(seed)
    config, model_class, tokens = _vision(family, text) if family in VISION_FAMILIES else _text(family, text)
    model = model_class(config).eval()
    model.get_output_embeddings().weight.data *= 0.1  # logits of the size of 1, so that 1e-5 is what fp32 can tell
    model.generation_config.pad_token_id = PAD
    model.generation_config.eos_token_id = None
    return Tiny(family, model, tokens)


def inputs_for(kind: Tiny, lengths: Sequence[int] = (19,), seed: int = 1) -> dict[str, Tensor]:
    """Left-padded prompts with `lengths` words behind a picture each (none for text models)."""
    generator = torch.Generator().manual_seed(seed)
    picture = [VISION_START, *[IMAGE] * kind.picture_tokens, VISION_END] if kind.picture_tokens else []
    rows = [
        [BEGIN, 9, *picture, *torch.randint(WORDS, VOCABULARY, (n,), generator=generator).tolist()] for n in lengths
    ]
    width = max(map(len, rows))
    ids = torch.tensor([[PAD] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    inputs = {"input_ids": ids, "attention_mask": mask}
    return inputs | _pictures(kind, ids, generator)


def _pictures(kind: Tiny, ids: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    n = len(ids)
    if kind.family in ("llava", "internvl"):
        return {"pixel_values": noise(n, 3, 16, 16)}
    if kind.family in ("llava_next", "llava_onevision"):
        sizes = {"image_sizes": torch.tensor([[20, 32]] * n)}
        return sizes | {"pixel_values": noise(n, 5, 3, 16, 16)}
    if kind.family.endswith("_vl"):
        patch = kind.model.config.vision_config
        grid = torch.tensor([[1, 8, 6]] * n)
        features = 3 * patch.temporal_patch_size * patch.patch_size**2
        return {
            "pixel_values": noise(n * 48, features),
            "image_grid_thw": grid,
            "mm_token_type_ids": (ids == IMAGE).int(),
        }
    return {}


def _text(family: str, text: dict[str, Any]) -> tuple[Any, Any, int]:
    config_class, model_class = {
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
        "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM),
        "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
        "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
    }[family]
    extra = {"mistral": {"sliding_window": None}, "qwen3": {"head_dim": 8}}.get(family, {})
    return config_class(**TEXT | extra | text), model_class, 0


def _vision(family: str, text: dict[str, Any]) -> tuple[Any, Any, int]:
    tower = {"hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 4}
    clip = transformers.CLIPVisionConfig(image_size=16, patch_size=4, projection_dim=32, **tower)
    llama, qwen2 = (c(**TEXT | text) for c in (transformers.LlamaConfig, transformers.Qwen2Config))
    if family == "llava":
        config = transformers.LlavaConfig(
            vision_config=clip, text_config=llama, image_token_id=IMAGE, vision_feature_layer=-2
        )
        return config, transformers.LlavaForConditionalGeneration, 16
    if family == "llava_next":
        config = transformers.LlavaNextConfig(
            vision_config=clip,
            text_config=llama,
            image_token_id=IMAGE,
            vision_feature_layer=-2,
            image_grid_pinpoints=[[32, 32]],
        )
        return config, transformers.LlavaNextForConditionalGeneration, 16 + 6 * 9
    if family == "llava_onevision":
        siglip = transformers.SiglipVisionConfig(image_size=16, patch_size=4, vision_use_head=False, **tower)
        config = transformers.LlavaOnevisionConfig(
            vision_config=siglip,
            text_config=qwen2,
            image_token_id=IMAGE,
            video_token_id=VIDEO,
            vision_feature_layer=-1,
            image_grid_pinpoints=[[32, 32]],
        )
        return config, transformers.LlavaOnevisionForConditionalGeneration, 16 + 6 * 9
    if family == "internvl":
        seen = transformers.InternVLVisionConfig(image_size=[16, 16], patch_size=[2, 2], **tower)
        config = transformers.InternVLConfig(
            vision_config=seen, text_config=qwen2, image_token_id=IMAGE, downsample_ratio=0.5
        )
        return config, transformers.InternVLForConditionalGeneration, 16
    return *_qwen(family, text), 12


def _qwen(family: str, text: dict[str, Any]) -> tuple[Any, Any]:
    ids = {
        "image_token_id": IMAGE,
        "video_token_id": VIDEO,
        "vision_start_token_id": VISION_START,
        "vision_end_token_id": VISION_END,
    }
    sizes: dict[str, Any] = {"patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2, "depth": 2}
    words = TEXT | {"rope_parameters": MROPE} | text
    if family == "qwen2_vl":
        config = transformers.Qwen2VLConfig(
            text_config=words, vision_config=sizes | {"embed_dim": 32, "hidden_size": 32, "num_heads": 4}, **ids
        )
        return config, transformers.Qwen2VLForConditionalGeneration
    tower = sizes | {"hidden_size": 32, "out_hidden_size": 32, "num_heads": 4, "intermediate_size": 37}
    if family == "qwen2_5_vl":
        config = transformers.Qwen2_5_VLConfig(
            text_config=words, vision_config=tower | {"fullatt_block_indexes": [1], "window_size": 16}, **ids
        )
        return config, transformers.Qwen2_5_VLForConditionalGeneration
    more = {"num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]}
    config = transformers.Qwen3VLConfig(text_config=words | {"head_dim": 8}, vision_config=tower | more, **ids)
    return config, transformers.Qwen3VLForConditionalGeneration
