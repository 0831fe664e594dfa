"""Makes tokenizers of encoder-decoder models end each text in one end token.

Their sequence classifiers read the decoder's hidden state at the end token.
"""

from tokenizers.processors import Sequence, TemplateProcessing
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from fedtune.errors import ModelError

__all__ = ["end_texts"]


def end_texts(tokenizer: PreTrainedTokenizerBase, source: str) -> None:
    """Make the tokenizer append an end token to every text, unless it does already.

    An end token that is spelt out in a text is tokenised as plain characters. Both settings are saved with the
    tokenizer. Raises ModelError when the tokenizer does not support this.
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
