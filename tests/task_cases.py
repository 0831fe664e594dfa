"""A tiny recipe for each way that a task can be set, with data that can be learned."""

import json
import wave
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import (
    ASTConfig,
    ASTFeatureExtractor,
    ASTForAudioClassification,
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForSequenceClassification,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForAudioClassification,
)

from fedtune.models.image_model_files import save_image_model
from fedtune.models.logistic import LogisticRegression
from fedtune.recipe.schema import Recipe
from fedtune.recipe.yaml_file import parse_recipe
from fedtune.simulation import resolve_recipe

__all__ = ["AUDIO_MODELS", "CASES", "save_audio_model", "save_encoder", "save_tone", "task_recipe"]

_WORDS = ("red", "green", "blue", "cat", "dog", "cow", "runs", "sits", "to", "in", "rome", "oslo", "lima", "ann", "bob")
_NUMBERS = tuple(f"n{number}" for number in range(60))
_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_COLOURS, _ANIMALS, _PLACES, _NAMES = _WORDS[:3], _WORDS[3:6], _WORDS[10:13], _WORDS[13:]

_RECIPE = """
version: 2
name: case
task: {task}
model: {{source: "path:{folder}/model"}}
data: {{source: "jsonl:{folder}/data.jsonl"}}
devices: [{{name: toy, count: 2}}]
train: {{techniques: full, lr: 0.02, batch_size: 8, max_length: 16, local_steps: 10}}
federation: {{rounds: 4}}
"""


def _pick(words: tuple[str, ...], row: int) -> str:
    return words[row % len(words)]


def _text(row: int) -> str:
    return f"{_pick(_COLOURS, row)} {_pick(_ANIMALS, row // 3)} runs n{row % 60}{' sits' * (row % 2)}"


def _one_class(row: int) -> dict[str, Any]:
    return {"text": _text(row), "label": _pick(_COLOURS, row)}


def _pair(row: int) -> dict[str, Any]:
    """Whether the second text has a cat."""
    other = _pick(_ANIMALS, row // 7)
    return {
        "text": f"{_pick(_ANIMALS, row)} sits n{row % 60}",
        "text_pair": f"{other} runs",
        "label": "yes" if other == "cat" else "no",
    }


def _several(row: int) -> dict[str, Any]:
    return {"text": _text(row), "label": [_pick(_COLOURS, row), _pick(_ANIMALS, row // 3)][: 1 + row % 5]}


def _number(row: int) -> dict[str, Any]:
    return {"text": _text(row), "label": float(row % 3) - 1.0 + 0.25 * (row // 3 % 3)}


def _tags(row: int) -> dict[str, Any]:
    name, place = _pick(_NAMES, row), _pick(_PLACES, row // 2)
    more = row % 3
    return {
        "words": [name, "runs", "to", place, place, f"n{row % 60}", *["red"] * more],
        "tags": ["B-PER", "O", "O", "B-LOC", "I-LOC", "O", *["O"] * more],
    }


def _conversation(row: int) -> dict[str, Any]:
    """The colour of a number and, in every other row, the place of an animal."""
    said = [("user", f"n{row % 60}"), ("assistant", _pick(_COLOURS, row))]
    said += [("user", _pick(_ANIMALS, row // 3)), ("assistant", _pick(_PLACES, row // 3))] if row % 2 else []
    return {"messages": [{"role": role, "content": content} for role, content in said]}


def _image(row: int, *, several: bool) -> dict[str, Any]:
    """An image whose left or right half is bright, or both; ``_save_images`` writes its file."""
    bright = [name for name, on in (("left", row % 2), ("right", row // 2 % 2)) if on]
    return (
        {"image": f"{row}.png", "label": bright or ["dark"]}
        if several
        else {"image": f"{row}.png", "label": str(row % 2)}
    )


def _save_images(folder: Path, rows: int) -> None:
    random = np.random.default_rng(0)
    for row in range(rows):
        pixels = random.integers(0, 60, (8, 8), np.uint8)
        pixels[:, :4] += np.uint8(180 * (row % 2))
        pixels[:, 4:] += np.uint8(180 * (row // 2 % 2))
        Image.fromarray(pixels).save(folder / f"{row}.png")


_RATE, _TONES = 16000, {"high": 2000, "low": 500}


def save_tone(file: Path, hertz: float, seconds: float, *, rate: int = _RATE) -> None:
    """A wav file of 16 bits with a tone and a little noise."""
    time = np.arange(round(seconds * rate)) / rate
    noise = np.random.default_rng(len(time)).normal(0, 0.02, len(time))
    samples = np.round((0.3 * np.sin(2 * np.pi * hertz * time) + noise) * 32767).astype("<i2")
    with wave.open(str(file), "wb") as written:
        written.setnchannels(1)
        written.setsampwidth(2)
        written.setframerate(rate)
        written.writeframes(samples.tobytes())


def _recording(row: int) -> dict[str, Any]:
    """A high or a low tone; ``_save_recordings`` writes its file."""
    return {"audio": f"{row}.wav", "label": sorted(_TONES)[row % 2]}


def _save_recordings(folder: Path, rows: int) -> None:
    for row in range(rows):
        hertz = _TONES[_recording(row)["label"]] * (1 + row % 7 / 50)
        save_tone(folder / f"{row}.wav", hertz, 0.1 + row % 5 / 40)


AUDIO_MODELS = ("ast", "wav2vec2", "whisper")
_AUDIO_SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
}


def save_audio_model(folder: Path, kind: str = "ast") -> None:
    """A model of recordings with random weights, and its feature extractor."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, extractor = _AUDIO_BUILDERS[kind]()
        model.save_pretrained(folder)
    extractor.save_pretrained(folder)


def _build_ast() -> tuple[PreTrainedModel, Any]:
    config = ASTConfig(**_AUDIO_SIZES, max_length=24, num_mel_bins=32)
    return ASTForAudioClassification(config), ASTFeatureExtractor(max_length=24, num_mel_bins=32)


def _build_wav2vec2() -> tuple[PreTrainedModel, Any]:
    config = Wav2Vec2Config(
        **_AUDIO_SIZES,
        conv_dim=(16, 16),
        conv_stride=(10, 8),
        conv_kernel=(20, 16),
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4,
        feat_extract_norm="layer",
        classifier_proj_size=16,
    )
    return Wav2Vec2ForSequenceClassification(config), Wav2Vec2FeatureExtractor(return_attention_mask=True)


def _build_whisper() -> tuple[PreTrainedModel, Any]:
    config = WhisperConfig(
        d_model=32,
        encoder_layers=2,
        encoder_attention_heads=2,
        encoder_ffn_dim=64,
        decoder_layers=1,
        decoder_attention_heads=2,
        decoder_ffn_dim=64,
        max_source_positions=50,
        classifier_proj_size=16,
        vocab_size=60,
        pad_token_id=1,
        bos_token_id=2,
        eos_token_id=3,
        decoder_start_token_id=4,
    )
    return WhisperForAudioClassification(config), WhisperFeatureExtractor(chunk_length=1)


_AUDIO_BUILDERS: dict[str, Callable[[], tuple[PreTrainedModel, Any]]] = {
    "ast": _build_ast,
    "wav2vec2": _build_wav2vec2,
    "whisper": _build_whisper,
}

CASES: dict[str, tuple[str, Callable[[int], dict[str, Any]]]] = {
    "text-classification": ("text-classification", _one_class),
    "text-classification, pair": ("{text-classification: {pair: true}}", _pair),
    "text-classification, several": (
        "{text-classification: {problem_type: multi_label_classification}}",
        _several,
    ),
    "text-classification, number": ("{text-classification: {problem_type: regression}}", _number),
    "token-classification": ("token-classification", _tags),
    "text2text-generation": (
        "{text2text-generation: {max_new_tokens: 6}}",
        lambda row: {"text": _text(row), "target": f"{_pick(_COLOURS, row)} sits"},
    ),
    "feature-extraction": ("feature-extraction", lambda row: {"text": _text(row), "text_pair": f"n{row % 60} sits"}),
    "feature-extraction, numbers": (
        "{feature-extraction: {loss: cosine}}",
        lambda row: {"text": _text(row), "text_pair": _text(row + 1 + row % 5), "label": float(row % 5 == 2)},
    ),
    "text-generation": ("text-generation", lambda row: {"text": _text(row)}),
    "text-generation, messages": ("{text-generation: {chat_template: chatml}}", _conversation),
    "text-generation, instruction": (
        "{text-generation: {chat_template: chatml, loss_on: completion}}",
        lambda row: {"instruction": _text(row), "input": f"n{row % 60}", "output": f"{_pick(_COLOURS, row)} sits"},
    ),
    "image-classification": ("image-classification", lambda row: _image(row, several=False)),
    "image-classification, several": (
        "{image-classification: {problem_type: multi_label_classification}}",
        lambda row: _image(row, several=True),
    ),
    "audio-classification": ("{audio-classification: {max_seconds: 0.25}}", _recording),
    "preference": (
        "{preference: {beta: 0.5}}",
        lambda row: {
            "prompt": f"{_pick(_COLOURS, row)} {_pick(_ANIMALS, row // 3)} n{row % 60}",
            "chosen": "runs to rome",
            "rejected": "sits in oslo",
        },
    ),
    "fill-mask": ("{fill-mask: {mask_fraction: 0.3}}", lambda row: {"text": _text(row)}),
}
"""The task as a recipe writes it, and the row with a number."""


def _save_tokenizer(folder: Path, *signs: str, **templates: str) -> int:
    """A tokenizer of the known words and of signs that are never split; returns their number."""
    known = {word: number for number, word in enumerate((*_SPECIAL, *_WORDS, *_NUMBERS, *signs))}
    core = Tokenizer(WordPiece(known, unk_token="[UNK]"))
    core.pre_tokenizer = Whitespace()
    marks = [(name, known[name]) for name in ("[CLS]", "[SEP]")]
    core.post_processor = TemplateProcessing(**templates, special_tokens=marks)
    core.add_special_tokens(list(signs))
    names = {f"{name.strip('[]').lower()}_token": name for name in _SPECIAL}
    inputs = ["input_ids", "token_type_ids", "attention_mask"]
    PreTrainedTokenizerFast(
        tokenizer_object=core, model_input_names=inputs, eos_token="[SEP]", **names
    ).save_pretrained(folder)
    return len(known)


def save_encoder(folder: Path) -> None:
    """A BERT of random weights with the head of its pretraining, and its tokenizer."""
    count = _save_tokenizer(folder, single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=count,
            hidden_size=32,
            intermediate_size=64,
            num_attention_heads=2,
            num_hidden_layers=2,
            max_position_embeddings=32,
        )
        BertForMaskedLM(config).save_pretrained(folder)


def _save_encoder_decoder(folder: Path) -> None:
    """A T5 of random weights, and its tokenizer."""
    count = _save_tokenizer(folder, single="$A [SEP]", pair="$A [SEP] $B [SEP]")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = T5Config(
            vocab_size=count,
            d_model=32,
            d_kv=16,
            d_ff=64,
            num_layers=2,
            num_heads=2,
            pad_token_id=0,
            eos_token_id=3,
        )
        config.decoder_start_token_id = 0
        T5ForConditionalGeneration(config).save_pretrained(folder)


def _save_decoder(folder: Path, *signs: str) -> None:
    """A Llama of random weights, and its tokenizer."""
    count = _save_tokenizer(folder, *signs, single="[CLS] $A", pair="[CLS] $A $B")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=count,
            hidden_size=32,
            intermediate_size=64,
            num_attention_heads=2,
            num_hidden_layers=2,
            max_position_embeddings=32,
            pad_token_id=0,
            bos_token_id=2,
            eos_token_id=3,
        )
        LlamaForCausalLM(config).save_pretrained(folder)


def task_recipe(case: str, folder: Path, *overrides: str, rows: int = 180) -> Recipe:
    """The recipe of a case; model and data are written to ``folder``."""
    task, make = CASES[case]
    if case.startswith("image"):
        _save_images(folder, rows)
        (folder / "model").mkdir(exist_ok=True)
        save_image_model(LogisticRegression(2), folder / "model")
        overrides = ("train.image_size=28", *overrides)
    elif case.startswith("audio"):
        _save_recordings(folder, rows)
        save_audio_model(folder / "model")
        overrides = ("train.lr=0.005", *overrides)
    elif case.startswith("text2text"):
        _save_encoder_decoder(folder / "model")
    elif case.startswith("preference"):
        _save_decoder(folder / "model")
    elif case.startswith("text-generation"):
        _save_decoder(folder / "model", "<|im_start|>", "<|im_end|>", "user", "assistant")
    else:
        save_encoder(folder / "model")
    lines = [json.dumps(make(row)) for row in range(rows)]
    (folder / "data.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return resolve_recipe(parse_recipe(_RECIPE.format(task=task, folder=folder), "case", overrides))
