"""What a merge holds does not grow with the number of models or the size of the result."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

SCRIPT = """
import sys
from pathlib import Path
from fedtune.offline_merge import compare_models, write_merged_model, prepare_merge, build_merge_config
from fedtune.memory.process_memory import peak_rss, reset_peak_rss

names, method = sys.argv[2:], sys.argv[1]
config, _ = build_merge_config(names, method, [], [], base_model="base")
reset_peak_rss()
before = peak_rss()
prepared = prepare_merge(config)
compare_models(prepared, lambda done: None)
write_merged_model(prepared, Path(f"out-{method}-{len(names)}"), "a card")
print(peak_rss() - before)
"""
SHAPES = {f"layers.{layer}.weight": (2000, 1000) for layer in range(6)}


def excess(method: str, count: int) -> int:
    """Bytes of the process's high-water mark that a merge of so many models adds."""
    names = [f"model{number}" for number in range(count)]
    root = str(Path(__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, method, *names], env={"PYTHONPATH": root}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    random = torch.Generator().manual_seed(0)
    base = {name: torch.randn(shape, generator=random) for name, shape in SHAPES.items()}
    for number, name in enumerate(["base", *(f"model{number}" for number in range(8))]):
        Path(name).mkdir()
        Path(name, "config.json").write_text('{"model_type": "test"}')
        tuned = {key: (tensor + 0.01 * number * tensor.roll(number)).bfloat16() for key, tensor in base.items()}
        save_file(tuned, Path(name, "model.safetensors"), {"format": "pt"})


@pytest.mark.parametrize(("method", "pieces"), [("linear", 3.0), ("ties", 4.5)])
def test_the_peak_hardly_grows_from_two_to_eight_models(models: None, method: str, pieces: float) -> None:
    """TIES holds each model's delta of a piece, its kept entries and what is kept; a sum holds nothing of the kind."""
    two, eight = excess(method, 2), excess(method, 8)
    piece = 4 * (1 << 18)
    assert (eight - two) / 6 / piece < pieces
    one_model = sum(torch.Size(shape).numel() for shape in SHAPES.values()) * 2
    assert pieces * piece < one_model / 4
