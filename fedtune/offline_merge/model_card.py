"""The README of a merged model: its inputs, its configuration and the measurements."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from fedtune.files import hash_file
from fedtune.offline_merge.compare_models import ModelComparison
from fedtune.offline_merge.run_merge import PreparedMerge

if TYPE_CHECKING:
    from fedtune.training import Metric

__all__ = ["CardContents", "Hashes", "ModelMetrics", "build_model_card", "hash_model_files"]

Hashes = Mapping[str, Mapping[str, str]]
"""SHA-256 by file name, by model."""
ModelMetrics = Mapping[str, "Sequence[Metric]"]
"""Figures by model."""


def hash_model_files(merge: PreparedMerge) -> dict[str, dict[str, str]]:
    """Return the SHA-256 sums of the inputs' files. A file that several models share is read once."""
    known: dict[Path, str] = {}
    for model in merge.models.by_name.values():
        known |= {file: hash_file(file) for file in model.files if file not in known}
    return {name: {file.name: known[file] for file in model.files} for name, model in merge.models.by_name.items()}


@dataclass(frozen=True)
class CardContents:
    """The contents of a card. ``text`` is the configuration as it was given."""

    title: str
    merge: PreparedMerge
    text: str
    input_hashes: Hashes
    comparison: ModelComparison | None
    scores: ModelMetrics
    warnings: Sequence[str] = ()


def build_model_card(card: CardContents) -> str:
    """Return the text of the README."""
    method = card.merge.steps.combine.name
    parts = [
        _front(card.merge),
        f"# {card.title}\n\nMerged by fedtune with `{method}`, accumulated in fp32 and cast once.",
        f"## Configuration\n\n```yaml\n{card.text.strip()}\n```",
        f"## Inputs\n\n{_inputs(card.input_hashes)}",
    ]
    if card.comparison is not None:
        parts.append(f"## Before merging\n\n{_figures(card.comparison)}")
    if card.scores:
        parts.append(f"## Scores\n\n{_scores(card.scores)}")
    if card.warnings:
        parts.append("## Warnings\n\n" + "\n".join(f"- {sentence}" for sentence in card.warnings))
    return "\n\n".join(parts) + "\n"


def _front(merge: PreparedMerge) -> str:
    meta = {
        "base_model": list(merge.models.by_name),
        "base_model_relation": "merge",
        "library_name": "transformers",
        "tags": ["fedtune", "merge"],
    }
    return f"---\n{yaml.safe_dump(meta, sort_keys=False).strip()}\n---"


def _inputs(read: Hashes) -> str:
    rows = [(name, file, f"`{digest}`") for name, files in read.items() for file, digest in files.items()]
    return _table(("model", "file", "SHA-256"), rows)


def _figures(compared: ModelComparison) -> str:
    rows = []
    for place, name in enumerate(compared.models):
        others = ", ".join(f"{value:.3f}" for at, value in enumerate(compared.cosines[place]) if at != place)
        norm = "-" if compared.norms is None else f"{compared.norms[place]:.4f}"
        changed = "-" if compared.changed is None else f"{compared.changed[place]} of {compared.tensors}"
        rows.append((name, norm, others or "-", changed))
    told = (
        "" if compared.norms is None else " Norms are those of the delta to the base, relative to the norm of the base."
    )
    share = f"Entries at which two models move in opposite directions: {compared.conflicts:.1%}.{told}"
    return f"{_table(('model', 'norm', 'cosine to the others', 'tensors changed'), rows)}\n\n{share}"


def _scores(scored: ModelMetrics) -> str:
    names = sorted({found.name for figures in scored.values() for found in figures})
    rows = []
    for model, figures in scored.items():
        for domain in dict.fromkeys(found.domain for found in figures):
            values = {found.name: f"{found.value:.4f}" for found in figures if found.domain == domain}
            rows.append((model, domain, *(values.get(name, "-") for name in names)))
    return _table(("model", "domain", *names), rows)


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
