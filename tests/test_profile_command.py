"""``fedtune profile``: what it prints, draws and refuses. Cases are measured in this process, which is quicker."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from PIL import Image

from fedtune.cli.main import cli
from fedtune.errors import FedtuneError
from fedtune.profiling import BASELINES, FailedProfile, ProfileCase, ProfileResult, StepProfile
from fedtune.profiling.isolated_process import try_profile
from fedtune.profiling.profile_chart import draw_profile
from tests.federations import WORDS, words
from tests.profile_examples import tiny_bert
from tests.test_bad_input import fedtune

KEYS = {
    "technique",
    "kept_bytes",
    "peak_bytes",
    "rss_bytes",
    "loaded_bytes",
    "seconds",
    "trainable",
    "wire_bytes",
    "down_bytes",
    "device_type",
    "accelerator_bytes",
    "accelerator_reserved_bytes",
    "anonymous_bytes",
    "file_bytes",
    "loaded_anonymous_bytes",
    "allocator",
}
A_ROW = StepProfile(
    "full", 576_000_000, 585_000_000, 1_640_000_000, 500_000_000, 4.38, 22_700_000, 90_900_000, 90_900_000
)


@pytest.fixture(autouse=True)
def here(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("fedtune.profiling.profile_in_subprocess", try_profile)


@pytest.fixture
def model(tmp_path: Path) -> list[str]:
    folder = tiny_bert(tmp_path / "bert")
    size = ["--batch-size", "2", "--max-length", "8"]
    return ["--model", f"path:{folder}", "--task", "text-classification", *size]


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[ProfileCase]:
    """Nothing is measured; the cases that would have been are collected."""
    asked: list[ProfileCase] = []

    def pretend(case: ProfileCase) -> ProfileResult:
        asked.append(case)
        return FailedProfile(case.technique, "it was only pretended")

    monkeypatch.setattr("fedtune.profiling.profile_in_subprocess", pretend)
    return asked


def call(*arguments: str) -> Result:
    result = CliRunner().invoke(cli, ["profile", *arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def test_json_is_a_list_of_objects_and_progress_goes_elsewhere(model: list[str], home: Path) -> None:
    result = call(*model, "--json", "--check-gradients")
    rows: list[dict[str, Any]] = json.loads(result.stdout)
    assert [row["technique"] for row in rows] == list(BASELINES)
    ran = [row for row in rows if "error" not in row]
    assert result.exit_code == 0
    assert {row["technique"] for row in ran} >= {"full", "lora", "lora+gradient-checkpointing"}
    assert all(row.keys() == KEYS | {"gradient_error"} for row in ran)
    assert all(row["gradient_error"] == 0 for row in ran)
    assert not (home / "pictures").exists()
    progress = [line for line in result.stderr.splitlines() if line]
    assert len(progress) == len(rows)
    assert all(line.endswith(" left") for line in progress)


def test_a_case_that_cannot_run_is_a_row_that_says_why(model: list[str]) -> None:
    images = ["image-classification" if word == "text-classification" else word for word in model]
    result = call(*images, "--techniques", "bias", "--json")
    rows = json.loads(result.stdout)
    assert result.exit_code == 2  # nothing ran
    assert all("which does not do image-classification; choose another" in row["error"] for row in rows)
    assert all(row["kept_bytes"] is None for row in rows)


def test_the_table_tells_anonymous_memory_from_that_of_files(model: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    row = replace(
        A_ROW,
        anonymous_bytes=1_230_000_000,
        file_bytes=410_000_000,
        loaded_anonymous_bytes=230_000_000,
        allocator="glibc 2.36, blocks from 64 KiB mapped",
    )
    monkeypatch.setattr("fedtune.profiling.profile_in_subprocess", lambda case: row)
    lines = call(*model).stdout.splitlines()
    assert max(len(line) for line in lines[:6]) <= 80
    cells = ["full", "576MB", "585MB", "1.23GB", "410MB", "1GB", "1.00x", "22.7M", "90.9MB", "90.9MB"]
    assert cells in [line.split() for line in lines]
    assert "allocator: glibc 2.36, blocks from 64 KiB mapped" in lines


def test_the_table_fits_80_columns_and_a_failure_does_not_spoil_it(
    model: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def pretend(case: ProfileCase) -> ProfileResult:
        if case.technique != "full":
            return FailedProfile(case.technique, "the reason")
        return A_ROW

    monkeypatch.setattr("fedtune.profiling.profile_in_subprocess", pretend)
    result = call(*model, "-o", str(tmp_path / "here.png"))
    lines = result.stdout.splitlines()
    assert result.exit_code == 0
    assert max(len(line) for line in lines[:6]) <= 80
    assert "random inputs from seed 0" in " ".join(lines[:3])
    cells = ["full", "576MB", "585MB", "1.64GB", "1.14GB", "1.00x", "22.7M", "90.9MB", "90.9MB"]
    assert cells in [line.split() for line in lines]
    assert ["qlora", *["-"] * 8] in [line.split() for line in lines]
    assert "qlora did not run: the reason" in lines
    assert f"plot: {tmp_path / 'here.png'}" in lines
    assert "\x1b" not in result.output
    with Image.open(tmp_path / "here.png") as drawn:
        assert drawn.format == "PNG"


def test_a_recipe_brings_its_techniques_its_batch_and_its_labels(tmp_path: Path, measured: list[ProfileCase]) -> None:
    words(tmp_path)
    (tmp_path / "words.yaml").write_text(WORDS.format(folder=tmp_path), encoding="utf-8")
    assert call("words.yaml", "--set", "train.techniques=[lora: {rank: 2}]").exit_code == 2
    assert [case.technique for case in measured] == [*BASELINES, "lora(rank=2)"]
    assert all(case.labels == ("bad", "good") for case in measured)
    assert all(case.batch == measured[0].batch is not None for case in measured)
    assert (tmp_path / "home" / "pictures" / "words-profile.png").is_file()


@pytest.mark.parametrize(
    ("text", "labels"),
    [
        ("bias", ["bias"]),
        ("bias,full+gradient-checkpointing", ["bias", "full+gradient-checkpointing"]),
        (
            "[lora: {rank: 4}, gradient-checkpointing], lora: {rank: 2}",
            ["lora(rank=4)+gradient-checkpointing", "lora(rank=2)"],
        ),
        ("full, qlora", []),
    ],
)
def test_techniques_are_written_as_in_a_recipe(
    model: list[str], measured: list[ProfileCase], text: str, labels: list[str]
) -> None:
    call(*model, "--techniques", text)
    assert [case.technique for case in measured] == [*BASELINES, *labels]


def test_all_stands_for_every_published_technique(model: list[str], measured: list[ProfileCase]) -> None:
    call(*model, "--techniques", "all")
    assert {"bias", "head-only", *BASELINES} <= {case.technique for case in measured}


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--techniques", "lorra"], "there is no 'lorra'; did you mean 'lora'?"),
        (["--techniques", "full+lora"], "full cannot be combined with lora"),
        (["--techniques", "lora: {rnk: 4}"], "unknown key 'rnk'; did you mean 'rank'?"),
        (["--techniques", "[lora"], "--techniques [lora: write it as a,b,c+d"),
        (["--techniques", "3"], "--techniques 3:"),
        (
            ["--batch-size", "0"],
            "--set train.batch_size=0: train.batch_size is 0, but must be greater than or equal to 1",
        ),
        (["--max-length", "many"], "--set train.max_length=many: train.max_length is 'many'"),
        (["--model", "sample:minilmm"], "there is no sample model 'minilmm'; did you mean 'minilm'?"),
        (["-o", "picture.jpg"], "cannot draw into picture.jpg; the name must end in .png or .svg"),
        (["--task", "sequence"], "'sequence' is not one of '"),
        (["recipe.yaml"], "name either a RECIPE or --model with --task"),
    ],
)
def test_a_mistake_ends_in_one_sentence_before_anything_is_measured(
    model: list[str],
    measured: list[ProfileCase],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    argv: list[str],
    sentence: str,
) -> None:
    assert fedtune(monkeypatch, "profile", *model, *argv) == 2
    said = capsys.readouterr()
    assert sentence in said.err
    assert said.out == ""
    assert measured == []


@pytest.mark.parametrize("kept", [1_000_000, 3])
def test_a_picture_is_drawn_whatever_the_scale(tmp_path: Path, kept: int) -> None:
    small = StepProfile("small", kept, 2 * kept, 9, 9, 1.0, 1, 1, 1)
    draw_profile([A_ROW, small, FailedProfile("other", "no")], "a title", tmp_path / "a" / "scale.svg")
    text = (tmp_path / "a" / "scale.svg").read_text(encoding="utf-8")
    assert ("logarithmic scale" in text) == (kept == 3)
    with pytest.raises(FedtuneError, match=r"must end in \.png or \.svg"):
        draw_profile([A_ROW], "a title", tmp_path / "scale")
