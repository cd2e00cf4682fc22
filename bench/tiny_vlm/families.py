"""The three small models: the transformers classes of each family with small configurations, and their fast path.

The fast path computes what `model(**processor_inputs)` computes, for a batch of 336 x 336 pictures at once and without the
per-picture Python of the general code; `check_fast_path` compares the two before every training run.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from prompts import PROMPTS, VOCABULARY
from torch import Tensor
from transformers import (
    AttentionInterface,
    CLIPVisionConfig,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLVisionConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)

FAMILIES = ("llava", "internvl", "qwen2_vl")
VISUAL_TOKENS = {"llava": 744, "internvl": 576, "qwen2_vl": 576}
GRID = 24
MEAN, STD = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
}


def make_model(family: str, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """A randomly initialised model of the family, about six million parameters."""
    ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    image_token = tokenizer.convert_tokens_to_ids(PROMPTS[family].image_token)
    if family == "llava":
        vision = CLIPVisionConfig(
            hidden_size=192,
            intermediate_size=576,
            num_hidden_layers=4,
            num_attention_heads=3,
            image_size=168,
            patch_size=14,
            hidden_act="gelu",
        )
        config = LlavaNextConfig(
            vision_config=vision,
            text_config=LlamaConfig(**TEXT, num_key_value_heads=4, head_dim=64, **ids),
            image_token_index=image_token,
            image_grid_pinpoints=[[336, 336]],
            vision_feature_layer=-1,
            image_seq_length=VISUAL_TOKENS[family],
            tie_word_embeddings=True,
            **ids,
        )
        model = LlavaNextForConditionalGeneration(config)
        _start_with_waves(model.model.vision_tower.embeddings.position_embedding.weight)
        return model
    if family == "internvl":
        vision = InternVLVisionConfig(
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=2,
            image_size=336,
            patch_size=7,
            use_qk_norm=True,
            layer_scale_init_value=1.0,
        )
        config = InternVLConfig(
            vision_config=vision,
            text_config=Qwen2Config(**TEXT, num_key_value_heads=2, **ids),
            image_token_id=image_token,
            image_seq_length=VISUAL_TOKENS[family],
            tie_word_embeddings=True,
            **ids,
        )
        model = InternVLForConditionalGeneration(config)
        _start_with_waves(model.model.vision_tower.embeddings.position_embeddings[0])
        return model
    text = {
        **TEXT,
        "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "default", "mrope_section": [8, 12, 12], "rope_theta": 10000.0},
    }
    config = Qwen2VLConfig(
        text_config={**text, **ids},
        vision_config={
            "depth": 4,
            "embed_dim": 128,
            "hidden_size": 256,
            "mlp_ratio": 3,
            "num_heads": 2,
            "patch_size": 7,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
        image_token_id=image_token,
        video_token_id=tokenizer.convert_tokens_to_ids("<|video_pad|>"),
        vision_start_token_id=tokenizer.convert_tokens_to_ids("<|vision_start|>"),
        vision_end_token_id=tokenizer.convert_tokens_to_ids("<|vision_end|>"),
        tie_word_embeddings=True,
        **ids,
    )
    return Qwen2VLForConditionalGeneration(config)


@torch.no_grad()
def _start_with_waves(positions: Tensor) -> None:
    """Sine waves across and down the grid in a learnt position table [1 + h * h, C], so that neighbours look alike.

    A table that starts at zero or at random costs thousands of steps before the tower sees what lies side by side.
    """
    side, quarter = round((len(positions) - 1) ** 0.5), positions.shape[1] // 4
    place = torch.arange(side)[:, None] * 100.0 ** (-torch.arange(quarter) / quarter)  # [h, C / 4]
    waves = torch.cat([place.sin(), place.cos()], 1) * 0.2  # [h, C / 2]
    down, across = waves[:, None].expand(-1, side, -1), waves[None].expand(side, -1, -1)
    positions[1:] = torch.cat([down, across], 2).flatten(0, 1)


def save_processor(family: str, folder: Path) -> None:
    """Writes preprocessor_config.json with transformers' PIL image processor of the family (no torchvision)."""
    common = {"image_mean": MEAN, "image_std": STD}
    if family == "llava":
        from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

        size = {"size": {"shortest_edge": 168}, "crop_size": {"height": 168, "width": 168}}
        LlavaNextImageProcessorPil(**size, image_grid_pinpoints=[[336, 336]], **common).save_pretrained(folder)
        processor = {
            "processor_class": "LlavaNextProcessor",
            "patch_size": 14,
            "vision_feature_select_strategy": "default",
            "image_token": PROMPTS[family].image_token,
            "num_additional_image_tokens": 1,
        }
        (folder / "processor_config.json").write_text(json.dumps(processor, indent=2) + "\n")
    elif family == "internvl":
        from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

        size = {"size": {"height": 336, "width": 336}, "crop_to_patches": False}
        GotOcr2ImageProcessorPil(**size, **common).save_pretrained(folder)
        processor = {"processor_class": "InternVLProcessor", "image_seq_length": VISUAL_TOKENS[family]}
        (folder / "processor_config.json").write_text(json.dumps(processor, indent=2) + "\n")
    else:
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        size = {"size": {"shortest_edge": 336 * 336, "longest_edge": 336 * 336}}
        Qwen2VLImageProcessorPil(**size, patch_size=7, merge_size=2, **common).save_pretrained(folder)


def image_placeholder(family: str) -> str:
    """What the processor puts in place of one picture's token."""
    if family == "llava":
        return "<image>" * VISUAL_TOKENS[family]
    if family == "internvl":
        return "<img>" + "<IMG_CONTEXT>" * VISUAL_TOKENS[family] + "</img>"
    return "<|image_pad|>" * VISUAL_TOKENS[family]


def _normalised(images: Tensor) -> Tensor:
    return (images.permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.5  # [B, 3, 336, 336]


def _patches(x: Tensor) -> Tensor:
    """Qwen2-VL's patch rows [B * 2304, 294]: 2 x 2 patches of a merged token together, the frame twice."""
    patches = x.view(-1, 3, GRID, 2, 7, GRID, 2, 7).permute(0, 2, 5, 3, 6, 1, 4, 7)  # [B, h, w, 2, 2, 3, 7, 7]
    return patches.unsqueeze(6).expand(-1, -1, -1, -1, -1, -1, 2, -1, -1).reshape(-1, 3 * 2 * 7 * 7)


def pixel_inputs(family: str, images: Tensor) -> dict[str, Tensor]:
    """The processor's outputs for uint8 pictures [B, 336, 336, 3], computed on their device."""
    x = _normalised(images)
    b = x.shape[0]
    if family == "internvl":
        return {"pixel_values": x}
    if family == "llava":
        base = F.interpolate(x, (168, 168), mode="bicubic", antialias=True).clamp(-1, 1)
        tiles = x.view(b, 3, 2, 168, 2, 168).permute(0, 2, 4, 1, 3, 5).reshape(b, 4, 3, 168, 168)
        sizes = torch.full((b, 2), 336, device=x.device)
        return {"pixel_values": torch.cat([base[:, None], tiles], 1), "image_sizes": sizes}
    grid = torch.tensor([[1, 2 * GRID, 2 * GRID]], device=x.device).expand(b, 3)
    return {"pixel_values": _patches(x), "image_grid_thw": grid}


def _equal_lengths(module: torch.nn.Module, q: Tensor, k: Tensor, v: Tensor, *args: object, **kwargs: object):
    """Attention of Qwen2-VL's vision tower over pictures of equal size [1, H, B * 2304, D], one batch in place of B calls."""
    _, h, _, d = q.shape
    q, k, v = (t.view(h, -1, 4 * GRID * GRID, d).transpose(0, 1) for t in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v)  # [B, H, 2304, D]
    return out.permute(0, 2, 1, 3).reshape(1, -1, h, d), None


# transformers hands the whole batch over, instead of a call a picture, where the name says flash.
AttentionInterface.register("tiny_flash_equal_lengths", _equal_lengths)


def vision_constants(family: str, model: PreTrainedModel, images: Tensor) -> dict[str, Any]:
    """What Qwen2-VL's vision blocks get for pictures of this size and number beside the patches; nothing elsewhere.

    The tower works these out on the host in every call, which a captured step must not.
    """
    if family != "qwen2_vl":
        return {}
    seen: dict[str, Any] = {}
    hook = model.model.visual.blocks[0].register_forward_pre_hook(
        lambda _module, _args, kwargs: seen.update(kwargs), with_kwargs=True
    )
    with torch.no_grad():
        inputs = pixel_inputs(family, images)
        model.model.visual(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"])
    hook.remove()
    return seen


def tower_outputs(family: str, model: PreTrainedModel, images: Tensor, constants: dict[str, Any]) -> Tensor:
    """What the vision tower hands to the projector."""
    if family == "qwen2_vl":
        hidden = model.model.visual.patch_embed(_patches(_normalised(images)))
        for block in model.model.visual.blocks:
            hidden = block(hidden, **constants)
        return hidden
    pixels = pixel_inputs(family, images)["pixel_values"]
    if family == "llava":
        pixels = pixels.flatten(0, 1)  # five tiles a picture
    return model.model.vision_tower(pixel_values=pixels).last_hidden_state[:, 1:]


def visual_tokens(family: str, model: PreTrainedModel, tower: Tensor) -> Tensor:
    """Embeddings [B, V, 256] that stand in place of the picture's placeholder tokens."""
    if family == "qwen2_vl":
        return model.model.visual.merger(tower).view(-1, 576, 256)
    if family == "internvl":
        b = tower.shape[0]
        grid = model.model.pixel_shuffle(tower.reshape(b, 48, 48, -1), scale_factor=0.5)
        return model.model.multi_modal_projector(grid.reshape(b, 576, -1))
    b = tower.shape[0] // 5
    features = model.model.multi_modal_projector(tower).view(b, 5, 144, -1)
    tiles = features[:, 1:].view(b, 2, 2, 12, 12, -1).permute(0, 1, 3, 2, 4, 5).reshape(b, GRID, GRID, -1)
    newline = model.model.image_newline.to(tiles.dtype).expand(b, GRID, 1, -1)
    return torch.cat([features[:, 0], torch.cat([tiles, newline], 2).flatten(1, 2)], 1)


def grid_tokens(family: str, tokens: Tensor) -> Tensor:
    """The 24 x 24 of the visual tokens [B, V, C] that stand on the picture's cells, in reading order [B, 576, C]."""
    if family != "llava":
        return tokens
    return tokens[:, 144:].unflatten(1, (GRID, GRID + 1))[:, :, :GRID].flatten(1, 2)


def position_ids(family: str, model: PreTrainedModel, input_ids: Tensor) -> Tensor | None:
    """M-RoPE positions [3, 1, S] of Qwen2-VL, which are the same for every picture; None elsewhere."""
    if family != "qwen2_vl":
        return None
    row = input_ids[:1].cpu()
    grid = torch.tensor([[1, 2 * GRID, 2 * GRID]])
    kinds = (row == model.config.image_token_id).long()
    return model.model.get_rope_index(row, mm_token_type_ids=kinds, image_grid_thw=grid)[0].to(input_ids.device)


def text_hidden(
    model: PreTrainedModel, input_ids: Tensor, visual: Tensor, first: int, positions: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Hidden states [B, S, 256] after half of the layers and after all; the picture's tokens start at column `first`."""
    decoder = model.model.language_model
    words = model.get_input_embeddings()(input_ids)
    hidden = torch.cat([words[:, :first], visual.to(words.dtype), words[:, first + visual.shape[1] :]], 1)
    if positions is None:
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
    rotary = decoder.rotary_emb(hidden, positions)
    half = middle = len(decoder.layers) // 2
    for i, layer in enumerate(decoder.layers):
        if i == half:
            middle = hidden
        hidden = layer(hidden, attention_mask=None, position_embeddings=rotary, position_ids=None, use_cache=False)
    return middle, decoder.norm(hidden)


def compile_layers(family: str, model: PreTrainedModel) -> None:
    """Compiles one layer of each kind; all layers of a kind share the code."""
    torch._dynamo.config.recompile_limit = 64
    vision = (
        model.model.visual.blocks
        if family == "qwen2_vl"
        else model.model.vision_tower.encoder.layer
        if family == "internvl"
        else model.model.vision_tower.encoder.layers
    )
    for layer in (*vision, *model.model.language_model.layers):
        layer.compile()


@torch.no_grad()
def check_fast_path(family: str, model: PreTrainedModel, input_ids: Tensor, images: Tensor, first: int) -> float:
    """Largest difference of the last logits between the fast path and the model's own forward."""
    positions = position_ids(family, model, input_ids)
    visual = visual_tokens(family, model, tower_outputs(family, model, images, vision_constants(family, model, images)))
    _, hidden = text_hidden(model, input_ids, visual, first, positions)
    inputs = pixel_inputs(family, images)
    if family == "qwen2_vl":
        inputs["mm_token_type_ids"] = (input_ids == model.config.image_token_id).long()
    own = model(input_ids=input_ids, attention_mask=torch.ones_like(input_ids), **inputs).logits[:, -1]
    difference = (model.lm_head(hidden[:, -1]) - own).abs().max().item()
    if not difference < 1e-3:
        raise RuntimeError(f"{family}: fast path differs from the model's own forward by {difference}")
    return difference
