"""Samples as short lines for a terminal. A model may write anything, also what a terminal would act on."""

import json
from collections.abc import Sequence

from fedtune.tracking.records import SampleRecord
from fedtune.untrusted import clean_text

__all__ = ["format_sample", "format_samples"]

_SHOWN = 8
_LONGEST_PROMPT, _LONGEST_TEXT = 60, 240


def format_samples(samples: Sequence[SampleRecord]) -> list[str]:
    """Return one line per sample; of more than eight, a line counts the others."""
    lines = [format_sample(sample) for sample in samples[:_SHOWN]]
    hidden = len(samples) - _SHOWN
    return [*lines, f"  and {hidden} more samples: --json shows all"] if hidden > 0 else lines


def format_sample(sample: SampleRecord) -> str:
    """Return the end of the prompt and the text; an ellipsis follows a text that the model did not end."""
    prompt = _get_last_message(sample.prompt)
    shown = prompt if len(prompt) <= _LONGEST_PROMPT else f"…{prompt[1 - _LONGEST_PROMPT :]}"
    text = clean_text(sample.text, _LONGEST_TEXT)
    return f"  {clean_text(shown, _LONGEST_PROMPT)} -> {text}{'' if sample.ended or text.endswith('…') else '…'}"


def _get_last_message(prompt: str) -> str:
    """Return the last message of a conversation that is written as JSON; any other prompt as it is."""
    try:
        messages = json.loads(prompt) if prompt.startswith("[{") else None
        return str(messages[-1]["content"]) if messages else prompt
    except (ValueError, LookupError, TypeError):
        return prompt
