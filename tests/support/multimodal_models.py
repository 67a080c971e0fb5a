"""Toy models of images and text, and batches for them."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

IMAGE = 90
TEXT = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
VISION = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}


def llava() -> nn.Module:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = CLIPVisionConfig(**VISION, image_size=16, patch_size=8)
    config = LlavaConfig(
        vision_config=vision, text_config=LlamaConfig(**TEXT), image_token_index=IMAGE, vision_feature_layer=-1
    )
    return LlavaForConditionalGeneration(config).eval()


def qwen() -> nn.Module:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    vision = {
        "depth": 2, "hidden_size": 64, "intermediate_size": 128, "num_heads": 2, "out_hidden_size": 64, "patch_size": 4,
        "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 16, "fullatt_block_indexes": [1],
    }  # fmt: skip
    rope = {"type": "mrope", "mrope_section": [4, 6, 6], "rope_type": "default"}
    tokens = {"image_token_id": IMAGE, "video_token_id": 91, "vision_start_token_id": 92, "vision_end_token_id": 93}
    config = Qwen2_5_VLConfig(vision_config=vision, text_config={**TEXT, "rope_scaling": rope}, **tokens)
    return Qwen2_5_VLForConditionalGeneration(config).eval()


def gemma() -> nn.Module:
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    tokens = {"image_token_index": IMAGE, "boi_token_index": 91, "eoi_token_index": 92, "mm_tokens_per_image": 4}
    text = {**TEXT, "head_dim": 32, "query_pre_attn_scalar": 32}
    return Gemma3ForConditionalGeneration(
        Gemma3Config(vision_config={**VISION, "image_size": 16, "patch_size": 8}, text_config=text, **tokens)
    ).eval()


def text_batch() -> dict[str, Tensor]:
    ids = torch.randint(3, 80, (2, 24))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def batch_of(name: str) -> dict[str, Tensor]:
    """Two rows of text, each with an image of four tokens."""
    batch = text_batch()
    ids = batch["input_ids"]
    ids[:, 3:7] = IMAGE
    if name == "qwen":
        grid = torch.tensor([[1, 4, 4]] * 2)
        kinds = (ids == IMAGE).int()
        return batch | {"pixel_values": torch.randn(32, 96), "image_grid_thw": grid, "mm_token_type_ids": kinds}
    if name == "gemma":
        batch["token_type_ids"] = (ids == IMAGE).long()
    return batch | {"pixel_values": torch.randn(2, 3, 16, 16)}


MODELS: dict[str, Callable[[], nn.Module]] = {"llava": llava, "qwen": qwen, "gemma": gemma}
TOWERS = {
    "llava": ["model.vision_tower", "model.multi_modal_projector"],
    "qwen": ["model.visual"],
    "gemma": ["model.vision_tower", "model.multi_modal_projector"],
}
