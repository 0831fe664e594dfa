"""Whole runs with stored examples: kills inside the writes, budgets, encryption, and files that are not ours."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from fedtune import checkpoint, paths
from fedtune.cli.device import device
from fedtune.device.device_home import DeviceHome
from fedtune.device.local_round import run_local_round
from fedtune.device.memory_key import get_key_path, use_memory_key
from fedtune.device.own_memory import MemoryFolder, delete_unneeded_memory
from fedtune.device.problems import problem_of
from fedtune.errors import DeviceError, MemoryBudgetError, StoreError
from fedtune.training import get_run_context
from fedtune.wire.client_update import TrainRequest
from fedtune.wire.protocol_codes import parse_problem
from tests.federations import TRIVIAL, Ended, execute, outcome
from tests.kills import MEMORY_PLANTS, start
from tests.replay_rounds import make_recipe, read_files, train_client
from tests.streams import CLASSES, resolve_stream

pytestmark = pytest.mark.usefixtures("home")

STREAM: dict[str, Any] = {**CLASSES, "memory": [{"replay": {"share": "20%"}}]}


def find_folder(run: str = "run-1", client: int = 2, home: Path | None = None) -> Path:
    return (home / "runs" if home else paths.get_runs_folder()) / run / "own" / f"client-{client:06d}"


def read_border(ended: Ended, number: int = -1) -> dict[str, float]:
    metrics = ended.rounds[number].metrics
    return {one.domain: one.value for one in metrics if (one.split, one.name) == ("border", "accuracy")}


def hash_files(folder: Path, run: str, key: bytes | None = None) -> dict[int, str]:
    """The digests of the tensors of all files: ciphertexts have random nonces."""
    return {visit: checkpoint.hash_tensors(one) for visit, one in read_files(folder, run, key).items()}


@pytest.mark.parametrize("method", ["replay", "der"])
def test_stored_examples_keep_earlier_tasks(method: str) -> None:
    changes = {"local_steps": None, "local_epochs": 2, "lr": 0.1}
    train = {**yaml.safe_load(TRIVIAL)["train"], **changes}
    naive = read_border(execute(resolve_stream(CLASSES, train=train), run="naive"))
    kept = read_border(execute(resolve_stream({**CLASSES, "memory": [{method: {"share": "20%"}}]}, train=train)))
    assert kept["mean"] > naive["mean"] + 0.25
    assert kept["0+1"] > naive["0+1"] + 0.3


@pytest.mark.parametrize("encrypted", [False, True])
@pytest.mark.parametrize("plant", MEMORY_PLANTS)
def test_a_run_killed_inside_a_memory_write_ends_with_the_same_bits(
    tmp_path: Path, plant: str, encrypted: bool
) -> None:
    stream = {**STREAM, "own_memory": {"encrypted": encrypted, "budget": "100KB"}}
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump({**yaml.safe_load(TRIVIAL), "federation": {}, "stream": stream}), encoding="utf-8")
    found = []
    for home, chosen in ((tmp_path / "alone", ""), (tmp_path / "killed", plant)):
        process = start(home, "simulate", str(file), "--json", "--workers", "1", plant=chosen)
        process.join()
        if chosen:
            assert process.exitcode == -9
            process = start(home, "simulate", "--resume", "latest", "--json", "--workers", "1")
            process.join()
        assert process.exitcode == 0, (home / "printed").read_text()
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("FEDTUNE_HOME", str(home))
            ended = outcome()
        folders = [find_folder(ended.run.id, client, home) for client in range(4)]
        keys = [get_key_path(folder).read_bytes() if encrypted else None for folder in folders]
        files = [hash_files(folder, ended.run.id, key) for folder, key in zip(folders, keys, strict=True)]
        assert not [path for folder in folders for path in folder.glob(".memory-*")]
        found.append(([one.metrics for one in ended.rounds], ended.hashes, files))
    assert found[0] == found[1]
    assert [sorted(one) for one in found[0][2]] == [[3, 4]] * 4


def test_encryption_changes_no_bit_of_a_run_and_leaves_nothing_in_clear() -> None:
    plain = execute(resolve_stream(STREAM), run="plain")
    sealed = execute(resolve_stream({**STREAM, "own_memory": {"encrypted": True}}), run="sealed")
    assert plain.hashes == sealed.hashes
    key = get_key_path(find_folder("sealed")).read_bytes()
    assert hash_files(find_folder("plain"), "plain") == hash_files(find_folder("sealed"), "sealed", key)
    content = read_files(find_folder("plain"), "plain")[4]["replay/content"].numpy().tobytes()[:64]
    assert content in (find_folder("plain") / "memory-0004.safetensors").read_bytes()
    assert content not in (find_folder("sealed") / "memory-0004.safetensors").read_bytes()


def test_a_run_of_several_processes_has_the_same_bits_and_files(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump({**yaml.safe_load(TRIVIAL), "federation": {}, "stream": STREAM}), encoding="utf-8")
    found = []
    for workers in ("1", "2"):
        home = tmp_path / workers
        process = start(home, "simulate", str(file), "--json", "--workers", workers)
        process.join()
        assert process.exitcode == 0, (home / "printed").read_text()
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("FEDTUNE_HOME", str(home))
            ended = outcome()
        files = [hash_files(find_folder(ended.run.id, client, home), ended.run.id) for client in range(4)]
        found.append((ended.hashes, files))
    assert found[0] == found[1]


def test_devices_decline_with_a_reason_and_the_run_goes_on() -> None:
    """A buffer too small for a class, on one of two classes of devices."""
    devices = [{"name": "toy", "count": 3, "memory": "64MB"}, {"name": "watch", "count": 1, "storage": "6KB"}]
    ended = execute(resolve_stream(STREAM, devices=devices, federation={"quorum": 3}))
    assert ended.run.status == "completed"
    statuses = [[one.status for one in record.client_records] for record in ended.rounds[1:]]
    assert statuses[0] == ["merged"] * 4
    assert statuses[-1] == ["merged"] * 3 + ["declined"]
    assert "leaves no room for one of class" in ended.rounds[-1].client_records[3].reason


def test_a_disk_without_room_declines_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = make_recipe("replay", own_memory={"budget": "1GB"})
    monkeypatch.setattr("fedtune.training.local_training._run_steps", None)  # it must not come so far
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    with pytest.raises(MemoryBudgetError, match="its disk has 1000 left"):
        train_client(recipe, tmp_path, 1)


@pytest.mark.parametrize("encrypted", [False, True])
def test_a_changed_or_foreign_file_and_a_wrong_key_stop_the_client_with_a_sentence(
    tmp_path: Path, encrypted: bool
) -> None:
    recipe = make_recipe("replay", own_memory={"encrypted": encrypted})
    for folder, run in (("one", "run"), ("two", "other")):
        train_client(recipe, tmp_path / folder, 1, run=run)
    path, foreign = (tmp_path / folder / "memory-0000.safetensors" for folder in ("one", "two"))
    content = path.read_bytes()
    for bad in (content[:-1] + bytes([content[-1] ^ 1]), foreign.read_bytes()):
        path.write_bytes(bad)
        with pytest.raises(StoreError, match=r"memory-0000.*; delete it to start this run's memory anew") as error:
            train_client(recipe, tmp_path / "one", 3)
        problem = problem_of(error.value)
        assert problem.code == "memory-damaged"
        assert parse_problem(problem.text) == problem
    path.write_bytes(content)
    if encrypted:
        get_key_path(tmp_path / "one").write_bytes(bytes(32))
        with pytest.raises(StoreError, match="has another key; delete it"):
            train_client(recipe, tmp_path / "one", 3)
    path.unlink()
    train_client(recipe, tmp_path / "one", 3)  # anew


def test_a_file_of_another_client_gives_another_sample_but_no_error(tmp_path: Path) -> None:
    """A device may get another number in a run; what it stored is still its own."""
    recipe = make_recipe("replay")
    train_client(recipe, tmp_path, 1)
    context = get_run_context(recipe.model_dump_json())
    request = TrainRequest(recipe.model_dump_json(), 3, 0, "run")
    from fedtune.training import get_model_state

    state = get_model_state(context.model, context.shared_names)
    run_local_round(request, state, context, context.client_rows[0], tmp_path)
    assert sorted(read_files(tmp_path)) == [0, 1]


def test_a_key_of_ones_own_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key = tmp_path / "mounted"
    key.write_bytes(bytes(range(32)))
    key.chmod(0o600)
    monkeypatch.setenv("FEDTUNE_MEMORY_KEY", str(key))
    train_client(make_recipe("replay", own_memory={"encrypted": True}), tmp_path / "own", 1)
    assert not get_key_path(tmp_path / "own").exists()
    assert sorted(read_files(tmp_path / "own", key=bytes(range(32)))) == [0]
    key.unlink()
    with pytest.raises(StoreError, match=r"the memory key .*mounted cannot be read"):
        train_client(make_recipe("replay", own_memory={"encrypted": True}), tmp_path / "own", 3)


def test_the_memory_of_a_run_that_ended_is_deleted_when_another_run_begins(tmp_path: Path) -> None:
    recipe = make_recipe("replay", own_memory={"encrypted": True})
    train_client(recipe, tmp_path / "ended", *range(1, 11))
    train_client(recipe, tmp_path / "under-way", *range(1, 10))
    train_client(recipe, tmp_path / "ended", 10)  # the last round is begun again
    delete_unneeded_memory(tmp_path / "ended")
    assert len(list((tmp_path / "ended").iterdir())) == 3
    delete_unneeded_memory(tmp_path / "next")
    assert list((tmp_path / "ended").iterdir()) == []
    assert not get_key_path(tmp_path / "ended").exists()
    assert get_key_path(tmp_path / "under-way").exists()
    assert len(list((tmp_path / "under-way").iterdir())) == 2


def test_forgetting_a_run_deletes_its_key_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = DeviceHome(tmp_path)
    folder = home.get_local_state_folder("run")
    train_client(make_recipe("replay", own_memory={"encrypted": True}), folder, 1)

    def fail(path: Path, *_: Any, **__: Any) -> None:
        assert not get_key_path(folder).exists()
        raise OSError("killed here")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("shutil.rmtree", fail)
        for delete in (lambda: home.delete_run("run"), home.delete_all):
            with pytest.raises(OSError, match="killed here"):
                delete()
            get_key_path(folder).parent.mkdir(exist_ok=True)
            get_key_path(folder).write_bytes(bytes(32))
    home.delete_run("run")
    assert not folder.exists()
    with pytest.raises(DeviceError, match="holds nothing of a run other"):
        home.delete_run("other")


def test_methods_that_store_nothing_leave_no_file(tmp_path: Path) -> None:
    train_client(make_recipe(own_memory={"encrypted": True}), tmp_path, 1, 2)
    train_client(make_recipe("naive", own_memory={"encrypted": True}), tmp_path, 3)
    assert not list(tmp_path.glob("memory-*.safetensors"))


def test_a_device_away_for_a_task_reads_what_it_stored_before(tmp_path: Path) -> None:
    recipe = make_recipe({"replay": {"share": 0.2}})
    train_client(recipe, tmp_path, 1, 2, 7, 8)
    groups = read_files(tmp_path)[3]["replay/groups"].tolist()
    assert set(groups) == {0, 1, 6, 7}
    assert MemoryFolder(tmp_path, "run").count_bytes() == sum(path.stat().st_size for path in tmp_path.iterdir())


def test_the_commands_say_what_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDTUNE_HOME", str(tmp_path))
    folder = DeviceHome().get_local_state_folder("run")
    train_client(make_recipe("replay", own_memory={"encrypted": True}), folder, 1)
    with DeviceHome().hold_lock(), pytest.raises(DeviceError, match="is joined; stop that process first"):
        CliRunner().invoke(device, ["forget", "run"], catch_exceptions=False)
    assert CliRunner().invoke(device, ["forget", "run"], catch_exceptions=False).output == "forgot run\n"
    assert not folder.exists()
    assert not get_key_path(folder).exists()
    with pytest.raises(DeviceError, match="holds nothing of a run run"):
        CliRunner().invoke(device, ["forget", "run"], catch_exceptions=False)
    with pytest.raises(StoreError, match=r"the memory key .* cannot be read"):
        use_memory_key(tmp_path / "nowhere")
