"""Exact match and F1 of generated answers: as SQuAD's own script computes them, over what the model writes."""

import re
import string
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from fedtune.errors import ModelError, RecipeError
from fedtune.server.recipe_check import build_run_context
from fedtune.training import clear_run_context, evaluate_model, set_model_state
from fedtune.training.answer_metrics import compare_answers
from tests.federations import execute
from tests.task_cases import task_recipe
from tests.test_export import state
from tests.test_generation import greedy
from tests.test_task_cases import by_name

PAIRS = [
    ("The cat.", "a cat"),
    ("black, cat", "the BLACK dog"),
    ("", "cat"),
    ("the", "an"),
    ("one two two", "two two three"),
    ("naïve café", "naive cafe"),
    ("42", "42."),
]


def normalise(text: str) -> list[str]:
    """SQuAD's rule, written again: lower case, no punctuation, no articles."""
    bare = "".join(sign for sign in text.lower() if sign not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", bare).split()


def slow_f1(written: str, wanted: str) -> float:
    ours, theirs = normalise(written), normalise(wanted)
    if not ours or not theirs:
        return float(ours == theirs)
    same = sum((Counter(ours) & Counter(theirs)).values())
    return 2 * same / (len(ours) + len(theirs))


def test_answers_are_compared_as_squad_does() -> None:
    found = compare_answers(["exact_match", "f1"], PAIRS)
    assert found["exact_match"] == pytest.approx(sum(normalise(a) == normalise(b) for a, b in PAIRS) / len(PAIRS))
    assert found["f1"] == pytest.approx(sum(slow_f1(*pair) for pair in PAIRS) / len(PAIRS), rel=1e-6)
    assert compare_answers(["f1"], PAIRS[:1]) == {"f1": 1.0}


METRICS = "evaluation={metrics: [exact_match, f1], generation: {max_new_tokens: 4}, main_metric: exact_match}"


@pytest.mark.parametrize("batch", [1, 64])
def test_replies_are_those_that_the_model_writes(batch: int, home: Path, tmp_path: Path) -> None:
    """The last reply of each conversation, one by one and without a cache."""
    recipe = task_recipe(
        "text-generation, messages", tmp_path, METRICS, f"evaluation.batch_size={batch}", "federation.rounds=2"
    )
    ended = execute(recipe)
    found = {(one.split, one.name): one.value for one in ended.rounds[2].metrics if one.domain == "all"}
    context = build_run_context(recipe)
    set_model_state(context.model, state(ended))
    tokenizer: Any = context.reader
    pairs = []
    for messages in context.corpus.validation["messages"]:
        ids = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=True)["input_ids"]
        written = greedy(context.model, list(ids), 4, ends={3, tokenizer.convert_tokens_to_ids("<|im_end|>")})
        pairs.append((tokenizer.decode(written, skip_special_tokens=True), messages[-1]["content"]))
    assert found["validation", "exact_match"] == pytest.approx(
        sum(normalise(a) == normalise(b) for a, b in pairs) / len(pairs)
    )
    assert found["validation", "f1"] == pytest.approx(sum(slow_f1(*pair) for pair in pairs) / len(pairs), rel=1e-6)
    assert found["validation", "f1"] > 0
    clear_run_context()


def test_an_encoder_decoder_is_compared_with_and_without_rouge(home: Path, tmp_path: Path) -> None:
    found, trained = {}, None
    for rouge in ("true", "false"):
        clear_run_context()
        recipe = task_recipe(
            "text2text-generation",
            tmp_path,
            f"task={{text2text-generation: {{max_new_tokens: 6, rouge: {rouge}}}}}",
            "evaluation={metrics: [exact_match, f1], generation: {max_new_tokens: 6}}",
        )
        trained = trained or state(execute(recipe))
        context = build_run_context(recipe)
        set_model_state(context.model, trained)
        found[rouge] = by_name(evaluate_model(context.evaluated_model, context.validation))
    assert found["true"]["f1"] == found["false"]["f1"] > 0.3
    assert found["true"].keys() - found["false"].keys() == {"rouge-l", "rouge-1", "rouge-2"}


@pytest.mark.parametrize(
    ("case", "names", "sentence"),
    [
        ("text-classification", "exact_match", "exact_match compares generated answers, but text-classification has"),
        ("token-classification", "f1", "f1 is of classes or answers, which token-classification has none of"),
        ("text-generation, messages", "auc", "auc is of classes, which text-generation has none of"),
        ("text2text-generation", "exact-match", "there is no 'exact-match'; did you mean 'exact_match'?"),
    ],
)
def test_metrics_that_a_task_cannot_have_are_refused(case: str, names: str, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as refused:
        task_recipe(case, tmp_path, f"evaluation.metrics=[{names}]")
    assert sentence in str(refused.value)


def test_loss_on_all_has_no_answers(tmp_path: Path) -> None:
    with pytest.raises(
        RecipeError, match="f1 is of classes or answers, which text-generation has none of as it is set"
    ):
        task_recipe(
            "text-generation, messages",
            tmp_path,
            "task={text-generation: {chat_template: chatml, loss_on: all}}",
            "evaluation.metrics=[f1]",
        )


def test_answers_need_room(home: Path, tmp_path: Path) -> None:
    clear_run_context()
    recipe = task_recipe("text-generation, messages", tmp_path, "evaluation.metrics=[f1]")
    with pytest.raises(ModelError, match=r"an example has \d+ tokens and evaluation.generation.max_new_tokens is 64"):
        build_run_context(recipe)


def test_clients_generate_no_answers(home: Path, tmp_path: Path) -> None:
    recipe = task_recipe(
        "text-generation, messages", tmp_path, METRICS, "evaluation.local_holdout=0.2", "federation.rounds=1"
    )
    ended = execute(recipe)
    assert {one.name for one in ended.rounds[1].client_scores} == {"loss", "accuracy"}
    clear_run_context()
