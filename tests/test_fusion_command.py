"""``fedtune merge``: what it prints, what it writes, and what it refuses."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner, Result
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from fedtune.cli.merge import merge
from fedtune.models.transformers_logging import silence_transformers
from tests.fusion_models import base_and_tuned, moved, save, tensors
from tests.tiny import bert

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),  # peft's own
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
]


@pytest.fixture(autouse=True)
def folder(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("COLUMNS", "120")
    base_and_tuned(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def call(*arguments: str) -> Result:
    result = CliRunner().invoke(merge, arguments)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def told(*arguments: str) -> Any:
    result = call(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


QUICK = ("tuned1", "tuned2", "tuned3", "--base-model", "base", "--method", "ties", "--weights", "0.5,0.3,0.2")


def test_the_quick_way_is_what_the_file_says() -> None:
    assert call(*QUICK, "--set", "density=0.4", "-o", "quick").exit_code == 0
    models = [
        {"model": name, "parameters": {"weight": weight}}
        for name, weight in (("tuned1", 0.5), ("tuned2", 0.3), ("tuned3", 0.2))
    ]
    value = {"merge_method": "ties", "base_model": "base", "models": models, "parameters": {"density": 0.4}}
    Path("merge.yaml").write_text(yaml.safe_dump(value))
    assert call("merge.yaml", "-o", "filed").exit_code == 0
    quick, filed = tensors(Path("quick")), tensors(Path("filed"))
    assert all(torch.equal(quick[name], filed[name]) for name in quick)


def test_a_file_is_changed_by_set() -> None:
    Path("merge.yaml").write_text("merge_method: linear\nmodels: [tuned1, tuned2]\n")
    assert told("merge.yaml", "-o", "out", "--set", "dtype=bfloat16")["method"] == "linear"
    assert all(tensor.dtype == torch.bfloat16 for tensor in tensors(Path("out")).values())


def test_the_report_comes_first_and_a_dry_run_stops_there() -> None:
    result = call(*QUICK, "--dry-run")
    assert result.exit_code == 0
    assert "opposite directions at" in result.stdout
    assert "a rule of thumb" in result.stdout
    assert sorted(path.name for path in Path().iterdir()) == ["base", "tuned1", "tuned2", "tuned3"]


def test_the_figures_of_the_report_are_those_of_whole_tensors() -> None:
    report = told(*QUICK, "--dry-run")["report"]
    base, *tuned = (
        torch.cat([tensor.flatten().double() for tensor in tensors(Path(name)).values()])
        for name in ("base", "tuned1", "tuned2", "tuned3")
    )
    deltas = torch.stack([one - base for one in tuned])
    norms = deltas.norm(dim=1)
    assert report["norms"] == pytest.approx((norms / base.norm()).tolist(), rel=1e-5)
    cosines = (deltas @ deltas.T / norms / norms[:, None]).flatten().tolist()
    assert [value for row in report["cosines"] for value in row] == pytest.approx(cosines, abs=1e-5)
    signs = deltas.sign()
    assert report["conflicts"] == pytest.approx(float(((signs.amax(0) > 0) & (signs.amin(0) < 0)).double().mean()))
    whole = (deltas * torch.tensor([[0.5], [0.3], [0.2]])).sum(0).norm()
    assert report["scale"] == pytest.approx(float(norms.mean() / whole), rel=1e-5)
    assert report["first"] == [next(iter(tensors(Path("base"))))] * 3
    assert report["words"] == [{"more": 0, "missing": 0, "moved": 0}] * 3


def test_the_card_tells_what_went_in() -> None:
    assert call(*QUICK, "-o", "out").exit_code == 0
    card = Path("out/README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["base_model"] == ["tuned1", "tuned2", "tuned3", "base"]
    given = yaml.safe_load(card.split("```yaml")[1].split("```")[0])
    assert given["merge_method"] == "ties"
    assert given["models"][1] == {"model": "tuned2", "parameters": {"weight": 0.3}}
    for name in ("base", "tuned1"):
        assert hashlib.sha256(Path(name, "model.safetensors").read_bytes()).hexdigest() in card
    assert "move in opposite directions" in card


def test_inputs_and_result_are_scored() -> None:
    for seed in (1, 2):
        save(moved(bert(), seed), Path(f"bert{seed}"))
    save(bert(), Path("bert"))
    Path("texts.csv").write_text("text,label\nword3 word4,LABEL_0\nword5,LABEL_2\nword6 word7 word8,LABEL_1\n")
    arguments = ("bert1", "bert2", "--base-model", "bert", "-o", "out", "--eval-data", "csv:texts.csv")
    scores = told(*arguments, "--task", "text-classification")["scores"]
    assert list(scores) == ["bert1", "bert2", "bert", "merged"]
    assert {one["name"] for one in scores["merged"]} == {"accuracy", "loss"}
    card = Path("out/README.md").read_text()
    loss = next(one["value"] for one in scores["merged"] if one["name"] == "loss")
    assert f"| merged | all | {scores['merged'][0]['value']:.4f} | {loss:.4f} |" in card


def test_aim_watches_the_base_at_work() -> None:
    lines = "".join(
        f'{{"text": "{" ".join(f"word{(row * 7 + k) % 39 + 1}" for k in range(30))}"}}\n' for row in range(40)
    )
    Path("texts.jsonl").write_text(lines)
    arguments = ("tuned1", "tuned2", "--base-model", "base", "--method", "ties")
    assert call(*arguments, "-o", "plain").exit_code == 0
    watched = ("--relax", "aim", "--calibration-data", "jsonl:texts.jsonl", "--task", "text-generation")
    assert call(*arguments, *watched, "-o", "relaxed").exit_code == 0
    plain, relaxed, base = (tensors(Path(name)) for name in ("plain", "relaxed", "base"))
    name = "model.layers.0.mlp.up_proj.weight"
    ratio = (relaxed[name] - base[name]).norm(dim=0) / (plain[name] - base[name]).norm(dim=0)
    assert ratio.min().item() == pytest.approx(0.4, abs=1e-3)
    assert ratio.max().item() < 1


def test_models_are_aligned_before_they_are_merged() -> None:
    """A model and itself with permuted hidden units merge into that model."""
    own = tensors(Path("tuned1"))
    order = torch.randperm(32, generator=torch.Generator().manual_seed(0))
    with silence_transformers():
        twin = AutoModelForCausalLM.from_pretrained("tuned1")
    for layer in twin.model.layers:
        for part in (layer.mlp.gate_proj, layer.mlp.up_proj):
            part.weight.data = part.weight.data[order]
        layer.mlp.down_proj.weight.data = layer.mlp.down_proj.weight.data[:, order]
    save(twin, Path("twin"))
    arguments = ("tuned1", "twin", "--align", "rebasin", "--task", "text-generation", "-o", "out")
    result = call(*arguments)
    assert result.exit_code == 0, result.output
    assert all((tensors(Path("out"))[name] - tensor).abs().max() < 1e-6 for name, tensor in own.items())


def an_adapter(name: str, seed: int, rank: int) -> None:
    with silence_transformers():
        model = AutoModelForCausalLM.from_pretrained("base")
    adapted: Any = get_peft_model(model, LoraConfig(r=rank, target_modules=["q_proj", "v_proj"]))
    random = torch.Generator().manual_seed(seed)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape, generator=random) * 0.1
    adapted.save_pretrained(name)


def test_adapters_become_a_model_or_an_adapter_of_the_same_weights() -> None:
    an_adapter("one", 1, 2)
    an_adapter("two", 2, 3)
    assert call("one", "two", "--weights", "1,3", "-o", "model").exit_code == 0
    result = call("one", "two", "--weights", "1,3", "--format", "adapter", "-o", "adapter")
    assert result.exit_code == 0, result.output
    assert "2 to 5" in result.stdout or "rank 5" in result.stdout
    with silence_transformers():
        loaded: Any = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("base"), "adapter")
    merged = loaded.merge_and_unload().state_dict()
    for name, tensor in tensors(Path("model")).items():
        torch.testing.assert_close(merged[name], tensor, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("tuned1", "tuned2"), "name the output folder with -o, or use --dry-run"),
        (
            ("merge.yaml", "--method", "ties", "-o", "out"),
            "contains the method and its settings; change them with --set",
        ),
        (("tuned1", "--weights", "a", "-o", "out"), "write --weights as numbers with commas"),
        (("tuned1", "-o", "out", "--max-shard-size", "big"), "write it as 500MB or 5GB"),
        (("tuned1", "tuned2", "-o", "out", "--eval-data", "csv:x.csv"), "--eval-data needs --task"),
        (("tuned1", "--format", "adapter", "--dry-run"), "--format adapter writes at once"),
    ],
)
def test_bad_use_is_told(arguments: tuple[str, ...], message: str) -> None:
    Path("merge.yaml").write_text("models: [tuned1]\n")
    result = call(*arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.output.replace("│", " ").split())
    assert not Path("out").exists()


def test_the_help_has_an_example() -> None:
    text = call("--help").stdout
    assert "fedtune merge merge.yaml -o merged" in text


def test_a_plain_merge_imports_neither_transformers_nor_training() -> None:
    script = (
        "import sys\nfrom fedtune.cli.main import cli\n"
        "cli(['merge', 'tuned1', 'tuned2', '--base-model', 'base', '--method', 'ties', '-o', 'out', '--json'], "
        "standalone_mode=False)\nprint(*sorted(sys.modules), file=sys.stderr)"
    )
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", script], env={"PYTHONPATH": str(root), "PATH": ""}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    imported = set(done.stderr.split())
    assert not imported & {"transformers", "datasets", "peft", "fedtune.training", "bitsandbytes", "scipy"}
