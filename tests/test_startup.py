"""What a process does not need, it does not import: half a second and a hundred megabytes on a small device."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.federations import TRIVIAL, WORDS, words

pytestmark = pytest.mark.slow

SIMULATE = """
import sys
from fedtune.cli.main import cli
cli(["simulate", "recipe.yaml", "--json", "--workers", "1"], standalone_mode=False)
print(*sorted(sys.modules), file=sys.stderr)
"""
TRAIN = """
import json
import sys
from pathlib import Path

from fedtune.device.local_data import LocalData, summarise_local_data
from fedtune.device.trainer import Trainer
from fedtune.wire.client_update import TrainRequest

recipe, labels, source = json.loads(Path("order.json").read_text())
shop, rows = LocalData(source).get_context(TrainRequest(recipe, 1, 0, "run-1", labels))
assert len(shop.train) and summarise_local_data(shop, rows)
print(*sorted(sys.modules), file=sys.stderr)
"""
TABLES = {"datasets", "huggingface_hub", "pandas", "pyarrow"}
"""What reads the hub, parquet and JSON lines."""
MODELS = {"bitsandbytes", "peft", "tokenizers", "torch._dynamo", "transformers"}
TEXT_ONLY = {"alembic", "bitsandbytes", "datasets", "gguf", "matplotlib", "pandas", "peft", "pyarrow"}
"""What a model of texts in a csv file does without."""
SERVING = {"alembic", "fastapi", "flwr.server.superlink.linkstate", "gguf", "starlette", "uvicorn"}
OTHERS = {"PIL", "matplotlib", "scipy", "sklearn"}


def imported(script: str, folder: Path) -> set[str]:
    done = subprocess.run([sys.executable, "-c", script], cwd=folder, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    found = set(done.stderr.splitlines()[-1].split())
    assert "torch" in found
    return found


def test_a_federation_of_a_plain_image_model_imports_nothing_it_does_not_use(home: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(TRIVIAL, encoding="utf-8")
    assert imported(SIMULATE, tmp_path) & (TABLES | MODELS | SERVING | OTHERS) == set()


def test_a_federation_on_a_csv_file_reads_it_without_the_libraries_of_tables(home: Path, tmp_path: Path) -> None:
    words(tmp_path, "train.techniques=full")
    text = WORDS.format(folder=tmp_path).replace("lora+gradient-checkpointing", "full")
    (tmp_path / "recipe.yaml").write_text(text, encoding="utf-8")
    found = imported(SIMULATE, tmp_path)
    assert "transformers" in found
    assert found & TEXT_ONLY == set()


def test_a_devices_trainer_reads_its_examples_without_them_too(home: Path, tmp_path: Path) -> None:
    order = [words(tmp_path, "train.techniques=full").model_dump_json(), '["bad", "good"]', "csv:words.csv"]
    (tmp_path / "order.json").write_text(json.dumps(order), encoding="utf-8")
    assert imported(TRAIN, tmp_path) & (TEXT_ONLY | {"sqlalchemy", "uvicorn", "starlette"}) == set()
