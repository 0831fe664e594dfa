"""Wav files of every kind become samples or are refused by name, and models read what transformers makes of them."""

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.io import wavfile
from scipy.signal import resample_poly
from transformers import AutoFeatureExtractor, AutoModelForAudioClassification

from fedtune import tasks
from fedtune.data.audio_samples import LANGUAGES, spoken_prompts
from fedtune.data.decode import Unreadable
from fedtune.data.table import Classes
from fedtune.data.wave_files import decode_wave
from fedtune.errors import DataError, FedtuneWarning, ModelError, RecipeError, SourceError
from fedtune.export import export_model
from fedtune.recipe.schema import Recipe
from fedtune.training import clear_run_context, get_run_context, set_model_state
from tests.federations import execute
from tests.task_cases import AUDIO_MODELS, save_audio_model, save_tone, task_recipe
from tests.test_export import state

RATE = 8000
WAVE = 0.5 * np.sin(2 * np.pi * 440 * np.arange(800) / RATE)
SIXTEEN = np.round(WAVE * 32767).astype("<i2").tobytes()
SUBFORMAT = b"\x00\x00\x00\x00\x10\x00\x80\x00\x00\xaa\x00\x38\x9b\x71"


def a_format(tag: int, bits: int, *, channels: int = 1, rate: int = RATE, extension: bytes = b"") -> bytes:
    frame = channels * bits // 8
    return struct.pack("<HHIIHH", tag, channels, rate, rate * frame, frame, bits) + extension


def extensible(subformat: int, bits: int) -> bytes:
    return a_format(0xFFFE, bits, extension=struct.pack("<HHIH", 22, bits, 4, subformat) + SUBFORMAT)


def a_file(form: bytes, content: bytes, *, before: bytes = b"", declared: int | None = None) -> bytes:
    length = len(content) if declared is None else declared
    body = b"WAVE" + before + b"fmt " + struct.pack("<I", len(form)) + form + b"data" + struct.pack("<I", length)
    return b"RIFF" + struct.pack("<I", len(body) + len(content)) + body + content


def record(content: bytes) -> dict[str, Any]:
    return {"bytes": content, "path": None}


TWENTY_FOUR = b"".join(int(value).to_bytes(3, "little", signed=True) for value in np.round(WAVE * (2**23 - 1)))
FLOATS = WAVE.astype("<f4").tobytes()
READABLE: dict[str, tuple[bytes, float]] = {
    "8 bits, unsigned": (a_file(a_format(1, 8), np.round(WAVE * 127 + 128).astype(np.uint8).tobytes()), 2**-7),
    "16 bits": (a_file(a_format(1, 16), SIXTEEN), 2**-15),
    "24 bits": (a_file(a_format(1, 24), TWENTY_FOUR), 2**-22),
    "32 bits": (a_file(a_format(1, 32), np.round(WAVE * (2**31 - 1)).astype("<i4").tobytes()), 2**-22),
    "real numbers": (a_file(a_format(3, 32), FLOATS), 2**-22),
    "double precision": (a_file(a_format(3, 64), WAVE.astype("<f8").tobytes()), 2**-22),
    "extensible, 16 bits": (a_file(extensible(1, 16), SIXTEEN), 2**-15),
    "extensible, 24 bits": (a_file(extensible(1, 24), TWENTY_FOUR), 2**-22),
    "extensible, real numbers": (a_file(extensible(3, 32), FLOATS), 2**-22),
    "a list before the data": (a_file(a_format(1, 16), SIXTEEN, before=b"LIST\x04\x00\x00\x00INFO"), 2**-15),
    "a stream of unknown length": (
        b"RIFF\xff\xff\xff\xff" + a_file(a_format(1, 16), SIXTEEN, declared=0xFFFFFFFF)[8:],
        2**-15,
    ),
    "a chunk of odd length": (a_file(a_format(1, 16), SIXTEEN, before=b"junk\x03\x00\x00\x00abc\x00"), 2**-15),
}


@pytest.mark.parametrize("kind", READABLE)
def test_samples_are_those_that_were_written(kind: str) -> None:
    content, step = READABLE[kind]
    found, rate = decode_wave(record(content), "x")
    assert found.dtype == np.float32
    assert (rate, len(found)) == (RATE, 800)
    assert np.abs(found - WAVE).max() <= step


def test_channels_are_averaged() -> None:
    pair = np.stack([np.full(800, 0.5), np.full(800, -0.25)], 1)
    content = a_file(a_format(3, 32, channels=2), pair.astype("<f4").tobytes())
    assert (decode_wave(record(content), "x")[0] == 0.125).all()


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (a_file(a_format(1, 16), b""), "it has 0 samples, less than 25 ms"),
        (a_file(a_format(1, 16), SIXTEEN[:100]), "it has 50 samples, less than 25 ms"),
        (a_file(a_format(1, 16), SIXTEEN)[:900], "it ends before the length that its header declares"),
        (a_file(a_format(7, 8), SIXTEEN), "MULAW"),
        (a_file(a_format(1, 16, rate=0), SIXTEEN), "declares 0 samples per second"),
        (a_file(a_format(3, 32), (WAVE * 30000).astype("<f4").tobytes()), "not between -1 and 1"),
        (a_file(a_format(3, 32), (WAVE * np.nan).astype("<f4").tobytes()), "not between -1 and 1"),
        (b"RIFF", "header is damaged"),
        (b"fLaC\x00\x00", "it has no RIFF header"),
        (b"", "it has no RIFF header"),
    ],
)
def test_a_damaged_recording_is_refused_by_name(content: bytes, sentence: str) -> None:
    with pytest.raises(Unreadable, match=rf"^talk\.wav cannot be read as a wav file \(.*{sentence}.*skip_unreadable$"):
        decode_wave(record(content), "talk.wav")


def prepared(folder: Path, kind: str = "ast", *overrides: str) -> Recipe:
    recipe = task_recipe("audio-classification", folder, *overrides, rows=60)
    save_audio_model(folder / "model", kind)
    clear_run_context()
    return recipe


@pytest.mark.filterwarnings("ignore:lora puts no pair beside:UserWarning")
@pytest.mark.parametrize("kind", AUDIO_MODELS)
@pytest.mark.parametrize("technique", ["full", "lora", "bias", "head-only"])
def test_each_model_trains_and_its_export_gives_the_same_logits(
    kind: str, technique: str, home: Path, tmp_path: Path
) -> None:
    """The oracle reads the wav files and makes the inputs by transformers alone, from the exported folder."""
    settings = ("federation.rounds=1", "train.local_steps=2", f"train.techniques={technique}")
    recipe = prepared(tmp_path, kind, *settings)
    tensors = state(execute(recipe))
    context = get_run_context(recipe.model_dump_json())
    set_model_state(context.model, tensors)
    batch = context.test.make_batch(range(4))
    with torch.no_grad():
        expected = context.model.eval()(**batch).logits
    export_model(recipe, tensors, tmp_path / "out", "model", "card\n")
    extractor = AutoFeatureExtractor.from_pretrained(tmp_path / "out")
    paths = [one["path"] for one in context.corpus.test.select(range(4)).records("audio")]
    waves = [wavfile.read(path)[1].astype(np.float32) / 32768 for path in paths]
    limits = {"max_length": 4000, "truncation": True} if kind == "wav2vec2" else {}
    inputs = extractor(waves, sampling_rate=16000, padding="max_length", return_tensors="pt", **limits)
    model = AutoModelForAudioClassification.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        found = model(**inputs).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert tuple(model.config.id2label.values()) == context.corpus.label_names == ("high", "low")


def test_a_run_has_the_same_bits_again(home: Path, tmp_path: Path) -> None:
    """wav2vec2 masks features by numbers of its own in training, unless that is switched off."""
    recipe = prepared(tmp_path, "wav2vec2", "federation.rounds=1", "train.local_steps=2")
    np.random.seed(1)
    first = state(execute(recipe, run="first"))
    np.random.seed(2)
    second = state(execute(recipe, run="second"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_another_rate_is_refused_or_resampled(home: Path, tmp_path: Path) -> None:
    recipe = prepared(tmp_path, "wav2vec2")
    for row in range(60):
        save_tone(tmp_path / f"{row}.wav", 500 + row, 0.2, rate=RATE)
    with pytest.raises(DataError, match=r"\.wav has 8000 samples per second, but the model reads 16000; set task: .*"):
        _ = get_run_context(recipe.model_dump_json()).train
    clear_run_context()
    task = recipe.task.model_copy(update={"settings": {**recipe.task.settings, "resample": True}})
    context = get_run_context(recipe.model_copy(update={"task": task}).model_dump_json())
    found = context.train.make_batch([0])
    wave = wavfile.read(next(iter(context.corpus.train.records("audio")))["path"])[1] / 32768
    twice = resample_poly(wave, 2, 1)
    normal = (twice - twice.mean()) / np.sqrt(twice.var() + 1e-7)
    length = len(twice)
    np.testing.assert_allclose(found["input_values"][0, :length].numpy(), normal, atol=1e-3)
    assert not found["input_values"][0, length:].any()
    assert int(found["attention_mask"].sum()) == length == 3200


def test_what_is_longer_is_cut_with_a_warning(home: Path, tmp_path: Path) -> None:
    recipe = prepared(tmp_path, "wav2vec2", "task={audio-classification: {max_seconds: 0.15}}")
    with pytest.warns(FedtuneWarning, match=r"recordings are longer than 0.15 seconds, and what follows is cut"):
        batch = get_run_context(recipe.model_dump_json()).train.make_batch([0, 1])
    assert batch["input_values"].shape == (2, 2400)


def test_a_spectrogram_model_cuts_at_its_own_length(home: Path, tmp_path: Path) -> None:
    recipe = prepared(tmp_path, "whisper", "task={audio-classification: {max_seconds: 9}}")
    assert tasks.load_reader(recipe).max_seconds == 1
    assert get_run_context(recipe.model_dump_json()).train.make_batch([0])["input_features"].shape == (1, 80, 100)


def fill(folder: Path, write: Callable[[Path, int], None] = lambda file, row: save_tone(file, 500, 0.1)) -> None:
    for row in range(60):
        place = folder / ("low", "high")[row % 2]
        place.mkdir(parents=True, exist_ok=True)
        write(place / f"{row}.wav", row)


def test_a_folder_of_wav_files_has_a_folder_for_each_class(home: Path, tmp_path: Path) -> None:
    fill(tmp_path / "sounds", lambda file, row: save_tone(file, 500, 0.1 + row / 1000))
    recipe = prepared(tmp_path, "ast", f"data.source=folder:{tmp_path}/sounds")
    corpus = tasks.load_data(recipe)
    assert corpus.label_names == ("high", "low")
    for one, label in zip(corpus.train.records("audio"), corpus.train["label"], strict=True):
        assert Path(one["path"]).parent.name == corpus.label_names[label]


def test_a_csv_file_lists_recordings_beside_it(home: Path, tmp_path: Path) -> None:
    recipe = prepared(tmp_path)
    rows = "".join(f"{row}.wav,{'ab'[row % 2]}\n" for row in range(60))
    (tmp_path / "list.csv").write_text("audio,label\n" + rows, encoding="utf-8")
    data = recipe.data.model_copy(update={"source": f"csv:{tmp_path}/list.csv"})
    corpus = tasks.load_data(recipe.model_copy(update={"data": data}))
    assert len(corpus.train) + len(corpus.validation) + len(corpus.test) == 60
    assert all(Path(one["path"]).is_file() for one in corpus.test.records("audio"))


def test_unreadable_recordings_are_left_out_where_the_recipe_says_so(home: Path, tmp_path: Path) -> None:
    recipe = prepared(tmp_path)
    (tmp_path / "7.wav").write_bytes(b"oops")
    (tmp_path / "8.wav").unlink()
    with pytest.raises(DataError, match=r"there is no audio .*8\.wav; check data\.columns\.audio"):
        tasks.load_data(recipe)
    skipping = recipe.model_copy(update={"data": recipe.data.model_copy(update={"skip_unreadable": True})})
    corpus = tasks.load_data(skipping)
    assert len(corpus.train) + len(corpus.validation) + len(corpus.test) == 58
    assert any("2 recordings cannot be read and are left out" in note for note in corpus.notes)


def test_models_that_do_not_read_audio_are_refused(home: Path, tmp_path: Path) -> None:
    recipe = prepared(tmp_path)
    model = recipe.model.model_copy(update={"source": "sample:logistic"})
    with pytest.raises(ModelError, match="sample:logistic is a model of images, which does not read audio"):
        tasks.load_reader(recipe.model_copy(update={"model": model}))


@pytest.mark.parametrize(
    ("technique", "sentence"),
    [
        ("mobiletl", "has no inverted residual blocks"),
        ("batch-norm", "has no batch norms to train"),
    ],
)
def test_techniques_that_do_not_apply_are_refused(technique: str, sentence: str, home: Path, tmp_path: Path) -> None:
    recipe = prepared(tmp_path, "wav2vec2", f"train.techniques={technique}")
    with pytest.raises((ModelError, RecipeError), match=sentence):
        get_run_context(recipe.model_dump_json())


def test_images_are_not_augmented_in_recordings(home: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="audio-classification has no images to change"):
        prepared(tmp_path, "ast", "train.augmentation={horizontal_flip: true}")


def test_spoken_prompts_name_the_package_that_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SourceError, match="needs the Debian package asterisk-core-sounds-en-wav; install it: apt-get"):
        spoken_prompts()


def test_spoken_prompts_lack_silence_and_tones_that_languages_share(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A stand-in for dpkg lists recordings below a folder for each language."""
    for number, code in enumerate(LANGUAGES):
        voice = tmp_path / "sounds" / f"{code}_voice"
        for name in ("digits", "silence"):
            (voice / name).mkdir(parents=True)
        save_tone(voice / "hello.wav", 500 + number, 0.3, rate=RATE)
        save_tone(voice / "digits" / "1.wav", 700 + number, 0.3, rate=RATE)
        save_tone(voice / "beep.wav", 1000, 0.3, rate=RATE)
        save_tone(voice / "silence" / "1.wav", number, 0.3, rate=RATE)
        save_tone(voice / "click.wav", 100 + number, 0.05, rate=RATE)
    dpkg = tmp_path / "dpkg"
    dpkg.write_text(f"#!/bin/sh\ncode=${{2#asterisk-core-sounds-}}\nfind {tmp_path}/sounds/${{code%-wav}}_voice\n")
    dpkg.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    found = spoken_prompts()["train"]
    names = [
        LANGUAGES[Path(one["path"]).relative_to(tmp_path / "sounds").parts[0][:2]] for one in found.records("audio")
    ]
    kind = found.kinds["label"]
    assert isinstance(kind, Classes)
    assert [kind.names[number] for number in found["label"]] == names
    assert sorted(found["group"]) == ["digits/1"] * 5 + ["hello"] * 5
