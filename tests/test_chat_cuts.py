"""Conversations that are longer than allowed keep a target and their row."""

import random

import pytest

from fedtune.data.encoded_conversations import encode_conversations
from fedtune.errors import FedtuneWarning
from tests.chat_examples import TEMPLATES, chat_table, make_conversations
from tests.test_chat_masks import Conversation, encode, talk, with_template

TEMPLATE = TEMPLATES["chatml"].plain


def measure(conversation: Conversation) -> int:
    [(ids, _)] = encode(TEMPLATE, [conversation])
    return len(ids)


def test_the_oldest_exchanges_go_and_the_system_prompt_stays() -> None:
    whole = talk("hello", "fine", "how are you?", "fine, thanks", "a", "b", system="be")
    for kept in (4, 2):
        shorter = whole[:1] + whole[-kept:]
        with pytest.warns(FedtuneWarning, match=r"^1 of 2 conv.* cut: 1 lack their oldest turns; each keeps a target"):
            [cut, other] = encode(TEMPLATE, [whole, whole[:1] + whole[-2:]], length=measure(shorter))
        assert cut == encode(TEMPLATE, [shorter])[0]
        assert other == encode(TEMPLATE, [whole[:1] + whole[-2:]])[0]


def test_an_exchange_goes_with_its_tool_calls() -> None:
    middle = [{"role": "tool", "content": "x"}, {"role": "assistant", "content": "b"}]
    whole = [*talk("hello", "fine"), *middle, *talk("how", "a")]
    with pytest.warns(FedtuneWarning, match="1 lack their oldest turns"):
        [cut] = encode(TEMPLATE, [whole], length=measure(whole) - 1)
    assert cut == encode(TEMPLATE, [talk("how", "a")])[0]


def test_a_long_reply_loses_its_end() -> None:
    long, length = talk("a", "fine, thanks" * 9), measure(talk("a", "")) + 3
    [(ids, mask)] = encode(TEMPLATE, [long])
    with pytest.warns(FedtuneWarning, match="are cut: 1 the end of the last one"):
        assert encode(TEMPLATE, [long], length=length) == [(ids[:length], mask[:length])]
    assert any(mask[:length])


def test_a_long_question_loses_its_beginning() -> None:
    [(ids, mask)] = encode(TEMPLATE, [talk("fine, thanks" * 9, "a")])
    with pytest.warns(FedtuneWarning, match="are cut: 1 the beginning of the last one"):
        found = encode(TEMPLATE, [talk("fine, thanks" * 9, "a")], length=12)
    assert found == [(ids[-13:-1], mask[-13:-1])]  # without the line break behind the last target
    assert found[0][1][-1]


@pytest.mark.filterwarnings("ignore::fedtune.errors.FedtuneWarning")
@pytest.mark.parametrize("loss_on", ["assistant", "completion", "all"])
def test_each_row_stays_and_has_a_target_that_is_predicted(loss_on: str) -> None:
    conversations = make_conversations(60, seed=2)
    for length in random.Random(1).sample(range(2, 90), 8):
        found = encode(TEMPLATE, conversations, loss_on, length)  # type: ignore[arg-type]
        assert all(len(ids) <= length and any(mask[1:]) for ids, mask in found)


def test_nothing_is_said_where_all_fits() -> None:
    encode_conversations(chat_table(make_conversations(5)), with_template(TEMPLATE), 999, "assistant")
