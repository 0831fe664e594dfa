"""Claim: merging three SmolLM2-135M fine-tunes takes a fraction of mergekit's time and memory, however many models.

Variants are the base with a random rank-8 change (3 % of a matrix's norm) and noise (2 %), bf16, on disk. Both tools
run their default command, fedtune's report among it, in processes of their own, in turn, pinned to one core, on warm
files; user + system seconds and peak resident memory are what the kernel says of the process (wait4), medians over
REPEATS. mergekit alone is spared something: its model card, which asks the hub. Linear: at most 0.5x the seconds and
0.35x the peak; TIES at density 0.2: at most 0.35x and 0.45x. fedtune alone merges 2, 4 and 8 models too: its peak must
stay flat. Linear sums are compared value by value in fp32. Other work on the machine slows both tools, not alike: the
load beside each run is in the result.

Run: python -m benchmarks.merge_cost --mergekit PATH-OF-mergekit-yaml [--repeats 3] [--core 0] [--work FOLDER]
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.report import save
from fedtune.models.sources import resolve_model_source

COUNT, FLAT = 3, (2, 4, 8)
RANK, CHANGE, NOISE = 8, 0.03, 0.02
GATES = {"linear": (0.5, 0.35), "ties": (0.35, 0.45)}
_LAUNCHER = """
import json, os, sys, time
os.sched_setaffinity(0, {int(sys.argv[1])})
started = time.perf_counter()
child = os.posix_spawn(sys.argv[2], sys.argv[2:], os.environ)
_, status, usage = os.wait4(child, 0)
print(json.dumps([usage.ru_utime + usage.ru_stime, time.perf_counter() - started, usage.ru_maxrss * 1024]))
sys.exit(os.waitstatus_to_exitcode(status) != 0)
"""
"""A process counts its parent's peak as its own until it is another program: hence a parent that holds nothing."""


_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
"""Not handed on: a process may run as many threads as it likes, on its one core."""


class Tool(NamedTuple):
    """A command that merges, with CONFIG and FOLDER where the configuration and the folder to make belong."""

    command: list[str]
    core: int

    def arranged(self, config: Path, made: Path) -> list[str]:
        """The whole command."""
        return [{"CONFIG": str(config), "FOLDER": str(made)}.get(word, word) for word in self.command]


class Cost(NamedTuple):
    """What a process took."""

    cpu_seconds: float
    seconds: float
    peak_bytes: int


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--mergekit", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--core", type=int, default=0)
    parser.add_argument("--work", type=Path)
    arguments = parser.parse_args()
    if not arguments.mergekit.is_file():
        sys.exit(f"there is no {arguments.mergekit}; install mergekit 0.1.5 in an environment of its own and name it")
    with tempfile.TemporaryDirectory(dir=arguments.work) as folder:
        work = Path(folder)
        base, models = made(work, max(FLAT))
        ours = [sys.executable, "-m", "fedtune.cli.main", "merge", "CONFIG", "-o", "FOLDER"]
        theirs = [str(arguments.mergekit), "CONFIG", "FOLDER", "--no-write-model-card"]
        tools = {"fedtune": Tool(ours, arguments.core), "mergekit": Tool(theirs, arguments.core)}
        rows = [row(work, tools, method, base, models, arguments.repeats) for method in GATES]
        flat = {
            method: {
                count: run(work, tools["fedtune"], config(method, base, models[:count])).peak_bytes for count in FLAT
            }
            for method in GATES
        }
        save(
            "merge_cost",
            {
                "how": "one pinned core, default commands",
                "commands": ["fedtune merge CONFIG -o FOLDER", " ".join(["mergekit-yaml", *theirs[1:]])],
                "rows": rows,
                "fedtune_peak_by_models": flat,
                "linear_difference": difference(work, tools, base, models),
            },
        )


def made(work: Path, count: int) -> tuple[Path, list[Path]]:
    """The base and its variants as bf16 folders."""
    source = Path(resolve_model_source("sample:smollm2"))
    [file] = source.glob("*.safetensors")
    folders = [work / "base", *(work / f"variant-{number}" for number in range(count))]
    for number, folder in enumerate(folders):
        folder.mkdir()
        for other in source.iterdir():
            if other != file:
                (folder / other.name).symlink_to(other)
        settings = json.loads((source / "config.json").read_text()) | {"dtype": "bfloat16"}
        (folder / "config.json").unlink()
        (folder / "config.json").write_text(json.dumps(settings))
        save_file(varied(file, number), folder / "model.safetensors", {"format": "pt"})
    return folders[0], folders[1:]


def varied(file: Path, number: int) -> dict[str, Tensor]:
    """The tensors of variant ``number``; 0 is the base itself."""
    random = torch.Generator().manual_seed(number)
    with safe_open(file, "pt") as opened:
        tensors = {name: opened.get_tensor(name).float() for name in opened.keys()}  # noqa: SIM118
    for name, tensor in tensors.items() if number else ():
        tensors[name] = tensor + changed(tensor, random)
    return {name: tensor.bfloat16() for name, tensor in tensors.items()}


def changed(tensor: Tensor, random: torch.Generator) -> Tensor:
    """A low-rank change of a matrix and noise on everything, as shares of the norm."""
    noise = torch.randn(tensor.shape, generator=random)
    change: Tensor = noise * (NOISE * tensor.norm() / noise.norm())
    if tensor.dim() == 2:
        low = torch.randn(len(tensor), RANK, generator=random) @ torch.randn(RANK, tensor.shape[1], generator=random)
        change += low * (CHANGE * tensor.norm() / low.norm())
    return change


def config(method: str, base: Path, models: Sequence[Path], dtype: str = "bfloat16") -> dict[str, Any]:
    """A merge in the schema both tools read."""
    parameters = {"weight": 1 / len(models), **({"density": 0.2} if method == "ties" else {})}
    settings = {
        "merge_method": method,
        "dtype": dtype,
        "models": [{"model": str(one), "parameters": parameters} for one in models],
    }
    return settings | ({"base_model": str(base)} if method == "ties" else {})


def run(work: Path, tool: Tool, settings: dict[str, Any], keep: Path | None = None) -> Cost:
    """One merge in a process of its own; what it made is removed unless ``keep`` says where to."""
    written = work / "merge.yaml"
    written.write_text(yaml.safe_dump(settings))
    made = keep or work / "merged"
    arguments = [sys.executable, "-S", "-c", _LAUNCHER, str(tool.core), *tool.arranged(written, made)]
    done = subprocess.run(arguments, capture_output=True, text=True, env=environment(), check=False)
    if done.returncode:
        sys.exit(done.stderr[-2000:])
    if keep is None:
        subprocess.run(["rm", "-r", str(made)], check=True)
    return Cost(*json.loads(done.stdout.splitlines()[-1]))


def environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in _THREADS} | {"HF_HUB_OFFLINE": "1"}


def row(
    work: Path, tools: dict[str, Tool], method: str, base: Path, models: Sequence[Path], repeats: int
) -> dict[str, Any]:
    """Both tools on one merge, taking turns."""
    settings = config(method, base, models[:COUNT])
    taken: dict[str, list[Cost]] = {tool: [] for tool in tools}
    loads = []
    for _ in range(repeats):
        loads.append(os.getloadavg()[0])
        for tool, command in tools.items():
            taken[tool].append(run(work, command, settings))
            print(method, tool, taken[tool][-1], file=sys.stderr, flush=True)
    medians = {
        tool: Cost(*(statistics.median(figures) for figures in zip(*costs, strict=True)))
        for tool, costs in taken.items()
    }
    ours, theirs = medians["fedtune"], medians["mergekit"]
    ratios = {
        "cpu": ours.cpu_seconds / theirs.cpu_seconds,
        "peak": ours.peak_bytes / theirs.peak_bytes,
        "wall": ours.seconds / theirs.seconds,
    }
    goals = dict(zip(("cpu", "peak"), GATES[method], strict=True))
    return {
        "method": method,
        **{tool: cost._asdict() for tool, cost in medians.items()},
        "ratios": ratios,
        "goals": goals,
        "cpu_seconds_of_each_run": {tool: [cost.cpu_seconds for cost in costs] for tool, costs in taken.items()},
        "load_before_each_turn": loads,
    }


def difference(work: Path, tools: dict[str, Tool], base: Path, models: Sequence[Path]) -> float:
    """The largest difference of the two linear merges in fp32, over the largest value of each tensor."""
    made = {tool: work / f"fp32-{tool}" for tool in tools}
    for tool, command in tools.items():
        run(work, command, config("linear", base, models[:COUNT], "float32"), made[tool])
    ours, theirs = ({**tensors(folder)} for folder in made.values())
    assert ours.keys() == theirs.keys(), ours.keys() ^ theirs.keys()
    return max(float((ours[name] - theirs[name]).abs().max() / theirs[name].abs().max()) for name in ours)


def tensors(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            found |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    return found


if __name__ == "__main__":
    main()
