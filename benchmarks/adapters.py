"""Claims: products of adapters are merged exactly where peft's ``linear`` is far off; a small core makes the SVD cheap.

weighted    three adapters of rank 8 on one 576 x 576 layer, weights 1/3: the relative error of the merged delta beside
            the mean of the products in double precision, of peft's add_weighted_adapter and of ours, with the seconds.
same        K equal adapters at 1/K each: how many times the adapter the result is.
drift       the mean of the factors (FedIT) and the best rank 8 (FlexLoRA) where clients leave a common start by so many
            times the factors' own scale: relative errors.
svd         rank 8 of stacked factors at 576 x 576 by the small core, and of the formed product by a dense SVD in single
            and double precision: seconds, and how far the results are apart.

Seconds are medians on one thread.

Run: python -m benchmarks.adapters [--short]
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from benchmarks.report import save
from fedtune.merging._factor_svd import truncate_product
from fedtune.merging._low_rank_factors import LowRankFactors, compute_averaging_error, stack_factors
from fedtune.offline_merge.adapters.adapter_merge import AdapterMerge, RankLimit
from fedtune.offline_merge.adapters.merge_adapters import merge_adapters
from fedtune.training import use_cpu_threads

SIDE, RANK, ALPHA = 576, 8, 16
PEFT: dict[str, dict[str, Any]] = {
    "cat": {"combination_type": "cat"},
    "svd at rank 8": {"combination_type": "svd", "svd_rank": RANK},
    "svd at rank 24": {"combination_type": "svd", "svd_rank": 3 * RANK},
    "linear": {"combination_type": "linear"},
}
OURS = {"exact": RankLimit(), "rank 8": RankLimit(rank=RANK), "energy 0.95": RankLimit(energy=0.95)}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--short", action="store_true", help="three repetitions")
    times = 3 if parser.parse_args().short else 21
    with use_cpu_threads(1), tempfile.TemporaryDirectory() as folder:
        result = {
            "weighted": weighted(made(Path(folder), 3), times),
            "same": [same(made(Path(folder), 1)[0], count) for count in (2, 3, 5)],
            "drift": [drift(size, count) for size in (0.1, 0.3, 1.0, 3.0) for count in (3, 10)],
            "svd": [svd(count, times) for count in (3, 10)],
        }
    save("adapters", result)


def layer() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(SIDE, SIDE, bias=False))


def made(folder: Path, count: int) -> list[Path]:
    """Adapters with random factors, saved by peft."""
    random = torch.Generator().manual_seed(0)
    for number in range(count):
        model = get_peft_model(layer(), LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["0"]))
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.data = torch.randn(parameter.shape, generator=random)
        model.save_pretrained(folder / str(number))
    return [folder / str(number) for number in range(count)]


def delta(model: PeftModel, name: str = "default") -> Tensor:
    module: Any = model.base_model.model[0]
    return module.get_delta_weight(name).detach().double()  # type: ignore[no-any-return]


def loaded(folders: Sequence[Path]) -> PeftModel:
    model = PeftModel.from_pretrained(layer(), str(folders[0]), adapter_name="0")
    for number, folder in enumerate(folders[1:], 1):
        model.load_adapter(str(folder), str(number))
    return model


def by_peft(folders: Sequence[Path], settings: dict[str, Any], times: int = 1) -> tuple[Tensor, float]:
    """The delta of add_weighted_adapter with weights that sum to one, and its seconds."""
    model, names = loaded(folders), [str(number) for number in range(len(folders))]

    def merge(turn: int) -> None:
        model.add_weighted_adapter(names, [1 / len(names)] * len(names), f"merged{turn}", **settings)

    seconds = timed(merge, times)
    return delta(model, "merged0"), seconds


def by_us(folders: Sequence[Path], cut: RankLimit, times: int = 1) -> tuple[Tensor, float]:
    """The delta of the merged folder as plain peft reads it, and the seconds, files and all."""
    with tempfile.TemporaryDirectory() as out:
        seconds = timed(lambda turn: merge_adapters(folders, Path(out) / str(turn), AdapterMerge(limit=cut)), times)
        return delta(PeftModel.from_pretrained(layer(), str(Path(out) / "0"))), seconds


def timed(call: Callable[[int], object], times: int) -> float:
    seconds = []
    for turn in range(times):
        started = time.perf_counter()
        call(turn)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def weighted(folders: Sequence[Path], times: int) -> list[dict[str, Any]]:
    model = loaded(folders)
    mean = torch.stack([delta(model, str(number)) for number in range(len(folders))]).mean(0)
    rows = []
    for name, settings in PEFT.items():
        found, seconds = by_peft(folders, settings, min(times, 5))
        rows.append({"merge": f"peft {name}", "error": relative(found, mean), "seconds": seconds})
    for name, cut in OURS.items():
        found, seconds = by_us(folders, cut, min(times, 5))
        rows.append({"merge": f"fedtune {name}", "error": relative(found, mean), "seconds": seconds})
    return rows


def same(folder: Path, count: int) -> dict[str, Any]:
    one = delta(PeftModel.from_pretrained(layer(), str(folder)))
    linear, ours = by_peft([folder] * count, PEFT["linear"])[0], by_us([folder] * count, RankLimit())[0]
    return {"adapters": count, "peft linear": times_of(linear, one), "fedtune": times_of(ours, one)}


def times_of(found: Tensor, one: Tensor) -> float:
    return float((found * one).sum() / (one * one).sum())


def clients(size: float, count: int) -> list[LowRankFactors]:
    random = torch.Generator().manual_seed(1)
    start = torch.randn(SIDE, RANK, generator=random), torch.randn(RANK, SIDE, generator=random)
    near = [[t + size * torch.randn(t.shape, generator=random) for t in start] for _ in range(count)]
    return [LowRankFactors(b, a) for b, a in near]


def drift(size: float, count: int) -> dict[str, Any]:
    factors, weights = clients(size, count), [1 / count] * count
    flexlora = truncate_product(stack_factors(factors, weights), RANK).relative_error
    return {"drift": size, "clients": count, "fedit": compute_averaging_error(factors, weights), "flexlora": flexlora}


def svd(count: int, times: int) -> dict[str, Any]:
    whole = stack_factors(clients(1.0, count), [1 / count] * count)
    formed = whole.b @ whole.a
    core = timed(lambda _: truncate_product(whole, RANK), times)
    small = truncate_product(whole, RANK).factors
    row: dict[str, Any] = {"stacked rank": whole.rank, "small core seconds": core}
    for name, matrix in {"single": formed.float(), "double": formed}.items():
        seconds = timed(lambda _, matrix=matrix: dense(matrix), times)  # type: ignore[misc]
        apart = relative(small.b @ small.a, dense(matrix).double())
        row |= {f"dense {name} seconds": seconds, f"times faster than {name}": seconds / core, f"apart {name}": apart}
    return row


def dense(matrix: Tensor) -> Tensor:
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    best: Tensor = u[:, :RANK] * s[:RANK] @ vh[:RANK]
    return best


def relative(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


if __name__ == "__main__":
    main()
