"""A merge that was killed goes on after what it finished, and ends with the bytes of one that was left alone."""

import hashlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fedtune.errors import StoreError
from fedtune.offline_merge import MergeConfig, prepare_merge, write_merged_model
from fedtune.offline_merge.output_folder import OutputFolder, open_output_folder
from fedtune.offline_merge.safetensors_layout import TensorInfo
from tests.fusion_models import base_and_tuned

KILLED = """
import os, signal, sys
from pathlib import Path
import fedtune.offline_merge.output_folder as output
from fedtune.offline_merge import parse_merge_config, prepare_merge, write_merged_model

output._SAFE_EVERY = 1
where, count = sys.argv[1], int(sys.argv[2])
real = getattr(output.OutputFolder, where) if where != "rename" else Path.replace
calls = 0

def dying(self, *arguments):
    global calls
    calls += 1
    if where != "rename" and calls == count:
        if where == "write_rows":
            real(self, arguments[0], arguments[1], arguments[2][:1])
        os.kill(os.getpid(), signal.SIGKILL)
    if where == "rename" and self.name.endswith(".merging"):
        os.kill(os.getpid(), signal.SIGKILL)
    return real(self, *arguments)

setattr(output.OutputFolder if where != "rename" else Path, where if where != "rename" else "replace", dying)
config = parse_merge_config(Path("merge.yaml").read_text(), "merge.yaml")
write_merged_model(prepare_merge(config), Path("out"), "a card", shard_size=6000)
"""
YAML = "merge_method: dare_ties\nbase_model: base\nmodels: [tuned1, tuned2]\nparameters: {density: 0.5}\n"


def digests(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}


def a_merge(method: str = "dare_ties") -> MergeConfig:
    return MergeConfig.model_validate(
        {"merge_method": method, "base_model": "base", "models": ["tuned1", "tuned2"], "parameters": {"density": 0.5}}
    )


def run(out: str = "out", method: str = "dare_ties") -> None:
    write_merged_model(prepare_merge(a_merge(method)), Path(out), "a card", shard_size=6000)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    base_and_tuned(tmp_path, 2, torch.bfloat16)
    (tmp_path / "merge.yaml").write_text(YAML)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def kill(where: str, count: int) -> None:
    root = Path(__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run(
        [sys.executable, "-c", KILLED, where, str(count)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == -signal.SIGKILL, done.stderr


@pytest.mark.parametrize(
    ("where", "count", "written"),
    [("write_rows", 9, 13), ("mark_finished", 9, 13), ("flush", 15, 7), ("rename", 1, 21)],
)
def test_a_killed_merge_goes_on_and_ends_with_the_same_bytes(
    where: str, count: int, written: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    run("alone")
    kill(where, count)
    assert not Path("out").exists()
    names, real = list[str](), OutputFolder.mark_finished

    def finish(self: OutputFolder, name: str) -> None:
        names.append(name)
        real(self, name)

    monkeypatch.setattr(OutputFolder, "mark_finished", finish)
    run()
    assert digests(Path("out")) == digests(Path("alone"))
    assert len(names) == written
    assert not list(Path().glob(".out*"))


def test_another_configuration_does_not_go_on_with_what_is_there() -> None:
    kill("write_rows", 9)
    run(method="ties")
    run("alone", method="ties")
    assert digests(Path("out")) == digests(Path("alone"))


def test_other_inputs_do_not_go_on_with_what_is_there() -> None:
    kill("write_rows", 9)
    from safetensors.torch import load_file, save_file

    file = Path("tuned1/model.safetensors")
    save_file({name: tensor * 2 for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    run()
    run("alone")
    assert digests(Path("out")) == digests(Path("alone"))


FORMS = {"model.safetensors": {"a": TensorInfo((2, 3), torch.float32), "b": TensorInfo((3,), torch.float32)}}


def interrupted(*, flushed: bool) -> None:
    """A merge that is stopped after its first tensor."""
    with open_output_folder(Path("new"), FORMS, "key") as made:
        made.write_rows("a", 0, torch.ones(2, 3))
        made.mark_finished("a")
        if flushed:
            made.flush()
        raise KeyboardInterrupt


def test_a_half_written_line_of_the_journal_does_not_count() -> None:
    with pytest.raises(KeyboardInterrupt):
        interrupted(flushed=True)
    journal = Path(".new.merging/journal")
    journal.write_text(journal.read_text() + "b")
    with open_output_folder(Path("new"), FORMS, "key") as made:
        assert made.finished_tensors == {"a"}


def test_what_was_not_forced_to_disk_does_not_count() -> None:
    with pytest.raises(KeyboardInterrupt):
        interrupted(flushed=False)
    with open_output_folder(Path("new"), FORMS, "key") as made:
        assert made.finished_tensors == set()


def test_only_one_process_fills_a_folder() -> None:
    with (
        pytest.raises(StoreError, match="another process is writing new; wait for it or choose another folder"),
        open_output_folder(Path("new"), FORMS, "key"),
        open_output_folder(Path("new"), FORMS, "key"),
    ):
        pass


def test_files_have_their_size_from_the_start() -> None:
    with open_output_folder(Path("new"), FORMS, "key") as made:
        size = (made.folder / "model.safetensors").stat().st_size
    assert (Path("new") / "model.safetensors").stat().st_size == size
