"""Models whose tokens differ, merged under a rule that says whose tokens the result has."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedtune.errors import ModelError, RecipeError
from fedtune.models.transformers_logging import silence_transformers
from fedtune.offline_merge import MergeConfig, prepare_merge, write_merged_model
from fedtune.offline_merge.chat_templates import CHAT_TEMPLATES
from fedtune.offline_merge.vocabularies import compare_vocabularies, join_tokenizers, read_vocabulary
from tests.fusion_models import save_tokenizer, tensors, words
from tests.tiny import VOCABULARY, llama

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def three(folder: Path) -> list[Path]:
    """A base of 40 words; one model with a further token, another with that and one of its own, both in other order."""
    folders = [folder / name for name in ("base", "one", "two")]
    extra: tuple[tuple[str, ...], ...] = ((), ("<call>",), ("<think>", "<call>"))
    for seed, (path, added) in enumerate(zip(folders, extra, strict=True)):
        with silence_transformers():
            llama(seed, vocab_size=VOCABULARY + len(added)).save_pretrained(path)
        save_tokenizer(path, words(), added)
    return folders


def merged(folders: list[Path], method: str = "linear", base: Path | None = None, **rule: Any) -> Path:
    value = {
        "merge_method": method,
        "models": [str(folder) for folder in folders],
        "base_model": None if base is None else str(base),
        "tokenizer": rule,
    }
    out = folders[0].parent / "out"
    write_merged_model(prepare_merge(MergeConfig.model_validate(value)), out, "a card")
    return out


def rows(folder: Path, token: str, name: str = EMBEDDING) -> Tensor:
    known = read_vocabulary(folder)
    assert known is not None
    return tensors(folder)[name][known[token]]


@pytest.mark.parametrize("name", [EMBEDDING, HEAD])
def test_a_union_holds_every_token_with_the_mean_of_its_owners(tmp_path: Path, name: str) -> None:
    base, one, two = three(tmp_path)
    out = merged([base, one, two], source="union")
    assert tensors(out)[name].shape[0] == VOCABULARY + 2
    common = (rows(base, "word7", name) + rows(one, "word7", name) + rows(two, "word7", name)) / 3
    torch.testing.assert_close(rows(out, "word7", name), common)
    # The only owner's row stands in for those that lack it; the mean of two owners for the third.
    torch.testing.assert_close(rows(out, "<think>", name), rows(two, "<think>", name))
    both = (rows(one, "<call>", name) + rows(two, "<call>", name)) / 2
    torch.testing.assert_close(rows(out, "<call>", name), both)


def test_a_union_loads_and_reads_the_new_tokens(tmp_path: Path) -> None:
    out = merged(three(tmp_path), source="union")
    with silence_transformers():
        model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    ids = tokenizer("word3 <think> word5 <call>")["input_ids"]
    assert ids == [3, read_vocabulary(out)["<think>"], 5, read_vocabulary(out)["<call>"]]  # type: ignore[index]
    assert model.config.vocab_size == VOCABULARY + 2
    assert str(tokenizer.decode(ids, skip_special_tokens=True)).split() == ["word3", "word5"]
    model(torch.tensor([ids]))


def test_a_union_merges_what_models_differ_from_the_base(tmp_path: Path) -> None:
    base, one, two = three(tmp_path)
    out = merged([one, two], "task_arithmetic", base, source="union")
    delta = rows(one, "word7") + rows(two, "word7") - 2 * rows(base, "word7")
    torch.testing.assert_close(rows(out, "word7"), rows(base, "word7") + delta)


def test_a_token_the_base_lacks_is_held_to_the_mean_of_its_owners(tmp_path: Path) -> None:
    base, one, two = three(tmp_path)
    out = merged([one, two], "task_arithmetic", base, source="union")
    mean = (rows(one, "<call>") + rows(two, "<call>")) / 2
    torch.testing.assert_close(rows(out, "<call>"), mean)  # deltas to the mean cancel
    torch.testing.assert_close(rows(out, "<think>"), rows(two, "<think>"))


def test_the_bases_tokens_drop_what_others_added(tmp_path: Path) -> None:
    base, one, two = three(tmp_path)
    out = merged([one, two], "task_arithmetic", base, source="base")
    assert tensors(out)[EMBEDDING].shape[0] == VOCABULARY
    assert read_vocabulary(out) == read_vocabulary(base)


def test_a_models_tokens_keep_its_order(tmp_path: Path) -> None:
    base, one, two = three(tmp_path)
    out = merged([base, one, two], source=str(two))
    assert read_vocabulary(out) == read_vocabulary(two)
    both = (rows(one, "<call>") + rows(two, "<call>")) / 2
    torch.testing.assert_close(rows(out, "<call>"), both)
    torch.testing.assert_close(rows(out, "<think>"), rows(two, "<think>"))


def test_rows_can_be_taken_from_elsewhere_or_be_zero(tmp_path: Path) -> None:
    base, one, two = three(tmp_path)
    tokens = {
        "<think>": {"source": {"kind": "zero"}},
        "<call>": {"source": str(one), "force": True},
        "word9": {"source": {"kind": "model_token", "model": str(base), "token": "word8"}, "force": True},
    }
    out = merged([base, one, two], source="union", tokens=tokens)
    torch.testing.assert_close(rows(out, "<think>"), rows(two, "<think>") / 3)
    assert torch.equal(rows(out, "<call>"), rows(one, "<call>"))
    assert torch.equal(rows(out, "word9"), rows(base, "word8"))


@pytest.mark.parametrize("name", [EMBEDDING, HEAD])
def test_rows_are_rounded_up_to_a_multiple_with_the_mean_row(tmp_path: Path, name: str) -> None:
    folders = three(tmp_path)
    found = tensors(merged(folders, source="union", pad_to_multiple_of=16))[name]
    assert found.shape[0] == 48
    means = [tensors(folder)[name].mean(0) for folder in folders]
    torch.testing.assert_close(found[VOCABULARY + 2 :], torch.stack(means).mean(0).expand(6, -1))


def test_a_token_without_a_row_in_any_model_has_the_mean_row(tmp_path: Path) -> None:
    """A tokenizer that grew without its model."""
    base, one, _ = three(tmp_path)
    for folder in (base, one):
        with silence_transformers():
            llama(0 if folder == base else 1).save_pretrained(folder)
    save_tokenizer(one, words(), ("<late>",))
    out = merged([base, one], source="union")
    mean = (tensors(base)[EMBEDDING].mean(0) + tensors(one)[EMBEDDING].mean(0)) / 2
    torch.testing.assert_close(rows(out, "<late>"), mean)


def test_rows_behind_the_tokens_are_not_taken_for_tokens(tmp_path: Path) -> None:
    base, one, two = three(tmp_path)
    with silence_transformers():
        llama(3, vocab_size=VOCABULARY + 5).save_pretrained(base)
    save_tokenizer(base, words())
    out = merged([base, one, two], source="union")
    assert tensors(out)[EMBEDDING].shape[0] == VOCABULARY + 5
    torch.testing.assert_close(rows(out, "<think>"), rows(two, "<think>"))


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"source": "elsewhere"}, "the tokenizer rule names 'elsewhere', which is none of the models"),
        (
            {"source": "union", "tokens": {"<no>": {"source": {"kind": "zero"}}}},
            "has rows for '<no>', which the result",
        ),
    ],
)
def test_a_rule_that_names_nothing_is_refused(tmp_path: Path, rule: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        merged(three(tmp_path), **rule)


def test_differences_are_counted() -> None:
    assert compare_vocabularies({"a": 0, "b": 1, "c": 2}, {"a": 0, "b": 2, "d": 1, "e": 3}) == (1, 2, 1)


def test_words_of_a_model_join_the_words_with_the_merges_that_make_them(tmp_path: Path) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import BPE

    base = {"a": 0, "b": 1, "ab": 2, "c": 3}
    for name, more, merges in (("one", {}, [("a", "b")]), ("two", {"abc": 4, "cc": 5}, [("a", "b"), ("ab", "c")])):
        (tmp_path / name).mkdir()
        Tokenizer(BPE({**base, **more}, merges)).save(str(tmp_path / name / "tokenizer.json"))
    found = join_tokenizers([tmp_path / "one", tmp_path / "two"])
    assert found["model"]["vocab"] == {**base, "abc": 4, "cc": 5}
    import json

    joined = Tokenizer.from_str(json.dumps(found))
    assert joined.encode("abc").ids == [4]
    assert joined.encode("abb").ids == [2, 1]


def chatting(folder: Path, wanted: str) -> str:
    """The chat template of a merge of two models, one of which has a template of its own."""
    base, one, _ = three(folder)
    (one / "chat_template.jinja").write_text("{{ messages[0].content }}")
    value = {"merge_method": "linear", "models": [str(base), str(base)], "chat_template": wanted}
    if wanted == "auto":
        value["models"] = [str(one), str(one)]
    write_merged_model(prepare_merge(MergeConfig.model_validate(value)), folder / "out", "a card")
    return (folder / "out" / "chat_template.jinja").read_text()


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        ("auto", "{{ messages[0].content }}"),
        ("chatml", CHAT_TEMPLATES["chatml"]),
        ("{{ messages[-1].content }}", "{{ messages[-1].content }}"),
    ],
)
def test_a_merge_has_the_chat_template_that_was_asked_for(tmp_path: Path, wanted: str, found: str) -> None:
    assert chatting(tmp_path, wanted) == found
    template = AutoTokenizer.from_pretrained(tmp_path / "out").chat_template
    assert template == found


def test_a_chat_template_nobody_knows_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    base, *_ = three(tmp_path)
    value = {"merge_method": "linear", "models": [str(base), str(base)]}
    with pytest.raises(RecipeError, match="'chatlm' is none of auto, chatml, llama3, mistral, alpaca, exaone, nor a"):
        prepare_merge(MergeConfig.model_validate({**value, "chat_template": "chatlm"}))
    with pytest.raises(RecipeError, match="auto finds none"):
        prepare_merge(MergeConfig.model_validate({**value, "chat_template": "auto"}))
