"""What a device may send as an answer is bounded by what its round asks for."""

from collections.abc import Mapping

import pytest
from flwr.app import Array, ArrayRecord, RecordDict
from flwr.proto.fleet_pb2 import PushMessagesRequest
from flwr.proto.message_pb2 import Message, Metadata, ObjectTree, PushObjectRequest
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree

from fedtune.flower import train_messages
from fedtune.server.gateway.refusal import RequestRefusedError
from fedtune.server.gateway.uploads import Uploads

MEGABYTE = 1 << 20


def announced(content: RecordDict, order: str = "order") -> bytes:
    message = Message(metadata=Metadata(run_id=7, reply_to_message_id=order))
    request = PushMessagesRequest(messages_list=[message], message_object_trees=[get_object_tree(content)])
    return bytes(request.SerializeToString())


def objects(content: RecordDict) -> Mapping[str, bytes]:
    return {name: one.deflate() for name, one in get_all_nested_objects(content).items()}


def pushed(name: str, content: bytes) -> bytes:
    return bytes(PushObjectRequest(run_id=7, object_id=name, object_content=content).SerializeToString())


def send(uploads: Uploads, content: RecordDict, *, backwards: bool = False) -> int:
    """Send an answer whole; bytes that went over the wire."""
    uploads.begin("dev", announced(content))
    sent = 0
    pieces = list(objects(content).items())
    for name, piece in reversed(pieces) if backwards else pieces:
        uploads.add("dev", pushed(name, piece))
        sent += len(piece)
    return sent


def answer(count: int) -> RecordDict:
    return train_messages.make_update_record(bytes(range(256)) * (count // 256), {"examples": 3})


def test_an_answer_as_its_round_asks_for_passes_and_may_be_sent_again() -> None:
    uploads = Uploads(lambda run: {7: 13 * MEGABYTE}[run])
    for _ in range(3):
        send(uploads, answer(12 * MEGABYTE))


@pytest.mark.parametrize("backwards", [False, True])
def test_equal_pieces_count_as_often_as_they_occur(backwards: bool) -> None:
    bomb = train_messages.make_update_record(
        b"\0" * (120 * 5 * MEGABYTE), {"examples": 3}
    )  # 600 MB of zeros, 5 MB on the wire
    with pytest.raises(RequestRefusedError, match=r"its reply has \d+ bytes; the limit of the round is \d+|120 chunks"):
        send(Uploads(lambda _: 8 * MEGABYTE), bomb, backwards=backwards)
    assert send(Uploads(lambda _: 601 * MEGABYTE), bomb) < 6 * MEGABYTE


def test_more_than_the_round_asks_for_is_refused_as_it_comes() -> None:
    with pytest.raises(RequestRefusedError, match=r"the limit of the round is 31000") as refused:
        send(Uploads(lambda _: 31_000), answer(400_000))
    assert (refused.value.status, refused.value.actor) == (413, "dev")


def test_another_announcement_of_the_same_answer_does_not_begin_to_count_anew() -> None:
    uploads, content = Uploads(lambda _: MEGABYTE), answer(3 * MEGABYTE)
    for name, piece in list(objects(content).items()):
        uploads.begin("dev", announced(content))
        if len(piece) > MEGABYTE:
            with pytest.raises(RequestRefusedError, match="the limit of the round is"):
                uploads.add("dev", pushed(name, piece))


def test_objects_that_were_not_announced_are_refused() -> None:
    uploads = Uploads(lambda _: MEGABYTE)
    name, piece = next(iter(objects(answer(256)).items()))
    with pytest.raises(RequestRefusedError, match="announce the reply again"):
        uploads.add("dev", pushed(name, piece))
    uploads.begin("dev", announced(answer(512)))
    with pytest.raises(RequestRefusedError, match="announce the reply again"):
        uploads.add("dev", pushed("f" * 64, piece))


@pytest.mark.parametrize(
    "body",
    [
        b'{"arraychunk_ids": [5]}',
        b'{"arraychunk_ids": "none"}',
        b"{}",
        b"[" * 3000,
        b"\xff",
        b'{"arraychunk_ids": [' + b"0," * 100_000 + b"0]}",
    ],
)
def test_an_array_that_cannot_be_read_is_refused(body: bytes) -> None:
    uploads = Uploads(lambda _: MEGABYTE)
    content = RecordDict({"delta": ArrayRecord({"safetensors": Array("uint8", (1,), "safetensors", b"x")})})
    uploads.begin("dev", announced(content))
    [name] = [name for name, piece in objects(content).items() if piece.startswith(b"Array ")]
    with pytest.raises(RequestRefusedError, match=r"cannot be read|too many for its round"):
        uploads.add("dev", pushed(name, b"Array %s %d\0%s" % (b"a" * 64, len(body), body)))


def test_trees_that_are_too_deep_or_too_wide_and_what_is_no_request_are_refused() -> None:
    uploads = Uploads(lambda _: MEGABYTE)
    deep = ObjectTree(object_id="0")
    for number in range(40):
        deep = ObjectTree(object_id=str(number), children=[deep])
    wide = ObjectTree(object_id="0", children=[ObjectTree(object_id=str(number)) for number in range(5000)])
    message = Message(metadata=Metadata(run_id=7))
    for tree in (deep, wide):
        request = PushMessagesRequest(messages_list=[message], message_object_trees=[tree])
        with pytest.raises(RequestRefusedError, match="too many objects"):
            uploads.begin("dev", request.SerializeToString())
    with pytest.raises(RequestRefusedError, match="one message"):
        uploads.begin("dev", PushMessagesRequest(messages_list=[message] * 2).SerializeToString())
    with pytest.raises(RequestRefusedError, match="cannot be read"):
        uploads.begin("dev", b"\xff\xff\xff")
