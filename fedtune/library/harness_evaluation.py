"""A task of lm-evaluation-harness on the model of a run or of a folder. The harness is an optional package."""

import warnings
from pathlib import Path
from typing import Any, NamedTuple

from fedtune.errors import ModelError, SourceError
from fedtune.library.harness_tasks import read_task_name
from fedtune.untrusted import clean_text

__all__ = ["HarnessResult", "run_harness_task"]


class HarnessResult(NamedTuple):
    """What was evaluated, and the metrics of each task by name as the harness gives them."""

    target: str
    metrics: dict[str, dict[str, Any]]


def run_harness_task(
    target: str, task_file: Path, round_number: int | None, store: str | None, batch_size: int = 8
) -> HarnessResult:
    """Run the task of a local file on a run, a checkpoint or a folder with a model or a PEFT adapter."""
    name = read_task_name(task_file)
    lm_eval = _import_harness()
    called, model, tokenizer = _load(target, round_number, store)
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        evaluated = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, device="cpu")
        try:
            found = lm_eval.simple_evaluate(
                model=evaluated,
                tasks=[name],
                task_manager=TaskManager(include_path=str(task_file.absolute().parent), include_defaults=False),
                bootstrap_iters=0,
                log_samples=False,
            )
        except Exception as error:  # a task may name any column, split or function
            reason = clean_text(f"{type(error).__name__}: {error}")
            raise SourceError(f"lm-eval cannot run {task_file} ({reason}); mend the task") from error
    return HarnessResult(called, {task: dict(metrics) for task, metrics in found["results"].items()})


def _import_harness() -> Any:
    try:
        import lm_eval
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "lm_eval":
            raise ModelError(
                f"lm-eval needs {error.name}, which is not installed; pip install 'fedtune[lm-eval]'"
            ) from error
        raise ModelError("--lm-eval needs lm-evaluation-harness; pip install 'fedtune[lm-eval]'") from error
    return lm_eval


def _load(target: str, round_number: int | None, store: str | None) -> tuple[str, Any, Any]:
    """The name of the target, its model and its tokenizer."""
    folder = Path(target)
    if folder.is_dir():
        if round_number is not None:
            raise SourceError(f"{target} is a folder, which has no rounds; remove --round")
        return target, *_load_folder(folder)
    from fedtune import tasks
    from fedtune.library.cached_export import load_checkpoint_target
    from fedtune.library.exported_run import load_run_model

    found = load_checkpoint_target(target, round_number, store)
    task = tasks.get_task(found.recipe.task)
    if task.auto_class != "AutoModelForCausalLM":
        raise ModelError(f"lm-eval evaluates language models, but {found.run} trains {task.name}")
    model = load_run_model(target, round_number, store)
    return f"{found.run}, round {found.round}", model, task.load_reader(found.recipe)


def _load_folder(folder: Path) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        if (folder / "adapter_config.json").exists():
            from peft import AutoPeftModelForCausalLM

            model = AutoPeftModelForCausalLM.from_pretrained(folder).merge_and_unload()
        else:
            model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
        return model.eval(), AutoTokenizer.from_pretrained(_find_tokenizer(folder, model))
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise SourceError(f"{folder} holds no language model that transformers loads ({reason})") from error


def _find_tokenizer(folder: Path, model: Any) -> str:
    """The folder itself, or that of an adapter's base."""
    own = any((folder / name).exists() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model"))
    return str(folder) if own else str(model.config.name_or_path)
