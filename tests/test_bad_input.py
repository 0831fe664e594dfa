"""Whatever a user gets wrong ends in one sentence on stderr and exit code 2, with nothing half-written."""

import errno
import os
import pickle
import sqlite3
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from flwr.app import Message

from fedtune import checkpoint
from fedtune import paths as homes
from fedtune.cli.main import main
from fedtune.tracking import Store, claim_run
from tests.federations import TRIVIAL, begin, execute, outcome, spoilt, tiny_bert, trivial
from tests.installed import install
from tests.task_cases import save_tone, task_recipe

__all__ = ["fedtune"]


def fedtune(monkeypatch: pytest.MonkeyPatch, *argv: str) -> int:
    """Run the real command line in this process; its exit code."""
    monkeypatch.setattr(sys, "argv", ["fedtune", *argv])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    path = tmp_path / "recipe.yaml"
    path.write_text(TRIVIAL, encoding="utf-8")
    return str(path)


class Refusal:
    """Runs a command that must be refused, and looks at what it said and left."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch, self._capfd = monkeypatch, capfd

    def __call__(self, *argv: str) -> str:
        """The one sentence."""
        self._capfd.readouterr()
        assert fedtune(self._monkeypatch, *argv) == 2
        said = self._capfd.readouterr()
        lines = [line for line in said.err.splitlines() if not line.startswith(("run ", "round "))]
        assert [line.startswith("fedtune: ") for line in lines] == [True], said.err
        assert said.out == ""
        return lines[0]


@pytest.fixture
def refused(home: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Refusal:
    return Refusal(monkeypatch, capfd)


def assert_no_trace(home: Path) -> None:
    """No run in the store, and no file but the store."""
    with Store.open() as store:
        assert store.runs() == []
    left = {path.name for path in home.rglob("*") if path.is_file()}
    assert {name for name in left if not name.startswith("store.sqlite")} == set()


TEXT = ("task=text-classification", 'model.source="path:{folder}/bert"')
VERDICTS = [f"the film {row % 20} was {'dull,no' if row % 2 else 'fine,yes'}" for row in range(40)]


@pytest.mark.parametrize(
    ("rows", "overrides", "sentence"),
    [
        (None, (), "there is no {folder}/a.csv; check data.source"),
        ([], (), "{folder}/a.csv holds no example; bring data"),
        (VERDICTS, ("devices=[{{count: 200}}]",), "use fewer devices, more data or another data.partition"),
        ([f"t {row},{row / 7}" for row in range(99)], (), "99 different real numbers as labels; cut them"),
        (VERDICTS, ('model.source="sample:logistic"',), "which does not do text-classification; choose another"),
        (VERDICTS, ("task=image-classification",), "has no column 'image', which data.columns.image names"),
        (VERDICTS, ("task=text-generation",), "BertLMHeadModel needs for text-generation"),
        (
            VERDICTS,
            ("train.techniques=lora", "train.techniques=[{{lora: {{targets: [nowhere]}}}}]"),
            "no linear layer of",
        ),
        (VERDICTS, ('model.source="path:{folder}"',), "is not a model folder: it has no config.json"),
    ],
)
def test_what_cannot_run_leaves_no_trace(
    home: Path,
    refused: Refusal,
    recipe: str,
    tmp_path: Path,
    rows: list[str] | None,
    overrides: tuple[str, ...],
    sentence: str,
) -> None:
    tiny_bert(tmp_path / "bert")
    if rows is not None:
        (tmp_path / "a.csv").write_text("\n".join(["text,label", *rows]) + "\n", encoding="utf-8")
    settings = [one.format(folder=tmp_path) for one in (*TEXT, 'data.source="csv:{folder}/a.csv"', *overrides)]
    said = refused("simulate", recipe, *(word for one in settings for word in ("--set", one)))
    assert sentence.format(folder=tmp_path) in said
    assert_no_trace(home)


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["simulate", "nowhere.yaml"], "cannot read the recipe nowhere.yaml: No such file or directory"),
        (["simulate", "{recipe}", "--set", "train.lrr=1"], "--set train.lrr=1: unknown key 'train.lrr'; did you mean"),
        (["simulate", "{recipe}", "--set", "train.lr"], "--set train.lr: write it as key.key=value"),
        (["simulate", "{recipe}", "--techniques", "lorra"], "there is no 'lorra'; did you mean 'lora'?"),
        (
            ["simulate", "{recipe}", "--techniques", "lora+full"],
            "lora cannot be combined with full: full trains the weights that lora freezes; drop one",
        ),
        (
            ["simulate", "{recipe}", "--techniques", "gradient-checkpointing"],
            "gradient-checkpointing trains nothing; add",
        ),
        (["simulate", "{recipe}", "--set", "merge=[meann]"], "there is no 'meann'; did you mean 'mean'?"),
        (["simulate", "{recipe}", "--store", "nonsense"], "is no SQLAlchemy URL"),
        (["simulate", "--resume", "latest"], "the store holds no run yet; start one with fedtune simulate RECIPE"),
        (["evaluate", "latest"], "the store holds no run yet"),
        (["export", "latest", "-o", "out"], "the store holds no run yet"),
        (["evaluate", "model.pt"], "model.pt is a pickle, which can run any code; name a run"),
        (["export", "pytorch_model.bin", "-o", "out"], "pytorch_model.bin is a pickle, which can run any code"),
        (["evaluate", "round-0001.safetensors"], "there is no checkpoint round-0001.safetensors"),
        (["methods", "lorra"], "there is no method 'lorra'; did you mean 'lora'?"),
        (["runs", "show", "x"], "the store holds no run yet"),
        (["data", "show", "nowhere.yaml"], "cannot read the recipe nowhere.yaml"),
    ],
)
def test_a_wrong_word_is_one_sentence_and_leaves_no_trace(
    home: Path, refused: Refusal, recipe: str, argv: list[str], sentence: str
) -> None:
    assert sentence in refused(*(word.format(recipe=recipe) for word in argv))
    assert_no_trace(home)


RAISES = "task={text-generation: {chat_template: \"{{ raise_exception('no turns') }}\"}}"
SPOILT = {
    "text-generation, messages": ("the chat template cannot write the conversation that begins with", (RAISES,)),
    "token-classification": ("row 1 has 2 words but 1 tags; give each word", ()),
    "image-classification": (".png cannot be read as an image", ()),
    "audio-classification": (".wav has 8000 samples per second, but the model reads 16000", ()),
}
"""What is said of the data that ``spoil_data`` writes, by the case of a task."""


def spoil_data(case: str, folder: Path) -> None:
    if case == "token-classification":
        (folder / "data.jsonl").write_text('{"words": ["a", "b"], "tags": ["O"]}\n' * 60, encoding="utf-8")
    for row in range(60):
        if case.startswith("image"):
            (folder / f"{row}.png").write_bytes(f"no image {row}".encode())
        elif case.startswith("audio"):
            save_tone(folder / f"{row}.wav", 500 + row, 0.1, rate=8000)


@pytest.mark.parametrize("case", SPOILT)
def test_data_that_a_task_cannot_read_are_one_sentence_and_leave_no_trace(
    home: Path, refused: Refusal, tmp_path: Path, case: str
) -> None:
    sentence, overrides = SPOILT[case]
    path = tmp_path / "case.yaml"
    path.write_text(task_recipe(case, tmp_path, *overrides, rows=60).model_dump_json(), encoding="utf-8")
    spoil_data(case, tmp_path)
    assert sentence in refused("simulate", str(path))
    assert_no_trace(home)


def test_a_package_that_cannot_be_imported_is_one_sentence_and_leaves_no_trace(
    home: Path, refused: Refusal, recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    points = {"fedtune.merging": {"shatter": "brittle_command:Shatter"}}
    broken = {"brittle_command": "raise ImportError('needs libfoo')"}
    monkeypatch.syspath_prepend(install(tmp_path / "brittle", "brittle", points, broken))
    said = refused("simulate", recipe, "--set", "merge=[shatter]")
    assert "shatter is published by the package brittle, which cannot be imported (ImportError: needs libfoo)" in said
    assert_no_trace(home)


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["simulat"], "No such command 'simulat'"),
        (["simulate"], "name either a RECIPE or a run with --resume"),
        (["simulate", "a.yaml", "--resume", "latest"], "name either a RECIPE or a run with --resume"),
        (["simulate", "--resume", "latest", "--set", "seed=1"], "a resumed run keeps its recipe"),
        (["simulate", "a.yaml", "--engine", "ray"], "'ray' is not one of 'in-process', 'flower'"),
        (["simulate", "a.yaml", "--workers", "0"], "0 is not in the range x>=1"),
        (["export", "latest"], "Missing option '-o'"),
    ],
)
def test_a_wrong_command_shows_its_usage(
    home: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], argv: list[str], sentence: str
) -> None:
    assert fedtune(monkeypatch, *argv) == 2
    said = capfd.readouterr()
    assert sentence in said.err
    assert "Usage: " in said.err
    assert "Traceback" not in said.err
    assert said.out == ""


def test_an_unknown_run_names_the_nearest(home: Path, refused: Refusal, tmp_path: Path) -> None:
    with Store.open() as store:
        begin(store, trivial(), "trivial-abc123")
    for argv in (["simulate", "--resume", "trivial-abd"], ["evaluate", "trivial-abd"], ["export", "trivial-abd", "-o"]):
        words = [*argv, str(tmp_path / "out")] if argv[-1] == "-o" else argv
        assert "there is no run 'trivial-abd'; the nearest are trivial-abc123" in refused(*words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("when", ["checkpoint", "contribution"])
def test_a_full_disk_fails_the_run_and_leaves_nothing_half_written(
    home: Path, refused: Refusal, recipe: str, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    real, beginning = os.fsync, {"checkpoint": ".round-0001", "contribution": ".client-000002"}[when]

    def fsync(descriptor: int) -> None:
        if Path(os.readlink(f"/proc/self/fd/{descriptor}")).name.startswith(beginning):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        said = refused("simulate", recipe)
    assert "No space left on device; free or choose another place" in said
    ended = outcome()
    assert (ended.run.status, len(ended.rounds)) == ("failed", 1)
    assert "No space left" in ended.run.reason
    left = {path.name for path in (homes.get_runs_folder() / ended.run.id).iterdir()}
    assert left == {"lock", "round-0000.safetensors"}
    assert fedtune(monkeypatch, "simulate", "--resume", "latest") == 0
    assert outcome().hashes == execute(trivial(), run="reference").hashes


def test_a_locked_store_is_one_sentence_and_leaves_no_trace(home: Path, refused: Refusal, recipe: str) -> None:
    with Store.open():
        pass
    other = sqlite3.connect(home / "store.sqlite", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    said = refused("simulate", recipe, "--store", f"sqlite:///{home}/store.sqlite?timeout=0.2")
    other.execute("ROLLBACK")
    other.close()
    assert "is locked by another process; wait until that one has ended, or stop it" in said
    assert_no_trace(home)


def test_a_read_only_store_is_one_sentence_and_leaves_no_trace(home: Path, refused: Refusal, recipe: str) -> None:
    with Store.open():
        pass
    said = refused("simulate", recipe, "--store", f"sqlite:///file:{home}/store.sqlite?mode=ro&uri=true")
    assert "is read-only; make the file and its folder writable or choose another with --store" in said
    assert_no_trace(home)


def test_a_completed_run_is_not_resumed(home: Path, refused: Refusal) -> None:
    before = execute(trivial())
    assert "run run-1 is completed; there is nothing to resume" in refused("simulate", "--resume", "latest")
    assert outcome() == before


def interrupted() -> Path:
    """A run that stopped after its first round; the folder of its files."""
    with pytest.raises(KeyboardInterrupt):
        execute(trivial(), spoilt(_stop, {0}, rounds={2}))
    return homes.get_runs_folder() / "run-1"


def _stop(message: Message, reply: Message) -> Message:
    raise KeyboardInterrupt


def test_a_checkpoint_that_changed_or_is_gone_is_not_resumed_from(home: Path, refused: Refusal) -> None:
    path = interrupted() / "round-0001.safetensors"
    kept = path.read_bytes()
    changed = checkpoint.read_checkpoint(path)
    next(iter(changed.values())).view(-1)[0] += 1
    path.write_bytes(safetensors.torch.save(changed))
    assert "has changed since it was written (its SHA-256 differs)" in refused("simulate", "--resume", "latest")
    path.write_bytes(kept[:-4])
    assert "is not a safetensors checkpoint" in refused("simulate", "--resume", "latest")
    path.write_bytes(pickle.dumps({"weight": torch.zeros(2)}))
    assert "is not a safetensors checkpoint" in refused("simulate", "--resume", "latest")
    assert "is not a safetensors checkpoint" in refused("evaluate", "latest")
    assert "is not a safetensors checkpoint" in refused("export", str(path), "-o", str(home / "out"))
    path.unlink()
    assert "round-0001.safetensors is missing; resume from another" in refused("simulate", "--resume", "latest")
    assert outcome().run.rounds_completed == 1
    assert not (home / "out").exists()


def test_a_copy_that_is_not_the_checkpoint_of_that_run_is_not_scored(
    home: Path, refused: Refusal, tmp_path: Path
) -> None:
    folder = interrupted()
    copy = tmp_path / "run-1" / "round-0001.safetensors"
    copy.parent.mkdir()
    copy.write_bytes((folder / "round-0000.safetensors").read_bytes())
    assert f"{copy} has changed since it was written" in refused("evaluate", str(copy))
    other = copy.rename(copy.parent / "model.safetensors")
    assert "is not a checkpoint of a run; those are named round-NNNN" in refused("evaluate", str(other))


def test_a_run_another_process_executes_is_not_resumed(home: Path, refused: Refusal) -> None:
    interrupted()
    with claim_run("run-1"):
        said = refused("simulate", "--resume", "latest")
    assert "run run-1 is being executed by another process; wait for it or stop it" in said
    assert outcome().run.rounds_completed == 1


def test_a_round_that_is_not_there_is_named(home: Path, refused: Refusal) -> None:
    interrupted()
    assert "run run-1 has not recorded a checkpoint of round 7; it has the checkpoints of rounds 0 and 1" in refused(
        "evaluate", "latest", "--round", "7"
    )


def test_an_existing_folder_is_not_exported_into(home: Path, refused: Refusal, tmp_path: Path) -> None:
    interrupted()
    (tmp_path / "out").mkdir()
    said = refused("export", "latest", "-o", str(tmp_path / "out"))
    assert "out exists already; choose another folder with -o" in said
    assert not list((tmp_path / "out").iterdir())


def test_a_federation_without_one_usable_contribution_ends_with_code_2(
    home: Path, refused: Refusal, recipe: str
) -> None:
    said = refused("simulate", recipe, "--set", "federation.max_update_norm=1e-12")
    assert "no round got enough usable client updates; see the reasons in: fedtune runs show trivial-" in said
    assert outcome().run.status == "failed"
