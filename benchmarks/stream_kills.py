"""Claim: a stream killed with -9 anywhere and resumed, simulated or on real devices, ends with the bits of one alone.

Two clients, three tasks of two rounds. For each method, a simulation is left alone, and others are killed at a planted
point: in the middle of a round (half of a client's spooled update), at a border (half of its checkpoint, before and
after the rename of the server's memory) and inside the write of a device's memory (half of the file, before and after
its rename). Resumed, they must have the same digests of all checkpoints and memories, the same metrics and task scores,
and the same tensors in the files of the devices.

Then the same recipes are run on a real server with two real devices. Some processes are killed there: the trainer of a
device inside a memory write, a device's process, and the server's. All must have the checkpoints of the simulation.

Results of other methods stay, so that it may be run in parts.

Run: python -m benchmarks.stream_kills [METHOD ...] [--simulated]
"""

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benchmarks.fleet import Fleet, Member, fleet
from benchmarks.random_bert import save_random_bert
from benchmarks.report import save
from benchmarks.stream_plants import VARIABLE, Plant, install, write_site_hook
from fedtune import checkpoint
from fedtune.device.device_home import DeviceHome
from fedtune.device.own_memory import MemoryFolder
from fedtune.recipe.yaml_file import parse_recipe
from fedtune.tracking import Store, make_file_url

CLIENTS, SECONDS = 2, 600.0
DIGITS = """
version: 2
name: kills
task: image-classification
model: {{source: "sample:logistic"}}
data: {{source: "sample:digits"}}
devices: [{{name: toy, count: {clients}}}]
train: {{techniques: {technique}, optimiser: sgd, lr: 0.03, batch_size: 10, image_size: 28, local_steps: 2}}
federation: {{deadline: 120}}
evaluation: {{local_holdout: 0.2, clients: all}}
stream:
  setting: class
  tasks: [{{name: a, where: ["0", "1"], rounds: 2}}, {{name: b, where: ["2", "3"], rounds: 2}},
    {{name: c, where: ["4", "5"], rounds: 2}}]
  {stream}
"""
WORDS = """
version: 2
name: kills
task: text-classification
model: {{source: "path:{folder}/bert"}}
data: {{source: "csv:{folder}/words.csv", columns: {{text: text, label: label, domain: place}}}}
devices: [{{name: toy, count: {clients}}}]
train: {{techniques: {technique}, lr: 0.01, batch_size: 8, max_length: 16, local_steps: 2}}
federation: {{deadline: 120}}
evaluation: {{local_holdout: 0.2, clients: all}}
stream:
  setting: domain
  tasks: [{{name: kitchen, rounds: {rounds}}}, {{name: garden, rounds: {rounds}}}, {{name: attic, rounds: {rounds}}}]
  {stream}
"""
METHODS: Mapping[str, tuple[str, str, str]] = {
    "replay": (DIGITS, "[full]", "memory: [{replay: {share: 20%}}]"),
    "der": (DIGITS, "[full]", "memory: [{der: {share: 20%}}]"),
    "ewc": (DIGITS, "[full]", "memory: [ewc]"),
    "lwf": (DIGITS, "[full]", "memory: [lwf]"),
    "analytic": (DIGITS, "[head-only]", "memory: [{analytic: {fewest: 1}}]"),
    "consolidate": (DIGITS, "[full]", "consolidate: [fisher]"),
    "drift": (WORDS, "[lora]", "drift: {batch: 8}"),
    "o-lora": (WORDS, "[o-lora]", "memory: []"),
    "inf-lora": (WORDS, "[inf-lora]", "memory: [dual-gpm]"),
}
"""The base of the recipe, its techniques, and what is in its stream."""
STORING = ("replay", "der")
SERVER = {
    "half an update of a round": Plant(r"round-0004\.spool/client-000001", "half"),
    "half a checkpoint at a border": Plant(r"round-0002\.safetensors$", "half"),
    "after the rename of a border's checkpoint": Plant(r"round-0004\.safetensors$", "after"),
}
REMEMBERED = Plant(r"round-0004\.memory\.safetensors$", "half")
DEVICE = {
    "half a device's memory": Plant(r"client-000001/memory-0001", "half"),
    "before the rename of a device's memory": Plant(r"client-000001/memory-0001", "before"),
    "after the rename of a device's memory": Plant(r"client-000001/memory-0001", "after"),
}
DEPLOYED: Mapping[str, tuple[str, Plant | None]] = {
    "replay": ("device", Plant(r"own/.*/memory-0001", "half")),
    "der": ("device", Plant(r"own/.*/memory-0001", "after")),
    "ewc": ("server", Plant(r"round-0004\.memory\.safetensors$", "half")),
    "consolidate": ("server", Plant(r"round-0003\.spool/client-000001", "half")),
}
"""Which processes are planted, by method: those of the first device, or those of the server."""
VERDICTS = {"fine": "good", "great": "good", "awful": "bad", "dull": "bad"}
SENTENCES = {"kitchen": "the film {} was {}", "garden": "was was {} the {} film film", "attic": "{} the the film {}"}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("methods", nargs="*", default=list(METHODS))
    parser.add_argument("--simulated", action="store_true", help="leave out the real devices")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fedtune-stream-kills-") as name:
        folder = Path(name)
        write_model(folder)
        recipes = {method: write_recipe(folder, method) for method in chosen.methods}
        alone = {}
        for method, recipe in recipes.items():
            alone[method] = run_alone(folder / f"{method}-alone", recipe)
            keep("simulated", method, list(iter_cases(folder, method, recipe, alone[method])))
        if not chosen.simulated:
            for method, case in iter_deployed(folder, recipes, alone):
                keep("deployed", method, [case])


def keep(where: str, method: str, cases: Sequence[dict[str, Any]]) -> None:
    """Save the cases in place of earlier ones of the method; those of others stay, so that it may be run in parts."""
    path = Path(__file__).parent / "results" / "stream_kills.json"
    known = json.loads(path.read_text())["cases"] if path.exists() else []
    others = [one for one in known if (one["where"], one["method"]) != (where, method)]
    every = [*others, *cases]
    killed = [one for one in every if one["kill"]]
    save("stream_kills", {"cases": every, "kills": len(killed), "same_bits": sum(one["same_bits"] for one in killed)})


def write_model(folder: Path) -> None:
    """A BERT of two layers with random weights, and sentences of three places."""
    words = ["the", "film", "was", *VERDICTS, *map(str, range(20))]
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2}
    save_random_bert(folder / "bert", words, **shape)
    rows = [
        f"{sentence.format(number, word)},{label},{place}"
        for place, sentence in SENTENCES.items()
        for number in range(20)
        for word, label in VERDICTS.items()
    ]
    (folder / "words.csv").write_text("text,label,place\n" + "\n".join(rows) + "\n", encoding="utf-8")


def write_recipe(folder: Path, method: str) -> Path:
    base, technique, stream = METHODS[method]
    path = folder / f"{method}.yaml"
    rounds = 3 if method in ("inf-lora", "drift") else 2
    text = base.format(folder=folder, clients=CLIENTS, technique=technique, stream=stream, rounds=rounds)
    path.write_text(text, encoding="utf-8")
    return path


def start(home: Path, *words: str, plant: Plant | None = None) -> int:
    """Run a command in a process that has imported everything already, and return its exit code."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "fedtune.cli.simulate", "fedtune.simulation"])
    process = context.Process(target=command, args=(home, words, plant))
    process.start()
    process.join(SECONDS)
    assert process.exitcode is not None, f"{words} takes longer than {SECONDS} seconds"
    return process.exitcode


def command(home: Path, words: Sequence[str], plant: Plant | None) -> None:
    from fedtune.cli.main import main as run_command

    os.environ["FEDTUNE_HOME"] = str(home)
    home.mkdir(parents=True, exist_ok=True)
    printed = os.open(home / "printed", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(printed, 1)
    os.dup2(printed, 2)
    if plant:
        install(plant)
    sys.argv = ["fedtune", *words]
    run_command()


def run_alone(home: Path, recipe: Path) -> dict[str, Any]:
    simulate(home, str(recipe))
    return read_outcome(home)


def simulate(home: Path, *words: str) -> None:
    code = start(home, "simulate", *words, "--workers", "1", "--json")
    assert code == 0, (home / "printed").read_text()


def iter_cases(folder: Path, method: str, recipe: Path, alone: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Kill and resume one simulation after the other."""
    for number, (name, plant) in enumerate(list_plants(method, alone).items()):
        home = folder / f"{method}-{number}"
        code = start(home, "simulate", str(recipe), "--workers", "1", "--json", plant=plant)
        assert code == -9, f"{method}, {name}: the plant was not met\n{(home / 'printed').read_text()}"
        simulate(home, "--resume", "latest")
        found = read_outcome(home)
        yield {"where": "simulated", "method": method, "kill": name, "same_bits": repr(found) == repr(alone)}


def list_plants(method: str, alone: Mapping[str, Any]) -> dict[str, Plant]:
    """The points at which a simulation of a method is killed; inside the writes of a memory if it has one."""
    remembers = any(digest for _, _, digest in alone["checkpoints"])
    number = next((number for number, _, digest in alone["checkpoints"] if digest and number > 2), 4)
    memory = replace(REMEMBERED, pattern=REMEMBERED.pattern.replace("0004", f"{number:04d}"))
    return {
        **SERVER,
        **({"half a memory of the server": memory} if remembers else {}),
        **(DEVICE if method in STORING else {}),
    }


def read_outcome(home: Path) -> dict[str, Any]:
    """What a run left in the store and in the folders of its clients."""
    with Store.open(make_file_url(home / "store.sqlite")) as store:
        run = store.run("latest")
        rounds = store.rounds(run.id)
    folders = sorted((home / "runs" / run.id / "own").glob("client-*"))
    checkpoints = [one.checkpoint for one in rounds]
    return {
        "status": run.status,
        "checkpoints": [
            (number, one and one.sha256, one and one.memory_sha256) for number, one in enumerate(checkpoints)
        ],
        "metrics": [[asdict(one) for one in record.metrics] for record in rounds],
        "scores": [[asdict(one) for one in record.task_scores] for record in rounds],
        "device_files": [hash_memory(folder, run.id) for folder in folders],
    }


def hash_memory(folder: Path, run: str) -> dict[int, str]:
    """The digests of the tensors that a device stores, by visit."""
    memory = MemoryFolder(folder, run)
    visits = [int(path.stem.removeprefix("memory-")) for path in sorted(folder.glob("memory-*.safetensors"))]
    return {visit: checkpoint.hash_tensors(memory.read_earlier(visit + 1)[visit]) for visit in visits}


def iter_deployed(
    folder: Path, recipes: Mapping[str, Path], alone: Mapping[str, Mapping[str, Any]]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Run each recipe on the same server and devices, and compare with the simulation."""
    hook = {"PYTHONPATH": os.pathsep.join([str(write_site_hook(folder / "hook")), str(Path(__file__).parents[1])])}
    with fleet(CLIENTS, address="127.0.0.1", store="", folder=None, **hook) as made:
        for method, recipe in recipes.items():
            victim, plant = DEPLOYED.get(method, ("", None))
            if plant is not None:
                plant_in(made, victim, replace(plant, mark=str(folder / f"{method}-killed")))
            kill = f"{victim} at {plant.pattern}, {plant.moment}" if plant else ""
            yield method, deploy(made, method, recipe, alone[method], kill)


def plant_in(made: Fleet, victim: str, plant: Plant) -> None:
    """Start the victim again, with the plant in its environment."""
    member: Member = made.server if victim == "server" else made.devices[0]
    member.end()
    member.environment[VARIABLE] = plant.as_text()
    member.start()


def deploy(made: Fleet, method: str, recipe: Path, alone: Mapping[str, Any], kill: str) -> dict[str, Any]:
    run = made.submit(parse_recipe(recipe.read_text(), method, []))
    found = made.ended(run, SECONDS)
    assert found["status"] == "completed", found["reason"]
    bits = [one["checkpoint"] and one["checkpoint"]["sha256"] for one in found["rounds"]]
    files = [hash_memory(DeviceHome(one.home / "device").get_local_state_folder(run), run) for one in made.devices]
    same = bits == [digest for _, digest, _ in alone["checkpoints"]] and files == alone["device_files"]
    return {"where": "deployed", "method": method, "kill": kill, "same_bits": same}


if __name__ == "__main__":
    main()
