"""A message is handed to its device until the device tells that it is on its disk, or has answered it."""

from flwr.proto.fleet_pb2 import PullMessagesResponse
from flwr.proto.message_pb2 import Message, Metadata

from fedtune.server.gateway.redelivery import RedeliveryBuffer


def told(number: str) -> bytes:
    body: bytes = PullMessagesResponse(
        messages_list=[Message(metadata=Metadata(message_id=number))]
    ).SerializeToString()
    return body


def test_a_message_comes_again_until_it_is_held() -> None:
    handout = RedeliveryBuffer()
    assert handout.get_unconfirmed_message("one", "") is None
    handout.remember_message("one", told("a"))
    assert handout.get_unconfirmed_message("one", "") == told("a")
    assert handout.get_unconfirmed_message("one", "the one before") == told("a")
    assert handout.get_unconfirmed_message("one", "a") is None
    assert handout.get_unconfirmed_message("two", "") is None


def test_a_node_that_tells_nothing_of_what_it_holds_gets_nothing_twice() -> None:
    handout = RedeliveryBuffer()
    handout.remember_message("one", told("a"))
    assert handout.get_unconfirmed_message("one", None) is None


def test_an_empty_answer_takes_nothing_back_and_a_later_message_does() -> None:
    handout = RedeliveryBuffer()
    handout.remember_message("one", told("a"))
    handout.remember_message("one", PullMessagesResponse().SerializeToString())
    assert handout.get_unconfirmed_message("one", "") == told("a")
    handout.remember_message("one", told("b"))
    assert handout.get_unconfirmed_message("one", "a") == told("b")


def test_an_answered_message_does_not_come_again_and_an_older_answer_settles_nothing() -> None:
    handout = RedeliveryBuffer()
    handout.remember_message("one", told("b"))
    handout.remove_message("one", "a")
    handout.remove_message("two", "b")
    assert handout.get_unconfirmed_message("one", "a") == told("b")
    handout.remove_message("one", "b")
    assert handout.get_unconfirmed_message("one", "") is None


def test_an_answer_to_nothing_that_was_handed_out_settles_nothing() -> None:
    handout = RedeliveryBuffer()
    for held in ("", None, "a"):
        handout.remove_message("one", held)
    handout.remember_message("one", told("b"))
    handout.remove_message("one", "")
    assert handout.get_unconfirmed_message("one", "") == told("b")
