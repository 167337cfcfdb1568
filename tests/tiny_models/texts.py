"""Tokenizers and text encoders of a few kB, in the real classes, whose weights `fill` sets."""

import string
from pathlib import Path
from typing import Any

from tokenizers import pre_tokenizers
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen2VLImageProcessorPil,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLModel,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
    UMT5Config,
    UMT5EncoderModel,
)

from pocket.train.model import write_json

TOWER = "text_model."  # before the names of CLIP's weights, in published repositories
WIDTH = 16  # of every text encoder's hidden states
POCKET = Path("pocket/model/tokenizer")  # one token for each word of the Qwen-Image templates, which drop 34
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}"
    "{% else %}{% for part in message.content %}{{ part.text }}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def qwen_tokenizer() -> Qwen2Tokenizer:
    """The pocket model's tokenizer, and a template of chats, which Qwen3's has."""
    made = Qwen2Tokenizer.from_pretrained(POCKET)
    made.chat_template = CHAT
    return made


def clip_tokenizer() -> CLIPTokenizer:
    """CLIP's tokenizer, for which every letter is a token."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={piece: at for at, piece in enumerate(pieces)}, merges=[], model_max_length=77)


def t5_tokenizer() -> T5Tokenizer:
    """T5's tokenizer, for which every letter is a token; others are unknown."""
    pieces = ["<pad>", "</s>", "<unk>", "▁", *string.ascii_letters, *string.digits, *string.punctuation]
    return T5Tokenizer(vocab=[(piece, -float(at)) for at, piece in enumerate(pieces)], extra_ids=0)


def clip(*, projection: bool) -> PreTrainedModel:
    """CLIP's text encoder of two layers, with or without its projection."""
    words = clip_tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=WIDTH,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config)


def t5(*, per_layer_bias: bool = False) -> PreTrainedModel:
    """T5's encoder of two layers; UMT5's, which Wan has, holds relative positions in each layer."""
    sizes: dict[str, Any] = {"vocab_size": len(t5_tokenizer()), "d_model": WIDTH, "d_kv": 8, "d_ff": 2 * WIDTH}
    sizes |= {"num_layers": 2, "num_heads": 2, "feed_forward_proj": "gated-gelu"}
    return UMT5EncoderModel(UMT5Config(**sizes)) if per_layer_bias else T5EncoderModel(T5Config(**sizes))


def _decoder(layers: int) -> dict[str, Any]:
    words = qwen_tokenizer()
    return {
        "vocab_size": len(words),
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "tie_word_embeddings": True,
        "bos_token_id": words.convert_tokens_to_ids("<|endoftext|>"),
        "eos_token_id": words.convert_tokens_to_ids("<|im_end|>"),
        "pad_token_id": words.convert_tokens_to_ids("<|endoftext|>"),
    }


def qwen3(layers: int = 2) -> PreTrainedModel:
    """Qwen3: FLUX.2 klein reads the states after layers 9, 18 and 27, so it wants 27 layers or more."""
    return Qwen3ForCausalLM(Qwen3Config(**_decoder(layers)))


def qwen25_vl() -> PreTrainedModel:
    """Qwen2.5-VL with a vision tower of one layer, for Qwen-Image."""
    text = _decoder(2) | {"rope_parameters": _rope([1, 1, 2])}
    vision: dict[str, Any] = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": WIDTH,
    }
    vision |= {"fullatt_block_indexes": [0], "window_size": 112}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, **_picture_tokens())
    return Qwen2_5_VLForConditionalGeneration(config)


def qwen3_vl(*, head: bool) -> PreTrainedModel:
    """Qwen3-VL: with its head Qwen-Image-2.1's, without it Krea 2's."""
    text = _decoder(2) | {"rope_parameters": _rope([2, 1, 1]) | {"mrope_interleaved": True}}
    vision: dict[str, Any] = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": WIDTH,
    }
    vision |= {"deepstack_visual_indexes": [], "num_position_embeddings": 16}
    config = Qwen3VLConfig(text_config=text, vision_config=vision, **_picture_tokens())
    return (Qwen3VLForConditionalGeneration if head else Qwen3VLModel)(config)


def _rope(section: list[int]) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": 1e6, "mrope_section": section}


def _picture_tokens() -> dict[str, Any]:
    token = qwen_tokenizer().convert_tokens_to_ids
    return {
        "image_token_id": token("<|image_pad|>"),
        "video_token_id": token("<|video_pad|>"),
        "vision_start_token_id": token("<|vision_start|>"),
        "vision_end_token_id": token("<|vision_end|>"),
        "tie_word_embeddings": True,
    }


def save_processor(folder: Path, kind: str) -> None:
    """The parts of a Qwen VL processor, which cannot be made as a whole without torchvision."""
    qwen_tokenizer().save_pretrained(folder)
    pixels = 56 * 56
    Qwen2VLImageProcessorPil(size={"shortest_edge": pixels, "longest_edge": pixels}).save_pretrained(folder)
    write_json(folder / "video_preprocessor_config.json", {"video_processor_type": f"{kind}VideoProcessor"})
