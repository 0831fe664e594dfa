"""What the process imports whose memory a plan predicts. Nothing here imports torch."""

from collections.abc import Sequence

from fedtune.plan.settings_trace import SettingsTrace

__all__ = ["explain_trainer"]

_PLAIN = {
    "chat": "plain blocks, with transformers for the tokenizer, as a chat template writes the texts",
    "blocks": "plain blocks, without transformers",
}


def explain_trainer(traces: Sequence[SettingsTrace]) -> str:
    """Say in one line which settings a device trains on plain blocks, and why others need transformers."""
    kinds = {trace.runtime.partition(" ")[0] for trace in traces}
    reasons = {trace.name: trace.blocks_problem for trace in traces if trace.blocks_problem is not None}
    plain = next((text for kind, text in _PLAIN.items() if kind in kinds), None)
    if plain is None:
        told = {f"transformers, because {reason}" for reason in reasons.values()}
        return "; ".join(sorted(told)) or "as the model needs it"
    return "; ".join([plain, *(f"{name} with transformers, because {reason}" for name, reason in reasons.items())])
