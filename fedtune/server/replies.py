"""What becomes of a reply: a checked contribution spooled to disk, or a record of why there is none."""

from dataclasses import replace
from pathlib import Path

from flwr.app import Error, Message

from fedtune.errors import ClientUpdateError
from fedtune.files import write_bytes_atomically
from fedtune.merging import compute_staleness_weight
from fedtune.recipe.federation import Asynchronous
from fedtune.server.class_payloads import ClassPayload
from fedtune.server.client_device import ClientDevice
from fedtune.server.reports import MOST_EXAMPLES, read_report
from fedtune.tracking import ClientRecord
from fedtune.untrusted import clean_text
from fedtune.wire.client_update import ClientUpdate
from fedtune.wire.error_codes import DECLINED_PREFIX, REFUSED
from fedtune.wire.protocol_codes import parse_problem
from fedtune.wire.update_checks import check

_LONGEST_REASON = 400
"""Characters that are kept of why an update is refused: it may quote names that its device chose."""

__all__ = ["make_missing_record", "read_error", "receive_update", "scale_by_staleness"]


def receive_update(
    reply: Message,
    client: int,
    device: ClientDevice,
    part: ClassPayload,
    max_norm: float | None,
    spool: Path,
    limit: str = "federation.max_update_norm",
    most_examples: int = MOST_EXAMPLES,
    bytes_down: int = 0,
) -> tuple[ClientRecord, ClientUpdate | None]:
    """The record of a reply, and the contribution when it is one that may be merged; ``limit`` is max_norm's key.

    ``most_examples`` is what the client can have trained on in the round, ``bytes_down`` what it was sent. Nothing of a
    payload that is larger than the round expects is read or written.
    """
    if reply.has_error():
        return _absent(client, device, *read_error(reply.error), bytes_down), None
    path = spool / f"client-{client:06d}.safetensors"
    try:
        payload = _payload(reply, part.most_bytes)
        report = read_report(reply.content.metric_records.get("report"), most_examples)
        write_bytes_atomically(path, payload)
        norm = check(path, part.expected_shapes, part.extra_payload_specs, max_norm, limit)
    except ClientUpdateError as error:
        path.unlink(missing_ok=True)
        return _absent(client, device, "rejected", clean_text(error, _LONGEST_REASON), bytes_down), None
    record = ClientRecord(
        client=client,
        device_class=device.device_class,
        device_name=device.device_name,
        status="merged",
        reason=f"in micro-batches of {report.micro_batch}, to fit its memory" if report.micro_batch else "",
        num_examples=report.examples,
        bytes_down=bytes_down,
        bytes_up=path.stat().st_size,
        seconds=report.seconds,
        activation_memory=report.saved_bytes,
        peak_memory=report.peak_rss,
        update_norm=norm,
        train_loss=report.loss,
    )
    return record, ClientUpdate(client, report.examples, path, report.local_metrics, report.trained)


def scale_by_staleness(
    record: ClientRecord, sent: ClientUpdate | None, tau: int | None, late: Asynchronous | None
) -> tuple[ClientRecord, ClientUpdate | None]:
    """Both with how late they are: ``tau`` rounds, by which a delta is scaled."""
    if tau is None or late is None:
        return record, sent
    scaled = replace(sent, scale=compute_staleness_weight(tau, late.staleness_exponent)) if sent is not None else None
    return replace(record, staleness=tau), scaled


def read_error(error: Error) -> tuple[str, str]:
    """Status and reason; a device declines before it trains when its budget cannot hold what it is asked."""
    told = error.reason or ""
    if error.code == REFUSED:
        return "rejected", clean_text(told)
    status = "declined" if told.startswith(DECLINED_PREFIX) else "error"
    reason = told.removeprefix(DECLINED_PREFIX)
    if problem := parse_problem(reason):
        return status, problem.remote_sentence
    shown = clean_text(reason)
    return status, shown if status == "declined" else f"code {error.code}: {shown}"


def make_missing_record(client: int, device: ClientDevice, bytes_down: int, reason: str) -> ClientRecord:
    """The record of a client that did not answer in time."""
    return _absent(client, device, "missing", reason, bytes_down)


def _absent(client: int, device: ClientDevice, status: str, reason: str, bytes_down: int) -> ClientRecord:
    return ClientRecord(
        client=client,
        device_class=device.device_class,
        device_name=device.device_name,
        status=status,
        reason=reason,
        num_examples=0,
        bytes_down=bytes_down,
        bytes_up=0,
        seconds=0.0,
        activation_memory=0,
        peak_memory=0,
        update_norm=0.0,
        train_loss=0.0,
    )


def _payload(reply: Message, most: int) -> bytes:
    """Taken out of the reply: messages hold themselves in a cycle, and would keep it until the next collection."""
    record = reply.content.array_records.get("delta")
    if record is None or list(record) != ["safetensors"]:
        raise ClientUpdateError("the reply carries no deltas; update the client")
    payload = record.pop("safetensors").data
    if len(payload) > most:
        raise ClientUpdateError(f"it holds {len(payload)} bytes, and this round expects {most} at most")
    return payload
