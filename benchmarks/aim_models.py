"""The fine-tunes that benchmarks.aim merges: made by fedtune's own training, kept as deltas to one base.

minilm   four full fine-tunes of MiniLM, one per domain of the sentiment data, that share one new head.
smollm2  three of SmolLM2 on the sentences of three domains, low-rank, B then A in turns; newspaper editorials are left
         to nobody and serve as neutral text. Their deltas are products, made row by row.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from torch import Tensor

from fedtune import merging
from fedtune.data import EncodedDataset
from fedtune.data.sampling import iter_inputs, sample_rows
from fedtune.data.token_blocks import iter_token_blocks
from fedtune.merging import MergeContext, MergeInput, MergePipeline, measure_activation_statistics
from fedtune.recipe.yaml_file import read_recipe
from fedtune.simulation import resolve_recipe
from fedtune.tasks import get_task
from fedtune.training import (
    ClientRound,
    EvaluatedModel,
    RunContext,
    clear_run_context,
    evaluate_model,
    get_model_state,
    get_run_context,
    set_model_state,
    train_local_model,
)
from fedtune.training.model_state import named_tensors
from fedtune.wire.client_update import ClientUpdate, pack

__all__ = ["NEUTRAL", "Tuned", "evaluated", "merged", "minilm", "smollm2"]

RECIPES = Path(__file__).parents[1] / "recipes"
NEUTRAL = "editorials"
LENGTH = 48
State = Mapping[str, Tensor]


@dataclass(frozen=True)
class Tuned:
    """Fine-tunes by domain, each an operand of weight 1; ``base`` holds what a merge writes."""

    shop: RunContext
    base: State
    operands: dict[str, MergeInput]
    evidence: MergeContext


def minilm(seed: int, lr: float, steps: int, folder: Path) -> Tuned:
    """Four of them; deltas lie in ``folder``. Statistics are of unlabelled validation sentences on the base."""
    shop = _shop("aim.yaml", seed, lr, steps, 1, "train.techniques=full", "train.batch_size=16")
    base, operands = get_model_state(shop.model, shop.shared_names), {}
    for client, domain in shop.client_domains.items():
        got = train_local_model(
            ClientRound(shop.model, (), shop.recipe, shop.train, shop.client_rows[client], 1, client), base
        )
        path = folder / f"{domain}.safetensors"
        path.write_bytes(pack(got.delta))
        operands[domain] = MergeInput(ClientUpdate(client, got.num_examples, path).read_rows, 1.0)
    set_model_state(shop.model, base)
    chosen = sample_rows(np.arange(len(shop.validation)), 256, seed)
    found = measure_activation_statistics(shop.model, iter_inputs(shop.validation, chosen, 64))
    return Tuned(shop, base, operands, MergeContext(found))


def smollm2(seed: int, lr: float, steps: int, _: Path) -> Tuned:
    """Three of them. Statistics are of blocks of neutral text that no score uses."""
    more = ("task=text-generation", "model.source=sample:smollm2", "train.techniques=lora", "train.batch_size=8")
    shop = _shop("aim.yaml", seed, lr, steps // 4, 4, *more, f"train.max_length={LENGTH}")
    start, operands = get_model_state(shop.model, shop.shared_names), {}
    for client, domain in shop.client_domains.items():
        if domain != NEUTRAL:
            operands[domain] = MergeInput(partial(_product_rows, dict(_factors(shop, start, client))), 1.0)
    set_model_state(shop.model, start)  # B is zero: the base itself
    names = [name for name in named_tensors(shop.model) if name.endswith(".base_layer.weight")]
    found = measure_activation_statistics(shop.model, _neutral_blocks(shop))
    base = get_model_state(shop.model, names)
    return Tuned(shop, base, operands, MergeContext({name: found[name] for name in names}))


def merged(tuned: Tuned, pipeline: MergePipeline) -> dict[str, Tensor]:
    """The base and the merged delta."""
    shapes = {name: tuple(before.shape) for name, before in tuned.base.items()}
    combine, operands = merging.bind_combine(pipeline.combine, shapes, list(tuned.operands.values()), tuned.evidence)
    settled, made = pipeline._replace(combine=combine), {}
    for name, before in tuned.base.items():
        made[name] = before.clone()
        for start, stop, delta in merging.merge_row_chunks(settled, name, shapes[name], operands, tuned.evidence):
            made[name][start:stop] += delta
    return made


def evaluated(tuned: Tuned, state: State, part: str, figure: str, texts: int) -> dict[str, float]:
    """The figure on each domain, over up to ``texts`` of its examples."""
    shop = tuned.shop
    set_model_state(shop.model, state)
    examples = some(getattr(shop, part), texts)
    scores = evaluate_model(
        EvaluatedModel(shop.model, get_task(shop.recipe.task), 64 if figure == "accuracy" else 16), examples
    )
    return {one.domain: one.value for one in scores if one.name == figure and one.domain not in ("all", "mean")}


def _shop(file: str, seed: int, lr: float, steps: int, rounds: int, *more: str) -> RunContext:
    clear_run_context()
    settings = [
        "merge=[mean]",
        f"seed={seed}",
        f"train.lr={lr}",
        f"train.local_steps={steps}",
        f"federation.rounds={rounds}",
    ]
    devices = ["devices=[{name: lab, count: 4}]", "federation.quorum=1"]
    shop = get_run_context(resolve_recipe(read_recipe(RECIPES / file, [*settings, *devices, *more])).model_dump_json())
    clear_run_context()
    if len(set(shop.client_domains.values())) != 4:
        raise AssertionError("each client should hold one domain of its own")
    return shop


def _factors(shop: RunContext, start: State, client: int) -> Iterator[tuple[str, tuple[Tensor, Tensor]]]:
    """What one client's rounds in turn make of the pairs: scaled B and A by the name of the weight beside them."""
    state = dict(start)
    for number in range(1, shop.recipe.federation.rounds + 1):
        got = train_local_model(
            ClientRound(shop.model, shop.techniques, shop.recipe, shop.train, shop.client_rows[client], number, client),
            state,
        )
        state |= {name: state[name] + delta for name, delta in got.delta.items()}
    for name, a in state.items():
        if ".lora_A." in name:
            layer = name.partition(".lora_A.")[0]
            scaling = float(shop.model.get_submodule(layer).scaling["default"])  # type: ignore[index]
            yield f"{layer}.base_layer.weight", (scaling * state[name.replace(".lora_A.", ".lora_B.")], a)


def _product_rows(pairs: Mapping[str, tuple[Tensor, Tensor]], name: str, start: int, stop: int) -> Tensor:
    b, a = pairs[name]
    return b[start:stop] @ a


def _neutral_blocks(shop: RunContext) -> Iterator[dict[str, Tensor]]:
    """Blocks of training sentences of the domain nobody trained on."""
    domains = shop.train.domains
    assert domains is not None
    indices = np.array([index for index, domain in enumerate(domains) if domain == NEUTRAL])
    rows = (
        shop.train.make_batch([index])["input_ids"][0].tolist() for index in sample_rows(indices, 256, shop.recipe.seed)
    )
    return iter_token_blocks(rows, block_size=256, batch=2)


@dataclass(frozen=True)
class Some:
    """Chosen examples of a part, as a part themselves."""

    whole: EncodedDataset
    chosen: list[int]

    @property
    def domains(self) -> list[str] | None:
        return None if self.whole.domains is None else [self.whole.domains[index] for index in self.chosen]

    @property
    def lengths(self) -> Tensor | None:
        return None if self.whole.lengths is None else self.whole.lengths[self.chosen]

    def __len__(self) -> int:
        return len(self.chosen)

    def make_batch(self, indices: Sequence[int]) -> dict[str, Tensor]:
        return self.whole.make_batch([self.chosen[index] for index in indices])


def some(examples: EncodedDataset, texts: int) -> Some:
    """The first so many examples of each domain, or of all where there are none."""
    if examples.domains is None:
        return Some(examples, list(range(min(texts, len(examples)))))
    domains = np.array(examples.domains)
    return Some(examples, sorted(i for one in set(domains) for i in np.flatnonzero(domains == one)[:texts].tolist()))
