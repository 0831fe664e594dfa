"""What each technique keeps, sends and costs: the table a user chooses from.

For each recipe every published technique, by itself or beside LoRA, and the yardsticks, as `fedtune profile RECIPE
--techniques all` measures them: bytes kept for the backward pass and their peak over the step (unique storages, without
parameters and their gradients), peak resident memory of a fresh process and what the loaded model takes of it, the
median seconds of whole steps on one thread, parameters trained, bytes sent. What cannot run stays in, with the reason.
Gradients are compared with those of stored activations.

Run: python -m benchmarks.techniques [RECIPE ...], e.g. sentiment. Alone: seconds count.
"""

import argparse
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.report import save
from fedtune import tasks
from fedtune.profiling import encode_first_batch, list_profiled_techniques, make_profile_cases, profile_in_subprocess
from fedtune.recipe.yaml_file import read_recipe
from fedtune.wire.client_update import pack

RECIPES = Path(__file__).parents[1] / "recipes"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("recipes", nargs="*", default=["sentiment", "lm", "digits"])
    save("techniques", {"rows": [row for name in parser.parse_args().recipes for row in measured(name)]})


def measured(name: str) -> list[dict[str, Any]]:
    recipe = read_recipe(RECIPES / f"{name}.yaml", ["train.threads=1"])
    corpus = tasks.load_data(recipe)
    batch = pack(encode_first_batch(recipe, corpus))
    rows = []
    for case in make_profile_cases(
        recipe, [recipe.train.techniques, *list_profiled_techniques()], corpus.label_names, batch, check=True
    ):
        rows.append({"recipe": name, **asdict(profile_in_subprocess(case))})
        print(rows[-1], file=sys.stderr, flush=True)
    return rows


if __name__ == "__main__":
    main()
