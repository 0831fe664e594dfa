"""Samples of the global model: stored with their round, the same after a kill, shown on a terminal that they cannot
harm.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

import fedtune
from fedtune import tasks
from fedtune.cli.main import cli
from fedtune.errors import FedtuneError, ModelError, RecipeError
from fedtune.export import export_model
from fedtune.server.events import RoundEnded, emit_event
from fedtune.server.recipe_check import build_run_context
from fedtune.tracking import SampleRecord, Store
from fedtune.tracking.sample_text import format_sample, format_samples
from fedtune.training import clear_run_context
from tests.federations import execute
from tests.store_examples import a_round, start
from tests.task_cases import task_recipe
from tests.test_export import state

ASK = "evaluation={prompts: [n1 red, [{role: user, content: n2}]], generation: {max_new_tokens: 5}}"


def sampled(rounds: list[Any]) -> dict[int, list[tuple[str, bool]]]:
    return {record.number: [(one.text, one.ended) for one in record.samples] for record in rounds}


def test_samples_are_those_of_the_exported_model(home: Path, tmp_path: Path) -> None:
    """A plain text is a message of the user where the data are conversations."""
    recipe = task_recipe("text-generation, messages", tmp_path, ASK, "federation.rounds=2", "train.techniques=full")
    ended = execute(recipe)
    found = sampled(ended.rounds)
    assert set(found) == {0, 1, 2}
    assert found[0] != found[2]
    export_model(recipe, state(ended), tmp_path / "out", None, "card\n")
    plain: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    tokenizer = tasks.load_reader(recipe)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    for text, (written, stopped) in zip(("n1 red", "n2"), found[2], strict=True):
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )["input_ids"]
        out = plain.generate(input_ids=ids, max_new_tokens=5, do_sample=False, eos_token_id=[end, 3], pad_token_id=0)[
            0, ids.shape[1] :
        ].tolist()
        assert stopped == (out[-1] in (end, 3))
        assert written == tokenizer.decode(out, skip_special_tokens=True)
    assert [one.prompt for one in ended.rounds[2].samples] == [
        "n1 red",
        '[{"role": "user", "content": "n2"}]',
    ]


def test_an_encoder_decoder_writes_what_its_export_writes(home: Path, tmp_path: Path) -> None:
    ask = "evaluation={prompts: [red cat runs n1, blue dog], generation: {max_new_tokens: 5}}"
    recipe = task_recipe("text2text-generation", tmp_path, ask, "federation.rounds=2")
    ended = execute(recipe)
    export_model(recipe, state(ended), tmp_path / "out", None, "card\n")
    plain: Any = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out").eval()
    tokenizer = tasks.load_reader(recipe)
    for text, (written, _) in zip(("red cat runs n1", "blue dog"), sampled(ended.rounds)[2], strict=True):
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        out = plain.generate(input_ids=ids, max_new_tokens=5, do_sample=False)
        assert written == tokenizer.decode(out[0], skip_special_tokens=True)


def test_sampled_text_is_the_same_after_a_resume_and_in_evaluate(home: Path, tmp_path: Path) -> None:
    ask = "evaluation={prompts: [red, blue cat], generation: {max_new_tokens: 8, temperature: 1.5, top_p: 0.95}}"
    recipe = task_recipe("text-generation", tmp_path, ask, "federation.rounds=3")
    whole = sampled(execute(recipe, run="whole").rounds)

    def stop(event: Any) -> None:
        if isinstance(event, RoundEnded) and event.record.number == 1:
            raise fedtune.StopRun

    stopped = fedtune.simulate(recipe, callbacks=[stop], workers=1)
    assert [record.number for record in stopped.rounds] == [0, 1]
    resumed = fedtune.simulate(stopped, workers=1)
    assert sampled(resumed.rounds) == whole
    done = CliRunner().invoke(cli, ["evaluate", resumed.id, "--json"], catch_exceptions=False)
    assert [(one["text"], one["ended"]) for one in json.loads(done.output)["samples"]] == whole[3]
    rows = resumed.samples.to_pylist()
    assert len(rows) == 4 * 2
    assert rows[-1] == {
        "run_id": resumed.id,
        "round": 3,
        "number": 2,
        "prompt": "blue cat",
        "text": whole[3][1][0],
        "ended": whole[3][1][1],
    }


def test_prompts_change_no_bit_of_the_run(home: Path, tmp_path: Path) -> None:
    ask = "evaluation={prompts: [red], generation: {temperature: 1.0, max_new_tokens: 5}}"
    with_prompts = execute(task_recipe("preference", tmp_path, "federation.rounds=2", ask), run="with")
    clear_run_context()
    without = execute(task_recipe("preference", tmp_path, "federation.rounds=2"), run="without")
    assert with_prompts.hashes == without.hashes
    assert [record.metrics for record in with_prompts.rounds] == [record.metrics for record in without.rounds]
    assert all(len(record.samples) == 1 for record in with_prompts.rounds)


def test_only_scored_rounds_have_samples(home: Path, tmp_path: Path) -> None:
    ask = "evaluation={prompts: [red], every_n_rounds: 2, generation: {max_new_tokens: 5}}"
    found = sampled(execute(task_recipe("text-generation", tmp_path, "federation.rounds=3", ask)).rounds)
    assert {number for number, samples in found.items() if samples} == {0, 2, 3}


@pytest.mark.parametrize(
    ("case", "change", "sentence"),
    [
        ("fill-mask", "{prompts: [red]}", "evaluation.prompts: fill-mask generates no text; leave the prompts out"),
        ("image-classification", "{prompts: [red]}", "image-classification generates no text"),
        (
            "text2text-generation",
            "{prompts: [red, [{role: user, content: a}]]}",
            "text2text-generation reads texts, not messages; write prompt 2 as text",
        ),
        (
            "text-generation",
            "{prompts: [red], generation: {max_new_tokens: 31}}",
            "prompt 1 has 2 tokens and evaluation.generation.max_new_tokens is 31, but the model reads at most 32",
        ),
        (
            "text-generation",
            "{prompts: [[{role: user, content: a}]]}",
            "the tokenizer has no chat template",
        ),
        ("text-generation", "{metrics: [exact_match]}", "compare replies, but the data are read as texts"),
    ],
)
def test_prompts_that_cannot_be_answered_are_refused(
    case: str, change: str, sentence: str, home: Path, tmp_path: Path
) -> None:
    clear_run_context()
    with pytest.raises((ModelError, RecipeError)) as refused:
        build_run_context(task_recipe(case, tmp_path, f"evaluation={change}"))
    assert sentence in str(refused.value)


def test_devices_that_keep_tensors_leave_no_model_to_ask(tmp_path: Path) -> None:
    with pytest.raises(FedtuneError, match="leaves the server no whole model to generate text with"):
        task_recipe(
            "image-classification",
            tmp_path,
            "model.source=sample:mobilenet-v2",
            "train.techniques=[head-only, {batch-norm-statistics: {local: true}}]",
            "evaluation={prompts: [red], local_holdout: 0.2}",
        )


HOSTILE = {
    "escape": "\x1b[2J\x1b]0;owned\x07 red",
    "override": "abc\u202egnp.exe",
    "lines": "one\ntwo\r\rthree\x85four",
    "nul": "a\0b",
    "surrogate": "a\ud800b",
    "markup": "[red]bold[/red] [link=http://x]y[/link]",
    "large": "x" * 10_000_000,
    "braces": '[{"role": "user"',
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_text_is_stored_and_shown_as_harmless_lines(name: str, home: Path) -> None:
    text = HOSTILE[name]
    sample = SampleRecord(number=1, prompt=text, text=text, ended=False)
    with Store.open() as store:
        start(store)
        store.commit_round("film-1a2b", a_round(0, samples=(sample,)))
        [found] = store.rounds("film-1a2b")[0].samples
    expected = text.replace("\0", "\ufffd").replace("\ud800", "\ufffd")
    assert found == replace(sample, prompt=expected, text=expected)
    line = format_sample(found)
    assert line.isprintable()
    assert len(line) < 320
    shown = CliRunner().invoke(cli, ["runs", "show", "film-1a2b"], catch_exceptions=False).output
    assert "samples of round 0" in shown
    assert all(character.isprintable() or character == "\n" for character in shown)
    assert len(shown) < 5000
    document = CliRunner().invoke(cli, ["runs", "show", "film-1a2b", "--json"], catch_exceptions=False).output
    assert json.loads(document)["rounds"][0]["samples"] == [
        {"number": 1, "prompt": expected, "text": expected, "ended": False}
    ]


def test_many_samples_are_counted() -> None:
    samples = [SampleRecord(number=n, prompt="p" * 100, text="t", ended=n % 2 == 0) for n in range(1, 12)]
    lines = format_samples(samples)
    assert len(lines) == 9
    assert lines[0] == f"  …{'p' * 59} -> t…"
    assert lines[1].endswith("-> t")
    assert lines[-1] == "  and 3 more samples: --json shows all"


def test_rounds_print_their_samples(capsys: pytest.CaptureFixture[str]) -> None:
    sample = SampleRecord(number=1, prompt="red cat", text="runs \x1b[2J", ended=True)
    emit_event(RoundEnded(a_round(1, samples=(sample,))))
    assert capsys.readouterr().out.endswith("\n  red cat -> runs \\x1b[2J\n")
