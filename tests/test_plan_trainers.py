"""A plan is of the trainer that a device runs: plain blocks where it builds them, transformers where it must."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fedtune.device.memory_budget import estimate_memory
from fedtune.memory import StorageMeter
from fedtune.models.blocks import preference
from fedtune.models.blocks.block_model import BlockModel
from fedtune.models.paging.paged_layers import list_paged_layers
from fedtune.plan import auto_techniques, plan_report, runtime_surplus, trace_settings, worker
from fedtune.plan.auto_techniques import plan_auto_techniques
from fedtune.plan.candidates import Candidate
from fedtune.plan.prediction import Runtime
from fedtune.plan.runtime_surplus import measure_runtime_surplus
from fedtune.plan.settings_trace import SettingsTrace
from fedtune.plan.step_trace import build_traced_model, use_fake_tensors
from fedtune.plan.trace_settings import trace_candidate
from fedtune.plan.trainer_kind import explain_trainer
from fedtune.profiling import make_random_batch
from fedtune.recipe.memory_plans import MemoryPlans
from fedtune.recipe.schema import Recipe, Unit
from fedtune.server.algorithm_merge import declare_algorithm_upload
from fedtune.tasks import get_task
from fedtune.techniques import begin_round, begin_step, declare_extra_payload, list_trainable_tensors
from fedtune.training import (
    clear_run_context,
    compute_step_loss,
    get_run_context,
    get_tensor_shapes,
    prepare_model,
    set_train_mode,
)
from fedtune.wire.client_update import pack
from tests.federations import words
from tests.plan_examples import MB
from tests.profile_examples import a_recipe, tiny_bert
from tests.test_device_plans import an_option
from tests.test_plan_trace import LABELS, a_decoder, compare, with_techniques

ENCODER = ("lora+gradient-checkpointing", "meft")
DECODER = ("lora+gradient-checkpointing+fused-cross-entropy", "full")
RUNTIMES = {"blocks": Runtime(170 * MB, 110 * MB), "transformers": Runtime(380 * MB, 160 * MB)}


@pytest.fixture
def _plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process prefers plain blocks, as a device's trainer does."""
    monkeypatch.setattr(preference, "_preferred", [True])


def plan_one(recipe: Recipe, joined: str, labels: tuple[str, ...] = (), **how: Any) -> SettingsTrace:
    units = tuple(Unit(name=name) for name in joined.split("+"))
    found = trace_candidate(recipe, labels, Candidate(units, recipe.model.dtype), **how)
    assert found.error is None
    return found


@pytest.mark.usefixtures("_plain")
@pytest.mark.parametrize("joined", ENCODER)
def test_a_traced_encoder_of_plain_blocks_holds_the_bytes_of_the_real_one(joined: str, tmp_path: Path) -> None:
    found = compare(with_techniques(a_recipe(tiny_bert(tmp_path)), joined), LABELS)
    assert isinstance(found.model.model, BlockModel)


@pytest.mark.usefixtures("_plain")
@pytest.mark.parametrize("joined", DECODER)
def test_a_decoder_of_plain_blocks_holds_the_bytes_of_the_real_one(joined: str, tmp_path: Path) -> None:
    recipe = with_techniques(a_recipe(a_decoder(tmp_path), "task=text-generation"), joined)
    found = compare(recipe, (), slack=0.03)
    assert isinstance(found.model.model, BlockModel)
    [step] = [one.step_bytes for one in found.by_batch_size[0]][:1]
    real = measure_peak_with_gradients(recipe)
    assert real <= step <= real * 1.03


def measure_peak_with_gradients(recipe: Recipe) -> int:
    """The largest bytes of a real step that are held at one time, gradients included."""
    model, chosen, _ = prepare_model(recipe, ())
    begin_round(chosen, model, 1)
    set_train_mode(model)
    batch = make_random_batch(model, recipe, 0)
    with StorageMeter(excluded=[*model.parameters(), *model.buffers()]) as meter:
        begin_step(chosen, model, batch, 0.0)
        compute_step_loss(get_task(recipe.task), model, batch).backward()
        assert meter.peak_bytes <= meter.peak_with_gradients <= meter.peak_bytes + meter.gradient_bytes
    return meter.peak_with_gradients


def in_mapped_file(tensor: Tensor) -> bool:
    """Whether a tensor lies in pages of a model's file, as the system tells it."""
    at = tensor.data_ptr()
    lines = (line.split() for line in Path("/proc/self/maps").read_text().splitlines() if "model.safetensors" in line)
    spans = [[int(end, 16) for end in words[0].split("-")] for words in lines]
    return any(start <= at < end for start, end in spans)


@pytest.mark.parametrize(
    ("stored", "loaded", "preferred"),
    [
        (torch.float32, "float32", []),
        (torch.bfloat16, "float32", [True]),
        (torch.bfloat16, "bfloat16", []),
        ("mixed", "float32", [True]),
    ],
)
def test_weights_are_read_in_place_only_in_their_own_type(
    stored: torch.dtype | str, loaded: str, preferred: list[bool], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """huggingface/transformers#34743: twice the memory; genmoai/mochi#115: a file with norms in single precision."""
    from transformers import LlamaForCausalLM

    monkeypatch.setattr(preference, "_preferred", preferred)
    a_decoder(tmp_path / "fp32")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "fp32", dtype=torch.bfloat16 if stored == "mixed" else stored)
    if stored == "mixed":
        model.model.norm.float()
    model.save_pretrained(tmp_path / "model")
    overrides = "task=text-generation", f"model.dtype={loaded}"
    recipe = with_techniques(a_recipe(tmp_path / "model", *overrides), "lora")
    found, (real, _, _) = plan_one(recipe, "lora"), prepare_model(recipe, ())
    mapped = [one.nbytes for one in real.parameters() if not one.requires_grad and in_mapped_file(one)]
    assert found.mapped_bytes == sum(mapped)
    assert bool(mapped) == (str(stored) in (f"torch.{loaded}", "mixed"))
    assert stored != "mixed" or mapped == [64]  # the last norm


@pytest.mark.usefixtures("_plain")
def test_matrices_that_stay_in_a_file_are_no_weights_in_memory(home: Path, tmp_path: Path) -> None:
    recipe = a_recipe(a_decoder(tmp_path), "task=text-generation", "model.paged=bf16")
    recipe = with_techniques(recipe, "lora")
    model, _, _ = prepare_model(recipe, ())
    real = {name.removesuffix(".base_layer") for name, _ in list_paged_layers(model)}
    with use_fake_tensors():
        traced = build_traced_model(recipe, (), None)
        named = traced.model.named_parameters(remove_duplicate=False)
        paged = {
            name.removesuffix(".weight").removesuffix(".base_layer")
            for name, one in named
            if id(one) in {id(each) for each in traced.paged}
        }
    assert paged == real
    left = {id(one) for _, layer in list_paged_layers(model) for one in layer.parameters(recurse=False)}
    rest = [one for one in (*model.parameters(), *model.buffers()) if id(one) not in left]
    found = plan_one(recipe, "lora")
    assert found.runtime == f"blocks path:{tmp_path}"
    largest = max(layer.weight.numel() * 4 for _, layer in list_paged_layers(model))
    assert found.weight_bytes + found.mapped_bytes == sum(one.nbytes for one in rest) + largest


def test_a_head_inside_the_loss_is_read_in_few_rows(
    monkeypatch: pytest.MonkeyPatch, home: Path, tmp_path: Path
) -> None:
    recipe = a_recipe(a_decoder(tmp_path), "task=text-generation", "model.paged=bf16")
    monkeypatch.setattr(trace_settings, "CHUNK_ROWS", 2)
    plain, fused = (plan_one(recipe, joined) for joined in ("lora", "lora+fused-cross-entropy"))
    assert plain.weight_bytes - fused.weight_bytes == (64 - 32) * 16 * 4  # the head, and the largest other matrix


def test_what_an_algorithm_sends_counts(tmp_path: Path) -> None:
    scaffold = ("federation.algorithm=scaffold", "train.optimiser=sgd")
    recipe = a_recipe(a_decoder(tmp_path), "task=text-generation", *scaffold)
    plain = plan_one(a_recipe(tmp_path, "task=text-generation"), "full")
    found = plan_one(recipe, "full")
    model, chosen, shared = prepare_model(with_techniques(recipe, "full"), ())
    begin_round(chosen, model, 1)
    every = get_tensor_shapes(model)
    shapes = {name: every[name] for name in list_trainable_tensors(model)}
    forms = declare_algorithm_upload(recipe, model, shapes)
    sent = {name: torch.zeros(shape) for name, shape in {**shapes, **{k: v.shape for k, v in forms.items()}}.items()}
    assert found.up_bytes == len(pack(sent))
    assert found.up_bytes > 1.9 * plain.up_bytes
    assert found.down_bytes > 1.9 * plain.down_bytes
    assert set(shapes) == set(shared)


def test_what_a_technique_sends_beside_the_deltas_counts(tmp_path: Path) -> None:
    recipe = a_recipe(a_decoder(tmp_path), "task=text-generation")
    units = [Unit(name="dynamic-pruning", settings={"update_every": every, "density": 0.7}) for every in (None, 5)]
    never, often = (trace_candidate(recipe, (), Candidate((unit,), "float32")) for unit in units)
    wanted = recipe.train.model_copy(update={"techniques": units[1:]})
    model, chosen, _ = prepare_model(recipe.model_copy(update={"train": wanted}), ())
    extras = declare_extra_payload(chosen, model, 5)
    sizes = {"U8": 1, "BF16": 2}
    real = sum(torch.Size(one.shape).numel() * sizes[one.dtype] for one in extras.values())
    header = sum(len(name) + 60 for name in extras)
    assert 0.8 * real < often.up_bytes - never.up_bytes < 1.2 * real + 1.5 * header


@pytest.mark.usefixtures("_plain")
def test_conversations_need_the_tokenizer_of_transformers(tmp_path: Path) -> None:
    recipe = a_recipe(a_decoder(tmp_path), "task={text-generation: {chat_template: chatml}}")
    assert worker.describe_data(recipe) == ((), True)
    assert plan_one(recipe, "lora", has_conversations=True).runtime == f"chat path:{tmp_path}"


@pytest.mark.usefixtures("_plain")
def test_what_was_not_made_for_plain_blocks_is_planned_with_transformers(tmp_path: Path) -> None:
    found = plan_one(a_recipe(tiny_bert(tmp_path)), "lora+selective-checkpointing", LABELS)
    assert found.runtime.startswith("transformers ")
    assert found.blocks_problem == "selective-checkpointing was not made for plain blocks"
    plain = found.model_copy(update={"runtime": "blocks path:a", "blocks_problem": None})
    assert explain_trainer([plain]) == "plain blocks, without transformers"
    assert explain_trainer([found]) == "transformers, because selective-checkpointing was not made for plain blocks"
    assert explain_trainer([plain, found]).startswith(
        "plain blocks, without transformers; lora+selective-checkpointing"
    )
    chat = plain.model_copy(update={"runtime": "chat path:a"})
    assert explain_trainer([chat]).startswith("plain blocks, with transformers for the tokenizer")


def plan_phone(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Recipe:
    """Plan LoRA for a phone of 300 MB, with the runtimes of the machine that this was written on."""

    def run_worker(_: str) -> dict[str, Any]:
        return {"traces": [plan_one(a_recipe(folder), "lora", LABELS).model_dump(mode="json")]}

    monkeypatch.setattr(plan_report, "_run_worker", run_worker)
    measured = {f"{kind} path:{folder}": size for kind, size in RUNTIMES.items()}
    monkeypatch.setattr(auto_techniques, "measure_runtimes", lambda *_: measured)
    devices = "devices=[{name: phone, count: 1, memory: 300MB}]"
    return plan_auto_techniques(a_recipe(folder, "train.techniques=auto", devices), ())[0]


@pytest.mark.usefixtures("_plain")
def test_a_device_of_300_mb_gets_a_plan(home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    planned = plan_phone(monkeypatch, tiny_bert(tmp_path))
    assert [unit.name for unit in planned.train.techniques] == ["lora"]


def test_with_transformers_it_is_refused(home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(Exception, match="no plan fits phone with 300 MB"):
        plan_phone(monkeypatch, tiny_bert(tmp_path))


def test_a_worker_that_imports_transformers_may_hold_that_much_more(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    recipe = with_techniques(a_recipe(tiny_bert(tmp_path)), "lora")
    measured = {f"{kind} path:{tmp_path}": size for kind, size in RUNTIMES.items()}
    monkeypatch.setattr(runtime_surplus, "measure_runtimes", lambda names, _: {name: measured[name] for name in names})
    assert measure_runtime_surplus(recipe, ()) == 0
    planned = recipe.model_copy(update={"plans": MemoryPlans(options=[an_option("lora", 3, 300 * MB, 1.0)])})
    assert measure_runtime_surplus(planned, ()) == 210 * MB
    assert measure_runtime_surplus(with_techniques(planned, "lora+selective-checkpointing"), ()) == 0


def test_a_device_estimates_the_rounds_that_train_other_tensors_too(home: Path, tmp_path: Path) -> None:
    context = get_run_context(words(tmp_path, "train.techniques=lora").model_dump_json())
    rows = context.client_rows[0]
    first, second = (estimate_memory(context, rows, number) for number in (1, 2))
    assert first.bytes_per_example == second.bytes_per_example
    clear_run_context()
