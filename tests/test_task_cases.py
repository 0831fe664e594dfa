"""Each way to set a task: it learns, its scores do not depend on the batch, micro-batches add up, it exports."""

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast

from fedtune import tasks
from fedtune.data import Table, Values
from fedtune.data.column import objects
from fedtune.data.encoded_words import encode_words
from fedtune.errors import DataError, ModelError, RecipeError
from fedtune.export import export_model
from fedtune.recipe.schema import Unit
from fedtune.training import (
    EvaluatedModel,
    Metric,
    RunContext,
    clear_run_context,
    compute_step_loss,
    evaluate_model,
    get_model_state,
    get_run_context,
    set_model_state,
)
from fedtune.training.micro_batches import can_split_batch, compute_loss_weights
from tests.federations import execute
from tests.task_cases import CASES, task_recipe
from tests.test_export import state

each_case = pytest.mark.parametrize("case", CASES)


def context(case: str, folder: Path, *overrides: str) -> RunContext:
    clear_run_context()
    shop = get_run_context(task_recipe(case, folder, *overrides).model_dump_json())
    clear_run_context()
    return shop


def by_name(scores: list[Metric]) -> dict[str, float]:
    return {one.name: one.value for one in scores if one.domain == "all"}


@each_case
def test_a_federation_learns_it(case: str, home: Path, tmp_path: Path) -> None:
    """The loss on validation examples falls, and the main metric moves the right way."""
    # A random BERT needs this many steps at this rate to learn one class from one word, whatever the seed.
    slowly = ("train.lr=0.005", "train.local_steps=25") if case.startswith("text-classification") else ()
    recipe = task_recipe(case, tmp_path, *slowly)
    ended = execute(recipe)
    assert ended.run.status == "completed"
    found = [{one.name: one.value for one in record.metrics if one.split == "validation"} for record in ended.rounds]
    assert found[-1]["loss"] < 0.8 * found[0]["loss"]
    task = tasks.get_task(recipe.task)
    name = "accuracy" if "several" in case else task.main_metric  # a random model's f1 is high: it says yes to half
    before, after, rises = found[0][name], found[-1][name], name != "perplexity"
    assert math.isnan(before) or (after > before if rises else after < before)


@each_case
def test_scores_do_not_depend_on_the_batch_size(case: str, home: Path, tmp_path: Path) -> None:
    shop = context(case, tmp_path)
    one, other = (
        by_name(evaluate_model(EvaluatedModel(shop.model, shop.task, size), shop.validation)) for size in (1, 7)
    )
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert other[name] == pytest.approx(value, rel=1e-4, abs=1e-6, nan_ok=True), name


@each_case
def test_a_score_has_the_loss_that_training_follows(case: str, home: Path, tmp_path: Path) -> None:
    """The summed losses of the scores over their predictions are the loss of the batch."""
    shop = context(case, tmp_path)
    batch = shop.validation.make_batch(range(6))
    shop.model.eval()
    shop.model.requires_grad_(False)
    scores = shop.task.score_batch(shop.model, batch, None)
    if not shop.task.can_split_batch:
        sums = tasks.ScoreSums(outputs=[score.output for score in scores])
        found = shop.task.compute_metrics(sums)["loss"]
        assert found == pytest.approx(float(shop.task.compute_loss(shop.model, batch)), rel=1e-5)
        return
    mean = sum(score.loss for score in scores) / sum(score.predictions for score in scores)
    if case == "fill-mask":  # hides other tokens each time
        losses = [float(shop.task.compute_loss(shop.model, batch).detach()) for _ in range(200)]
        assert mean == pytest.approx(sum(losses) / 200, rel=0.1)
    else:
        assert mean == pytest.approx(float(shop.task.compute_loss(shop.model, batch).detach()), rel=1e-5)


@each_case
def test_gradients_of_micro_batches_add_up(case: str, home: Path, tmp_path: Path) -> None:
    shop = context(case, tmp_path)
    shop.model.eval()
    for layer in shop.model.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0

    def gradients(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        shop.model.zero_grad()
        torch.manual_seed(1)
        for part, share in zip(parts, compute_loss_weights(shop.task, parts), strict=True):
            (share * compute_step_loss(shop.task, shop.model, part)).backward()
        return {name: one.grad.clone() for name, one in shop.model.named_parameters() if one.grad is not None}

    if not shop.task.can_split_batch:
        assert not can_split_batch(shop.task, shop.model)
        return
    rows = [[0, 1, 2], [3, 4], [5]]
    whole = gradients([shop.train.make_batch([row for part in rows for row in part])])
    parts = gradients([shop.train.make_batch(part) for part in rows])
    assert any(one.any() for one in whole.values())
    for name, one in whole.items():
        torch.testing.assert_close(parts[name], one, rtol=1e-4, atol=1e-6)


@each_case
def test_the_result_loads_in_plain_transformers(case: str, home: Path, tmp_path: Path) -> None:
    recipe = task_recipe(case, tmp_path, "federation.rounds=1")
    tensors = state(execute(recipe))
    shop = get_run_context(recipe.model_dump_json())
    set_model_state(shop.model, tensors)
    batch = shop.test.make_batch(range(5))
    unread = ("mask_token",) if case.startswith("text2text") else ("labels", "mask_token")
    inputs = {name: one for name, one in batch.items() if name not in unread}
    with torch.no_grad():
        expected = _first_output(shop.model.eval()(**inputs))
    export_model(recipe, tensors, tmp_path / "out", None, "card\n")
    loaded = getattr(transformers, shop.task.auto_class).from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(_first_output(loaded(**inputs)).detach(), expected, rtol=0, atol=1e-5)
    if shop.corpus.label_names:
        assert tuple(loaded.config.id2label.values()) == shop.corpus.label_names
    if shop.task.reads_text:
        assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out")("red cat")["input_ids"]


def _first_output(found: Any) -> Tensor:
    """Logits, or the hidden states of a model without a head."""
    output: Tensor = found.logits if hasattr(found, "logits") else found.last_hidden_state
    return output


def test_preferences_are_compared_with_the_model_that_the_run_starts_from(home: Path, tmp_path: Path) -> None:
    """Equation 7 of the DPO paper, token by token in float64, before and after the weights have moved."""
    shop = context("preference", tmp_path)
    batch = shop.train.make_batch(range(3))

    def slow(row: int) -> float:
        length = int(batch["attention_mask"][row].sum())
        ids, labels = batch["input_ids"][row, :length], batch["labels"][row, :length]
        with torch.no_grad():
            scores = shop.model.eval()(input_ids=ids[None]).logits[0].double().log_softmax(-1)
        return sum(float(scores[at - 1, ids[at]]) for at in range(1, length) if labels[at] != -100)

    start = [slow(row) for row in range(6)]
    torch.testing.assert_close(batch["references"], torch.tensor(start), rtol=1e-5, atol=1e-5)
    assert float(shop.task.compute_loss(shop.model, batch).detach()) == pytest.approx(math.log(2), rel=1e-5)
    with torch.no_grad():
        for parameter in shop.model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    now = [slow(row) for row in range(6)]
    margins = [0.5 * ((now[row] - start[row]) - (now[row + 3] - start[row + 3])) for row in range(3)]
    wanted = sum(math.log1p(math.exp(-margin)) for margin in margins) / 3
    assert float(shop.task.compute_loss(shop.model, batch).detach()) == pytest.approx(wanted, rel=1e-4)
    scores = shop.task.score_batch(shop.model, batch, None)
    assert [score.output for score in scores] == pytest.approx(margins, rel=1e-3)
    with pytest.raises(RuntimeError, match="encoded before the model is trained"):
        shop.encode_source(f"jsonl:{tmp_path}/data.jsonl", {})


def test_a_prompt_loses_its_beginning_where_the_text_is_too_long(home: Path, tmp_path: Path) -> None:
    recipe = task_recipe("preference", tmp_path, "train.max_length=6")
    batch = tasks.encode_examples(tasks.load_data(recipe).train, recipe, tasks.load_reader(recipe)).make_batch([0])
    names = tasks.load_reader(recipe).convert_ids_to_tokens(batch["input_ids"][0].tolist())
    assert names[2:] == ["runs", "to", "rome", "[SEP]"]
    assert batch["labels"][0].tolist()[:2] == [-100, -100]
    assert "references" not in batch


@pytest.mark.parametrize(
    ("change", "length", "sentence"),
    [
        ({"rejected": "runs to rome"}, 16, "row 1 has the same text chosen and rejected"),
        ({"chosen": "runs " * 20}, 16, "row 1 has a completion of 21 tokens, which leaves no token of its prompt"),
    ],
)
def test_pairs_that_say_nothing_are_refused(
    change: dict[str, str], length: int, sentence: str, home: Path, tmp_path: Path
) -> None:
    recipe = task_recipe("preference", tmp_path, f"train.max_length={length}")
    row = {"prompt": "red cat", "chosen": "runs to rome", "rejected": "sits in oslo"} | change
    rows = [row | {"prompt": f"red n{number}"} for number in range(60)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    with pytest.raises(DataError, match=sentence):
        tasks.encode_examples(tasks.load_data(recipe).train, recipe, tasks.load_reader(recipe))


def test_a_pair_is_told_apart_by_its_segments(home: Path, tmp_path: Path) -> None:
    shop = context("text-classification, pair", tmp_path)
    batch = shop.train.make_batch([0, 1])
    tokenizer = tasks.load_reader(shop.recipe)
    texts, pairs = shop.corpus.train["text"][:2], shop.corpus.train["text_pair"][:2]
    plain = tokenizer(texts, pairs, padding=True, return_tensors="pt")
    for name in ("input_ids", "token_type_ids", "attention_mask"):
        assert torch.equal(batch[name], plain[name])
    assert batch["token_type_ids"].any()


def test_several_labels_are_decisions_about_every_class(home: Path, tmp_path: Path) -> None:
    shop = context("text-classification, several", tmp_path)
    batch = shop.train.make_batch(range(4))
    names = shop.corpus.label_names
    sets = [{names[number] for number in row} for row in shop.corpus.train["labels"][:4]]
    assert [{name for name, on in zip(names, row, strict=True) if on} for row in batch["labels"].tolist()] == sets
    config: Any = shop.model.config
    assert config.problem_type == "multi_label_classification"
    assert shop.validation.make_batch([0])["labels"].shape == (1, len(names))


def test_words_written_between_commas_are_several_labels(home: Path, tmp_path: Path) -> None:
    recipe = task_recipe("text-classification, several", tmp_path)
    rows = [{"text": f"red n{row}", "label": "red, cat" if row % 2 else "blue|dog;cat"} for row in range(60)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    corpus = tasks.load_data(recipe)
    assert corpus.label_names == ("blue", "cat", "dog", "red")
    assert {tuple(row) for row in corpus.train["labels"]} <= {(1, 3), (0, 1, 2)}


def test_a_tag_sits_on_the_first_token_of_its_word(home: Path, tmp_path: Path) -> None:
    recipe = task_recipe("token-classification", tmp_path)
    rows = [{"words": ["bobann", "runs", f"n{row}"], "tags": ["B-PER", "O", "O"]} for row in range(60)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    tokenizer = json.loads((tmp_path / "model" / "tokenizer.json").read_text(encoding="utf-8"))
    tokenizer["model"]["vocab"]["##ann"] = len(tokenizer["model"]["vocab"])
    (tmp_path / "model" / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    examples = tasks.load_data(recipe)
    batch = tasks.encode_examples(examples.train, recipe, tasks.load_reader(recipe)).make_batch([0])
    names = [None if label == -100 else examples.label_names[label] for label in batch["labels"][0].tolist()]
    assert names == [None, "B-PER", None, "O", "O", None]  # [CLS] bob ##ann runs n0 [SEP]


def test_entities_are_counted_whole() -> None:
    """seqeval's own example: one of two entities is found, one is cut short."""
    task = tasks.get_task("token-classification")
    wanted = ["B-PER", "I-PER", "O", "B-LOC"]
    predicted = ["B-PER", "O", "O", "B-LOC"]
    sums = tasks.ScoreSums(4, 3, 1.0, [(predicted, wanted)])
    found = task.compute_metrics(sums)
    assert found == {"f1": 0.5, "precision": 0.5, "recall": 0.5, "accuracy": 0.75, "loss": 0.25}
    nothing = task.compute_metrics(tasks.ScoreSums(1, 1, 0.0, [(["O"], ["O"])]))
    assert math.isnan(nothing["f1"])


def test_written_texts_are_compared_with_the_targets(home: Path, tmp_path: Path) -> None:
    """rouge-l of a text with itself is 1; of two of three words in order, 2/3."""
    task = tasks.get_task("text2text-generation")
    found = task.compute_metrics(tasks.ScoreSums(4, 2, 4.0, [("a red cat", "a red cat"), ("a dog red", "a red dog")]))
    assert found["rouge-l"] == pytest.approx((1 + 2 / 3) / 2)
    assert found["rouge-1"] == 1.0
    assert found["perplexity"] == pytest.approx(math.e)
    shop = context("text2text-generation", tmp_path)
    scores = shop.task.score_batch(shop.model.eval(), shop.validation.make_batch(range(3)), shop.reader)
    assert [score.output[1] for score in scores] == shop.corpus.validation["target"][:3]
    assert by_name(evaluate_model(shop.evaluated_model, shop.validation)).keys() >= {"rouge-l", "rouge-1", "rouge-2"}


def test_an_exported_embedder_says_how_sentence_transformers_pools(home: Path, tmp_path: Path) -> None:
    """With sentence-transformers itself both poolings gave the very embeddings of training."""
    recipe = task_recipe("feature-extraction", tmp_path, "task={feature-extraction: {pooling: first}}")
    export_model(recipe, {}, tmp_path / "out", None, "card\n")
    modules = json.loads((tmp_path / "out" / "modules.json").read_text(encoding="utf-8"))
    assert [one["path"] for one in modules] == ["", "1_Pooling", "2_Normalize"]
    pooling = json.loads((tmp_path / "out" / "1_Pooling" / "config.json").read_text(encoding="utf-8"))
    told = {"word_embedding_dimension": 32, "pooling_mode_mean_tokens": False, "pooling_mode_cls_token": True}
    assert pooling == told
    longest = json.loads((tmp_path / "out" / "sentence_bert_config.json").read_text(encoding="utf-8"))
    assert longest == {"max_seq_length": 16}


def test_partners_are_ranked_among_all_that_are_scored() -> None:
    """The first text is nearest to its own partner; the second to the first one's, so that its own ranks second."""
    task = tasks.get_task("feature-extraction")
    east, north, between = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]), torch.tensor([0.8, 0.6])
    sums = tasks.ScoreSums(2, 0, 0.0, [(east, east, 1.0, (1, 5)), (between, north, 1.0, (2, 6))])
    found = task.compute_metrics(sums)
    assert found["accuracy"] == 0.5
    assert found["mrr"] == 0.75
    wanted = F.cross_entropy(torch.tensor([[20.0, 0.0], [16.0, 12.0]]), torch.tensor([0, 1]))
    assert found["loss"] == pytest.approx(float(wanted))


def test_pairs_that_share_a_text_are_no_wrong_answers_to_each_other() -> None:
    """Two questions with one answer: without their neighbours each pair is found for certain."""
    task = tasks.get_task("feature-extraction")
    model = SimpleNamespace(last_hidden_state=None)
    ids = torch.tensor([[4, 5, 0], [4, 6, 0], [4, 7, 8], [9, 9, 0], [9, 9, 0], [3, 3, 3]])
    states = F.one_hot(ids, 12).float()

    def run(input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        model.last_hidden_state = states
        return model

    batch = {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": torch.ones(3)}
    first, second = (F.normalize((states * (ids != 0)[..., None]).sum(1), dim=-1)).chunk(2)
    wanted = []
    for row, others in enumerate([[0, 2], [1, 2], [0, 1, 2]]):
        scores = torch.stack([20 * first[row] @ second[other] for other in others])
        wanted.append(float(scores.logsumexp(0) - 20 * first[row] @ second[row]))
    found = task.compute_loss(run, batch)  # type: ignore[arg-type]
    assert float(found) == pytest.approx(sum(wanted) / 3, rel=1e-6)
    assert math.isfinite(float(found))


@pytest.mark.parametrize("case", ["text-classification, several", "text-classification, number"])
def test_losses_on_real_numbers_have_gradients_in_bfloat16(case: str, home: Path, tmp_path: Path) -> None:
    shop = context(case, tmp_path, "model.dtype=bfloat16")
    loss = compute_step_loss(shop.task, shop.model.train(), shop.train.make_batch(range(3)))
    loss.backward()
    assert loss.dtype == torch.float32
    assert any(one.grad is not None and one.grad.any() for one in shop.model.parameters())


def test_the_loss_on_real_numbers_is_transformers_own(home: Path, tmp_path: Path) -> None:
    for case in ("text-classification, several", "text-classification, number"):
        (tmp_path / case).mkdir()
        shop = context(case, tmp_path / case)
        batch = shop.train.make_batch(range(5))
        with torch.no_grad():
            own = shop.task.compute_loss(shop.model.eval(), batch)
            assert float(own) == pytest.approx(float(shop.model(**batch).loss), rel=1e-6)


def test_numbered_labels_keep_the_order_of_their_numbers(home: Path, tmp_path: Path) -> None:
    recipe = task_recipe("text-classification, several", tmp_path)
    rows = [{"text": f"red n{row}", "label": [row % 12, 2]} for row in range(60)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    assert tasks.load_data(recipe).label_names == tuple(map(str, range(12)))


def test_words_have_the_tokens_that_they_have_in_running_text() -> None:
    """Byte-level tokenizers mark the space before a word, which a word on its own lacks."""
    core = Tokenizer(BPE(unk_token=None))
    core.pre_tokenizer = ByteLevel(add_prefix_space=False)
    core.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(vocab_size=300, special_tokens=["<pad>"], initial_alphabet=ByteLevel.alphabet())
    core.train_from_iterator(["ann runs to rome rome"] * 50, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>")
    words = ["ann", "runs", "to", "rome", "rome"]
    table = Table(
        {"words": Values(objects([words])), "tags": Values(objects([[1, 0, 0, 2, 3]]))},
    )
    batch = encode_words(table, tokenizer, 16).make_batch([0])
    assert batch["input_ids"][0].tolist() == tokenizer(" ".join(words))["input_ids"]
    assert batch["labels"][0].tolist() == [1, 0, 0, 2, 3]


def test_numbers_are_scored_by_correlation_and_squared_error() -> None:
    task = tasks.get_task(tasks_unit("regression"))
    wanted, predicted = torch.tensor([0.0, 1.0, 2.0, 4.0]), torch.tensor([0.5, 1.5, 2.5, 4.5])
    sums = tasks.ScoreSums()
    for score in task.score_logits(predicted[:, None], wanted):
        sums.add(score, keep_output=True)
    assert task.compute_metrics(sums) == pytest.approx({"pearson": 1.0, "spearman": 1.0, "mse": 0.25, "loss": 0.25})
    flat = tasks.ScoreSums(2, 0, 1.0, [(1.0, 0.0), (1.0, 2.0)])
    assert math.isnan(task.compute_metrics(flat)["pearson"])


def tasks_unit(problem: str) -> Unit:
    return Unit(name="text-classification", settings={"problem_type": problem})


def test_hidden_tokens_have_the_shares_of_the_paper(home: Path, tmp_path: Path) -> None:
    """15 % of the tokens; of them 80 % the mask token, 10 % random, 10 % unchanged; special tokens never."""
    from fedtune.tasks.fill_mask import hide_tokens

    torch.manual_seed(0)
    ids = torch.randint(100, 200, (200, 100))
    labels = ids.clone()
    labels[:, :2] = -100
    batch = {"input_ids": ids, "labels": labels, "mask_token": torch.full((200,), 4)}
    hidden = hide_tokens(batch, torch.full((200,), 15), 10_000, [None] * 200)
    chosen = hidden["labels"] != -100
    assert (chosen.sum(1) == 15).all()
    assert not chosen[:, :2].any()
    assert torch.equal(hidden["labels"][chosen], ids[chosen])
    assert torch.equal(hidden["input_ids"][~chosen], ids[~chosen])
    masked = float((hidden["input_ids"][chosen] == 4).float().mean())
    same = float((hidden["input_ids"][chosen] == ids[chosen]).float().mean())
    assert masked == pytest.approx(0.8, abs=0.03)
    assert same == pytest.approx(0.1, abs=0.03)
    assert "mask_token" not in hidden


@pytest.mark.parametrize(
    ("case", "row", "sentence"),
    [
        ("token-classification", {"words": ["a", "b"], "tags": ["O"]}, "row 1 has 2 words but 1 tags; give each word"),
        ("token-classification", {"words": ["a", " "], "tags": ["O", "O"]}, "row 1 has an empty word"),
        ("token-classification", {"words": "a b", "tags": ["O", "O"]}, "row 1 has no list of words"),
        ("token-classification", {"words": ["a"], "tags": [["O"]]}, "row 1 has a tag that is no name or number"),
        ("token-classification", {"words": ["a"], "tags": ["O"]}, "has only the tag 'O'; two or more are needed"),
        ("text-classification, number", {"text": "a", "label": "high"}, "row 1 has 'high' as a number to predict"),
        ("text-classification, number", {"text": "a", "label": "nan"}, "row 1 has 'nan' as a number to predict"),
        ("text-classification, several", {"text": "a", "label": 3}, "the label 3 is no list of classes"),
        ("text-classification, several", {"text": "a", "label": []}, "has no example with a label"),
        (
            "text-classification, pair",
            {"text": "a", "label": "x"},
            "has no column 'text_pair', which data.columns.",
        ),
    ],
)
def test_data_that_do_not_fit_are_refused(case: str, row: object, sentence: str, home: Path, tmp_path: Path) -> None:
    recipe = task_recipe(case, tmp_path)
    (tmp_path / "data.jsonl").write_text((json.dumps(row) + "\n") * 60, encoding="utf-8")
    with pytest.raises(DataError) as refused:
        tasks.load_data(recipe)
    assert sentence in str(refused.value)


def test_a_tokenizer_without_a_mask_token_is_refused(home: Path, tmp_path: Path) -> None:
    recipe = task_recipe("fill-mask", tmp_path)
    tokenizer = tasks.load_reader(recipe)
    tokenizer.mask_token = None
    with pytest.raises(ModelError, match="has no mask token, which fill-mask needs"):
        tasks.encode_examples(tasks.load_data(recipe).train, recipe, tokenizer)


def test_a_tokenizer_that_runs_two_texts_into_one_is_refused(home: Path, tmp_path: Path) -> None:
    recipe = task_recipe("text-classification, pair", tmp_path)
    tokenizer = tasks.load_reader(recipe)
    tokenizer.backend_tokenizer.post_processor = None
    with pytest.raises(ModelError, match="puts nothing between the two texts of a pair"):
        tasks.encode_examples(tasks.load_data(recipe).train, recipe, tokenizer)


def test_an_unknown_setting_of_a_task_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"task, fill-mask: unknown key 'mask_frac'; did you mean 'mask_fraction'"):
        task_recipe("fill-mask", tmp_path, "task={fill-mask: {mask_frac: 0.1}}")


def test_a_head_for_another_problem_is_refused(home: Path, tmp_path: Path) -> None:
    recipe = task_recipe("text-classification, number", tmp_path)
    tensors = get_model_state(get_run_context(recipe.model_dump_json()).model, ())
    assert tensors == {}
    export_model(recipe, tensors, tmp_path / "scorer", None, "card\n")
    classes = task_recipe("text-classification", tmp_path, f"model.source=path:{tmp_path}/scorer")
    with pytest.raises(ModelError, match="is made for a number per example, but text-classification trains one class"):
        get_run_context(classes.model_dump_json())


def test_an_exported_image_model_of_several_labels_says_so_and_has_their_loss(home: Path, tmp_path: Path) -> None:
    recipe = task_recipe("image-classification, several", tmp_path)
    shop = context("image-classification, several", tmp_path)
    export_model(recipe, get_model_state(shop.model, shop.shared_names), tmp_path / "out", None, "card\n")
    loaded = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    assert loaded.config.problem_type == "multi_label_classification"
    batch = shop.validation.make_batch(range(5))
    with torch.no_grad():
        own = shop.task.compute_loss(shop.model.eval(), batch)
        assert float(loaded(**batch).loss) == pytest.approx(float(own), rel=1e-6)
    other = task_recipe("image-classification", tmp_path, f"model.source=path:{tmp_path}/out")
    with pytest.raises(ModelError, match="is made for several labels per example, but image-classification trains one"):
        get_run_context(other.model_dump_json())
