"""Tasks of lm-evaluation-harness from local files. The tests that run them need lm-eval."""

import json
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from fedtune.cli.main import cli
from fedtune.errors import ModelError, SourceError
from fedtune.library.harness_tasks import read_task_name
from fedtune.training import get_run_context, set_model_state
from tests.federations import execute
from tests.task_cases import task_recipe
from tests.test_export import state

TASK = """
task: {name}
dataset_path: {source}
dataset_kwargs:
  data_files: {{test: {folder}/rows.jsonl}}
test_split: test
output_type: multiple_choice
process_docs: !function missing.nothing
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list:
  - metric: acc
"""


def write_task(folder: Path, source: str = "json", name: str = "colours") -> Path:
    path = folder / "task.yaml"
    path.write_text(TASK.format(name=name, source=source, folder=folder), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("[]", "is no mapping of keys to values"),
        ("{dataset_path: json}", "has no key task with a name"),
        ("task: [", "is no valid YAML"),
        ("{task: a, dataset_path: squad}", "dataset_path is 'squad', which lm-eval would download"),
        ("{task: a}", "dataset_path is 'None', which lm-eval would download"),
        ("{task: a, dataset_path: json, dataset_kwargs: {data_files: 'https://x/y'}}", "names a URL"),
    ],
)
def test_tasks_that_would_download_are_refused(text: str, sentence: str, tmp_path: Path) -> None:
    (tmp_path / "task.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(SourceError) as refused:
        read_task_name(tmp_path / "task.yaml")
    assert sentence in str(refused.value)
    with pytest.raises(SourceError, match=r"cannot read .*missing\.yaml"):
        read_task_name(tmp_path / "missing.yaml")


def test_what_a_task_includes_counts(tmp_path: Path) -> None:
    write_task(tmp_path).rename(tmp_path / "base.yaml")
    (tmp_path / "own.yaml").write_text("include: base.yaml\ntask: own\n", encoding="utf-8")
    assert read_task_name(tmp_path / "own.yaml") == "own"
    (tmp_path / "own.yaml").write_text("include: base.yaml\ndataset_path: squad\n", encoding="utf-8")
    with pytest.raises(SourceError, match="would download"):
        read_task_name(tmp_path / "own.yaml")


def test_without_the_harness_one_sentence_says_how_to_install_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    done = CliRunner().invoke(cli, ["evaluate", "any", "--lm-eval", str(write_task(tmp_path))])
    assert isinstance(done.exception, ModelError)
    assert str(done.exception) == "--lm-eval needs lm-evaluation-harness; pip install 'fedtune[lm-eval]'"
    done = CliRunner().invoke(cli, ["evaluate", "any", "--lm-eval", "a.yaml", "--split", "test"])
    assert done.exit_code == 2
    assert "--lm-eval reads the data that its file names" in done.output
    done = CliRunner().invoke(cli, ["evaluate", "any", "--lm-eval", "a.yaml", "--device", "cpu"])
    assert done.exit_code == 2
    assert "--lm-eval computes on the CPU; remove --device" in done.output


@pytest.mark.filterwarnings("ignore")
def test_a_run_is_evaluated_as_by_hand(home: Path, tmp_path: Path) -> None:
    """The accuracy of the likelier of two continuations, from the logits of each whole text."""
    pytest.importorskip("lm_eval")
    recipe = task_recipe("text-generation", tmp_path, "federation.rounds=1")
    ended = execute(recipe, run="run-1")
    context = get_run_context(recipe.model_dump_json())
    set_model_state(context.model, state(ended))
    rows = [
        {"question": f"red cat runs n{row}", "choices": ["sits", "runs"], "answer": row // 3 % 2} for row in range(30)
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    task = write_task(tmp_path)
    task.write_text(task.read_text().replace("process_docs: !function missing.nothing\n", ""), encoding="utf-8")
    right = 0
    for row in rows:
        ids = context.reader(row["question"])["input_ids"]
        with torch.no_grad():
            logits = context.model.eval()(input_ids=torch.tensor([ids])).logits[0, -1]
        sits, runs = (float(logits[context.reader.convert_tokens_to_ids(word)]) for word in ("sits", "runs"))
        right += int(runs > sits) == row["answer"]
    done = CliRunner().invoke(cli, ["evaluate", "run-1", "--lm-eval", str(task), "--json"], catch_exceptions=False)
    found = json.loads(done.stdout)
    assert found["target"] == "run-1, round 1"
    assert found["lm_eval"]["colours"]["acc,none"] == pytest.approx(right / 30)
    assert 0 < right < 30
