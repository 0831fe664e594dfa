import subprocess
import sys
from pathlib import Path

from tests.federations import TRIVIAL

SCRIPT = """
import sys
from fedtune.cli.main import cli
cli(["simulate", "recipe.yaml", "--json"], standalone_mode=False)
print(*sorted(sys.modules), file=sys.stderr)
"""


def test_a_federation_of_a_plain_image_model_imports_nothing_it_does_not_use(home: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(TRIVIAL, encoding="utf-8")
    done = subprocess.run([sys.executable, "-c", SCRIPT], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    imported = set(done.stderr.split())
    assert "torch" in imported
    heavy = {"bitsandbytes", "matplotlib", "peft", "torch._dynamo", "transformers"}
    assert not imported & heavy
