"""Texts for encoder-decoders end in one end token: their classifiers read the decoder's state at it."""

from tokenizers.processors import Sequence, TemplateProcessing
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from fedtune.errors import ModelError

__all__ = ["end_texts"]


def end_texts(tokenizer: PreTrainedTokenizerBase, source: str) -> None:
    """Make the tokenizer end every text so, unless it does; ModelError when it cannot.

    An end token spelt out inside a text is read as plain characters. Both are saved with the tokenizer.
    """
    end = tokenizer.eos_token
    if end is None or tokenizer.pad_token == end:
        raise ModelError(f"{source} has a tokenizer without an end token of its own; choose another model")
    tokenizer.split_special_tokens = True
    if tokenizer("a")["input_ids"][-1:] == [tokenizer.eos_token_id]:
        return
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ModelError(f"{source} has a tokenizer that puts no end token behind a text; choose another model")
    able = tokenizer.backend_tokenizer
    ending = TemplateProcessing(f"$A {end}", f"$A {end} $B {end}", [(end, int(tokenizer.eos_token_id))])
    able.post_processor = ending if able.post_processor is None else Sequence([able.post_processor, ending])
