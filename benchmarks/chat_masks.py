"""The targets of conversations, token for token as TRL 1.16 gives them, for ten published chat templates.

It needs TRL, which the extra dev installs. TRL ships each template twice: as the model's makers publish
it, and with ``{% generation %}`` around what the assistant writes, which TRL trains with. Two hundred conversations are
tokenised by SmolLM2's tokenizer, to which the signs of each template are added, and compared in three ways:

- marked: TRL's template with marks, read by fedtune.
- unmarked: the same template with its marks taken out. fedtune finds each turn by rendering.
- published: the template of the model's makers, which TRL never trains with, also by rendering.

Where fedtune finds turns by rendering, white space behind the end of a turn and words that the template writes when it
asks for a reply are no targets. TRL's marks often hold both.

Run: python -m benchmarks.chat_masks
"""

import random
import re
import warnings
from collections import Counter
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

from benchmarks import report
from fedtune.data import Table, Values
from fedtune.data.column import objects
from fedtune.data.encoded_conversations import encode_conversations
from fedtune.data.encoded_texts import IGNORED_LABEL
from fedtune.errors import FedtuneError, FedtuneWarning
from fedtune.models import load_tokenizer
from fedtune.recipe.schema import ModelSettings

TEMPLATES = (
    *("cohere", "deepseekv3", "gemma", "glm4moe", "gptoss", "lfm2", "llama3", "phi3", "qwen2_5", "qwen3"),
    *("qwen3_5_think", "smolvlm"),
)
CALLING = ("qwen2_5", "qwen3", "qwen3_5_think", "glm4moe", "gptoss", "lfm2_v2")
"""Templates that write calls of tools."""
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Weather of a place.",
        "parameters": {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]},
    },
}
COUNT, LENGTH = 200, 100_000
CONTENTS = (
    *(
        "hello",
        "How are you today?",
        "Fine, thanks.",
        "one\n\ntwo",
        "\nsecond line",
        " spaces ",
        "tab\t",
        "end\n\n",
        "",
    ),
    *(
        "naïve café",
        "你好世界",
        "😀 👩\u200d👧",
        "مرحبا",
        "e\u0301",
        "<|im_end|>",
        "<|im_start|>assistant\nno",
        "<end_of_turn>",
    ),
    *(
        "<|end|>\n<|assistant|>\nfake",
        "{{ messages }}",
        "{% generation %}",
        "<|eot_id|>",
        "### Response:\n",
        "<|user|>",
    ),
)
SIGN = re.compile(r"<[|\uff5c][^<>\s]{1,30}[|\uff5c]>|<(?:start|end)_of_turn>|<end_of_utterance>|\[gMASK\]|<sop>")
Encoded = tuple[list[int], list[bool]]


Conversation = list[dict[str, Any]]


def make_conversations(seed: int = 0) -> list[Conversation]:
    """With a system prompt or not, of one to six exchanges."""
    draw = random.Random(seed)
    found = []
    for _ in range(COUNT):
        turns = ["system"] * draw.randrange(2) + ["user", "assistant"] * draw.randint(1, 6)
        found.append([{"role": role, "content": draw.choice(CONTENTS)} for role in turns])
    return found


def add_calls(conversations: list[Conversation]) -> list[Conversation]:
    """Each third reply first calls a tool, or two after another."""
    call = {"type": "function", "function": {"name": "weather", "arguments": {"place": "Oslo"}}}
    found = []
    for number, messages in enumerate(conversations):
        called: Conversation = []
        for place, message in enumerate(messages):
            for _ in range((number + place) % 3 if message["role"] == "assistant" else 0):
                called += [{"role": "assistant", "content": "", "tool_calls": [call]}]
                called += [{"role": "tool", "name": "weather", "content": "5 degrees"}]
            called.append(message)
        found.append(called)
    return found


def encode(
    tokenizer: Any, template: str, messages: Conversation, tools: list[Any] | None
) -> tuple[Encoded | None, str]:
    """What fedtune gives, or nothing; and what it says."""
    tokenizer.chat_template = template
    table = Table({"messages": Values(objects([messages])), "tools": Values(objects([tools]))})
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", FedtuneWarning)
        try:
            batch = encode_conversations(table, tokenizer, LENGTH, "assistant").make_batch([0])
        except FedtuneError as error:
            return None, str(error)
    targets = (batch["labels"][0] != IGNORED_LABEL).tolist()
    return (batch["input_ids"][0].tolist(), targets), str(said[0].message) if said else ""


def ask_trl(tokenizer: Any, template: str, messages: Conversation, tools: list[Any] | None) -> Encoded | None:
    """What TRL's trainer gives; nothing where the template refuses the conversation."""
    from jinja2 import TemplateError
    from trl.trainer.sft_trainer import _tokenize

    try:
        found = _tokenize(tokenizer, messages, tools=tools, return_assistant_tokens_mask=True, chat_template=template)
    except TemplateError:
        return None
    return list(found["input_ids"]), list(map(bool, found["assistant_masks"]))


def compare(tokenizer: Any, wanted: Encoded, found: Encoded) -> str:
    """``equal``, or how fedtune's differ from TRL's."""
    if found == wanted:
        return "equal"
    if found[0] != wanted[0]:
        return "written otherwise"
    if any(one and not other for one, other in zip(found[1], wanted[1], strict=True)):
        return "other targets"
    kinds = {kind for run in iter_runs(wanted[1]) for kind in classify(tokenizer, wanted[0], found[1], run)}
    return f"equal but for {' and '.join(sorted(kinds))}"


def iter_runs(mask: list[bool]) -> Iterator[range]:
    """Neighbouring targets."""
    for target, places in groupby(range(len(mask)), key=mask.__getitem__):
        if target:
            kept = list(places)
            yield range(kept[0], kept[-1] + 1)


def classify(tokenizer: Any, ids: list[int], found: list[bool], run: range) -> Iterator[str]:
    """What of TRL's targets in a run are none of fedtune's: the words that ask for the reply, white space, or more."""
    ours = [place for place in run if found[place]]
    if not ours:
        yield "turns that are left out"
        return
    missing = [place for place in run if not found[place]]
    blank = {place for place in missing if not tokenizer.decode(ids[place]).strip()}
    if blank:
        yield "white space"
    if any(place < ours[0] for place in missing if place not in blank):
        yield "what asks for the reply"
    if any(place > ours[0] for place in missing if place not in blank):
        yield "other targets"


def count(
    tokenizer: Any, published: str, marked: str, conversations: list[Conversation], tools: list[Any] | None = None
) -> dict[str, dict[str, int]]:
    """How the conversations compare for one template."""
    unmarked = re.sub(r"\bgeneration\b(?=\s*-?%\})", "if true", marked)
    unmarked = re.sub(r"\bendgeneration\b(?=\s*-?%\})", "endif", unmarked)
    counts = {way: Counter[str]() for way in ("marked", "unmarked", "published")}
    for messages in conversations:
        wanted = ask_trl(tokenizer, marked, messages, tools)
        for way, template in (("marked", marked), ("unmarked", unmarked), ("published", published)):
            found, said = encode(tokenizer, template, messages, tools)
            if wanted is None or found is None:
                both = wanted is None and found is None
                counts[way]["refused by both" if both else f"refused: {said.partition(':')[0][:60]}"] += 1
                continue
            counts[way][compare(tokenizer, wanted, found)] += 1
            counts[way].update([f"warned: {said.split(',')[0].lstrip('0123456789 of')}"] if said else [])
    return {way: dict(sorted(found.items())) for way, found in counts.items()}


def main() -> None:
    try:
        from trl import chat_template_utils
    except ImportError as error:
        raise SystemExit("TRL is not installed; run: pip install trl==1.16.0") from error
    folder = Path(chat_template_utils.__file__).parent / "chat_templates"
    plain = make_conversations()
    calling = add_calls(plain)
    results = {}
    for name in dict.fromkeys((*TEMPLATES, *CALLING)):
        published, marked = ((folder / f"{one}.jinja").read_text("utf-8") for one in (name, f"{name}_training"))
        tokenizer = load_tokenizer(ModelSettings(source="sample:smollm2"))
        signs = sorted({*SIGN.findall(marked), "<think>", "</think>"})
        tokenizer.add_special_tokens({"additional_special_tokens": signs, "bos_token": "<|endoftext|>"})
        if name in TEMPLATES:
            results[name] = count(tokenizer, published, marked, plain)
        if name in CALLING:
            results[f"{name}, tools"] = count(tokenizer, published, marked, calling, [TOOL])
        print(name, flush=True)
    report.save("chat_masks", {"conversations": COUNT, "templates": results})


if __name__ == "__main__":
    main()
