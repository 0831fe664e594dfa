"""Values: every combining step that mergekit has too, on the same three small models, beside mergekit's own output.

Models: a tiny Llama with random weights and three variants of it, a common and an own random change each, fp32. For
each case mergekit-yaml writes its merge, our steps make theirs in memory, and ``difference`` is the largest absolute
one over the tensors, each over the largest entry of mergekit's delta to the base (of its model where there is none).
``exact`` cases must agree up to fp32 rounding of weights near one; ``known`` ones have a reason to differ, which is
noted; ``random`` ones draw other masks, so that the share of entries that change and the L2 norm of the change are
compared in place of values. mergekit's nuslerp_row_wise gives each column an angle: our ``over: column``.

Run: python -m benchmarks.merge_values --mergekit PATH/TO/mergekit-yaml [--only NAME]
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import safetensors.torch
import torch
import yaml
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.report import save
from fedtune.merging import CombineStep, MergeContext, MergeInput, bind_combine, build_pipeline
from fedtune.recipe.schema import Unit

Tensors = Mapping[str, Tensor]


class Case(NamedTuple):
    """One merge: the models by number, 0 being the base; ``ours`` are our settings where they are not mergekit's.

    ``base`` says whether deltas are merged, ``agrees`` how the outputs are to be compared.
    """

    name: str
    models: Sequence[int] = (1, 2, 3)
    base: bool = True
    weights: Sequence[float] | None = None
    parameters: Mapping[str, Any] = {}
    ours: Mapping[str, Any] | None = None
    agrees: Literal["exact", "known", "random"] = "exact"
    note: str = ""
    title: str = ""


_SPLIT = (0.5, 0.3, 0.2)
_RANKED = {"density": 0.4, "epsilon": 0.2}
_OWN_P = "ours divides each entry by its own probability, mergekit all by one ratio of L1 norms: another norm"
CASES = [
    Case("linear", base=False, weights=_SPLIT),
    Case("linear", base=False, weights=(1, 1, 1), parameters={"normalize": False}, title="linear, summed"),
    Case("task_arithmetic", weights=(1.0, 0.7, -0.3), parameters={"lambda": 0.8}),
    Case("slerp", models=(1, 2), base=False, parameters={"t": 0.3}),
    Case("nuslerp", models=(1, 2), weights=(0.6, 0.2)),
    Case(
        "nuslerp",
        models=(1, 2),
        weights=(0.6, 0.2),
        parameters={"nuslerp_flatten": False, "nuslerp_row_wise": True},
        ours={"over": "column"},
        title="nuslerp, by column",
    ),
    Case(
        "nuslerp",
        models=(1, 2),
        weights=(0.6, 0.2),
        parameters={"nuslerp_flatten": False, "nuslerp_row_wise": False},
        ours={"over": "row"},
        title="nuslerp, by row",
    ),
    Case("multislerp", weights=_SPLIT, agrees="known", note="ours steps along logarithms, mergekit's step is zero"),
    Case("karcher", base=False),
    Case("ties", weights=(1, 1, 1), parameters={"density": 0.2}),
    Case("ties", weights=_SPLIT, parameters={"density": 0.5, "lambda": 1.3, "normalize": False}, title="ties, summed"),
    Case("breadcrumbs", weights=_SPLIT, parameters={"density": 0.9, "gamma": 0.01}),
    Case("breadcrumbs_ties", weights=_SPLIT, parameters={"density": 0.5, "gamma": 0.05}),
    Case("sce"),
    Case("sce", parameters={"select_topk": 0.3}, title="sce, selecting"),
    Case("model_stock"),
    Case("model_stock", parameters={"filter_wise": True}, ours={"over": "row"}, title="model_stock, by row"),
    Case("dare_linear", weights=_SPLIT, parameters={"density": 0.3}, agrees="random"),
    Case("dare_ties", weights=_SPLIT, parameters={"density": 0.3}, agrees="random"),
    Case("della_linear", weights=_SPLIT, parameters=_RANKED, agrees="random", note=_OWN_P),
    Case("della", weights=_SPLIT, parameters=_RANKED, agrees="random", note=_OWN_P),
]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--mergekit", default="mergekit-yaml", help="its executable, in an environment of its own")
    parser.add_argument("--only", help="cases of one name, printed and not saved")
    arguments = parser.parse_args()
    if shutil.which(arguments.mergekit) is None:
        sys.exit(f"{arguments.mergekit} is not there; install mergekit elsewhere and give --mergekit PATH")
    with tempfile.TemporaryDirectory() as folder:
        models = made(Path(folder))
        chosen = [case for case in CASES if arguments.only in (None, case.name)]
        rows = [row(case, models, Path(folder), arguments.mergekit) for case in chosen]
    if arguments.only is None:
        save("merge_values", {"rows": rows})


def made(folder: Path) -> Sequence[Tensors]:
    """The base and its variants, also saved as folders 0, 1, 2, 3."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=176,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    base = {name: tensor + 0.02 * torch.randn_like(tensor) for name, tensor in model.state_dict().items()}
    common = {name: 0.004 * torch.randn_like(tensor) for name, tensor in base.items()}
    changes = [{name: common[name] + 0.004 * torch.randn_like(tensor) for name, tensor in base.items()} for _ in "abc"]
    states: list[Tensors] = [base, *({name: base[name] + change[name] for name in base} for change in changes)]
    for number, state in enumerate(states):
        model.load_state_dict(state)
        model.save_pretrained(folder / str(number))
    return states


def row(case: Case, models: Sequence[Tensors], folder: Path, mergekit: str) -> dict[str, Any]:
    """One case's comparison."""
    theirs, ours = merged_by_mergekit(case, folder, mergekit), merged_here(case, models)
    base = models[0] if case.base else {name: torch.zeros(()) for name in models[0]}
    compared = shape_of_change if case.agrees == "random" else differences
    found = {"case": case.title or case.name, "agrees": case.agrees, **compared(ours, theirs, base)}
    print(found, file=sys.stderr, flush=True)
    return {**found, "note": case.note} if case.note else found


def differences(ours: Tensors, theirs: Tensors, base: Tensors) -> dict[str, Any]:
    """The largest difference over the tensors, and where."""
    each = {
        name: float((ours[name] - theirs[name]).abs().max() / (theirs[name] - base[name]).abs().max()) for name in ours
    }
    worst = max(each, key=lambda name: each[name])
    return {"difference": each[worst], "tensor": worst}


def shape_of_change(ours: Tensors, theirs: Tensors, base: Tensors) -> dict[str, Any]:
    """Share of entries that change and the L2 norm of the change, ours first."""
    changes = [torch.cat([(one[name] - base[name]).flatten() for name in base]) for one in (ours, theirs)]
    return {
        "changed": [float((change.abs() > 1e-7).double().mean()) for change in changes],
        "norm": [float(change.norm()) for change in changes],
    }


def merged_here(case: Case, models: Sequence[Tensors]) -> dict[str, Tensor]:
    """Our step's output."""
    settings = dict(case.parameters if case.ours is None else case.ours)
    combine = build_pipeline([Unit(name=case.name.replace("_", "-"), settings=settings)]).combine
    base = models[0] if case.base else {name: torch.zeros_like(tensor) for name, tensor in models[0].items()}
    weights = case.weights or [1.0] * len(case.models)
    operands = [
        MergeInput(lambda name, start, stop, model=models[one]: (model[name] - base[name])[start:stop], weight)
        for one, weight in zip(case.models, weights, strict=True)
    ]
    shapes = {name: tuple(tensor.shape) for name, tensor in base.items()}
    step, settled = bind_combine(combine, shapes, operands, MergeContext())
    return {name: base[name] + whole(step, name, shape, settled) for name, shape in shapes.items()}


def whole(step: CombineStep, name: str, shape: tuple[int, ...], operands: Sequence[MergeInput]) -> Tensor:
    return torch.cat(list(step.combine(name, shape, operands)))


def merged_by_mergekit(case: Case, folder: Path, mergekit: str) -> dict[str, Tensor]:
    """mergekit's output for the same case."""
    out, config = folder / "merged", folder / "config.yaml"
    shutil.rmtree(out, ignore_errors=True)
    config.write_text(yaml.safe_dump(configuration(case, folder)), encoding="utf-8")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)  # ours is not for its interpreter
    command = [mergekit, str(config), str(out), "--no-write-model-card", "--random-seed", "1"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"mergekit ended with code {done.returncode} on {case.name}: {done.stderr[-600:]}")
    return {
        name: tensor
        for file in sorted(out.glob("*.safetensors"))
        for name, tensor in safetensors.torch.load_file(file).items()
    }


def configuration(case: Case, folder: Path) -> dict[str, Any]:
    """The case in mergekit's schema."""
    weights: Sequence[float | None] = case.weights or [None] * len(case.models)
    entries = [
        {"model": str(folder / str(one)), **({} if weight is None else {"parameters": {"weight": weight}})}
        for one, weight in zip(case.models, weights, strict=True)
    ]
    base = 0 if case.base else case.models[0] if case.name == "slerp" else None
    named = {} if base is None else {"base_model": str(folder / str(base))}
    return {
        "merge_method": case.name,
        "models": entries,
        "parameters": dict(case.parameters),
        "dtype": "float32",
        **named,
    }


if __name__ == "__main__":
    main()
