"""A reply becomes a checked client update on disk, or a record that says why there is none."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from flwr.app import Error, Message

from fedtune.errors import ClientUpdateError
from fedtune.files import write_bytes_atomically
from fedtune.merging import compute_staleness_weight
from fedtune.recipe.federation import Asynchronous
from fedtune.recipe.memory_plans import MemoryPlans, PlanOption
from fedtune.recipe.required_plug_ins import RequiredPlugIn, describe_plug_ins
from fedtune.server.class_payloads import ClassPayload
from fedtune.server.client_device import ClientDevice
from fedtune.server.reports import MOST_EXAMPLES, read_report
from fedtune.server.update_decoding import UpdateDecoder
from fedtune.tracking import ClientRecord
from fedtune.untrusted import clean_text
from fedtune.wire.client_update import ClientReport, ClientUpdate
from fedtune.wire.error_codes import DECLINED_PREFIX, REFUSED
from fedtune.wire.protocol_codes import LACKS_PLUG_IN, parse_problem
from fedtune.wire.update_checks import NO_NORM_LIMIT, NormLimit, check_client_update
from fedtune.wire.update_message import Estimates

_LONGEST_REASON = 400
"""The number of characters of a refusal's reason that are stored. It may quote names that the device chose."""

__all__ = ["ExpectedReply", "make_missing_record", "read_error", "receive_update", "scale_by_staleness"]


@dataclass(frozen=True)
class ExpectedReply:
    """What the server expects of one client in a round.

    ``most_examples`` is the number the client can have trained on; ``bytes_down`` is what it was sent. ``plug_ins`` are
    those that the recipe needs. ``num_tasks`` is the number of distinct tasks of its stream. ``plans`` are those of the
    recipe, None without any. ``decoder`` is that of coded updates, None without codecs.
    """

    client: int
    device: ClientDevice
    payload: ClassPayload
    norm_limit: NormLimit = NO_NORM_LIMIT
    most_examples: int = MOST_EXAMPLES
    bytes_down: int = 0
    plug_ins: Sequence[RequiredPlugIn] = ()
    num_tasks: int = 0
    plans: MemoryPlans | None = None
    decoder: UpdateDecoder | None = None


def receive_update(reply: Message, expected: ExpectedReply, spool: Path) -> tuple[ClientRecord, ClientUpdate | None]:
    """Return the record of a reply, and the update if it may be merged.

    Nothing of a payload that is larger than the round expects is read or written.
    """
    if reply.has_error():
        return _make_absent_record(expected, *read_error(reply.error, expected.plug_ins)), None
    path = spool / f"client-{expected.client:06d}.safetensors"
    try:
        payload = _payload(reply, expected.payload.most_bytes)
        report = read_report(reply.content.metric_records.get("report"), expected.most_examples, expected.num_tasks)
        plan = _find_plan(report, expected.plans)
        earlier = _write_update(payload, expected.decoder, path)
        norm = check_client_update(
            path, expected.payload.expected_shapes, expected.payload.extra_payload_specs, expected.norm_limit
        )
        if expected.decoder is not None:
            expected.decoder.keep_estimates(path, earlier)
    except ClientUpdateError as error:
        path.unlink(missing_ok=True)
        return _make_absent_record(expected, "rejected", clean_text(error, _LONGEST_REASON)), None
    record = ClientRecord(
        client=expected.client,
        device_class=expected.device.device_class,
        device_name=expected.device.device_name,
        status="merged",
        reason=f"in micro-batches of {report.micro_batch_size}, to fit its memory" if report.micro_batch_size else "",
        num_examples=report.num_examples,
        bytes_down=expected.bytes_down,
        bytes_up=len(payload),
        seconds=report.seconds,
        activation_memory=report.activation_memory,
        peak_memory=report.peak_memory,
        update_norm=norm,
        train_loss=report.loss,
        device_type=report.device_type,
        accelerator_memory=report.accelerator_memory,
        accelerator_reserved=report.accelerator_reserved,
        stored_bytes=report.stored_bytes,
        anonymous_memory=report.anonymous_memory,
        file_memory=report.file_memory,
        predicted_anonymous=None if plan is None else plan.anonymous_bytes,
        predicted_total=None if plan is None else plan.total_bytes,
    )
    scores = report.holdout_metrics, report.trained_metrics
    return record, ClientUpdate(
        expected.client,
        report.num_examples,
        path,
        *scores,
        task_figures=report.task_figures,
        drift=report.drift,
        device_type=report.device_type,
    )


def _write_update(payload: bytes, decoder: UpdateDecoder | None, path: Path) -> Estimates:
    """Write the update, decoded, and return the estimates that a coded one goes on from."""
    if decoder is not None:
        return decoder.write_update(payload, path)
    write_bytes_atomically(path, payload)
    return {}


def _find_plan(report: ClientReport, plans: MemoryPlans | None) -> PlanOption | None:
    """Return the plan that a client trained with; raise ClientUpdateError if the recipe has no such plan."""
    if report.plan_number is None:
        return None
    count = 0 if plans is None else len(plans.options)
    if plans is None or report.plan_number >= count:
        raise ClientUpdateError(
            f"its report names plan {report.plan_number}, and the recipe has {count}; update the client"
        )
    return plans.options[report.plan_number]


def scale_by_staleness(
    record: ClientRecord, update: ClientUpdate | None, staleness: int | None, asynchronous: Asynchronous | None
) -> tuple[ClientRecord, ClientUpdate | None]:
    """Return both with their staleness in rounds, by which the delta is scaled; as they are if none can be stale."""
    if staleness is None or asynchronous is None:
        return record, update
    weight = compute_staleness_weight(staleness, asynchronous.staleness_exponent)
    scaled = None if update is None else replace(update, scale=weight)
    return replace(record, staleness=staleness), scaled


def read_error(error: Error, plug_ins: Sequence[RequiredPlugIn] = ()) -> tuple[str, str]:
    """Return status and reason. A device declines before it trains if its memory budget is too small.

    The reason of a device that may lack a plug-in tells which ones the recipe needs.
    """
    sent = error.reason or ""
    if error.code == REFUSED:
        return "rejected", clean_text(sent)
    status = "declined" if sent.startswith(DECLINED_PREFIX) else "error"
    reason = sent.removeprefix(DECLINED_PREFIX)
    if problem := parse_problem(reason):
        needed = plug_ins if problem.code in LACKS_PLUG_IN else ()
        more = f"; the recipe needs {describe_plug_ins(needed)}" if needed else ""
        return status, problem.remote_sentence + more
    shown = clean_text(reason)
    return status, shown if status == "declined" else f"code {error.code}: {shown}"


def make_missing_record(client: int, device: ClientDevice, bytes_down: int, reason: str) -> ClientRecord:
    """Return the record of a client that sent no reply in time."""
    return _make_empty_record(client, device, "missing", reason, bytes_down)


def _make_absent_record(expected: ExpectedReply, status: str, reason: str) -> ClientRecord:
    return _make_empty_record(expected.client, expected.device, status, reason, expected.bytes_down)


def _make_empty_record(client: int, device: ClientDevice, status: str, reason: str, bytes_down: int) -> ClientRecord:
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
    """Take the payload out of the reply: messages refer to themselves, and would keep it until the next collection."""
    record = reply.content.array_records.get("delta")
    if record is None or list(record) != ["safetensors"]:
        raise ClientUpdateError("the reply carries no deltas; update the client")
    payload = record.pop("safetensors").data
    if len(payload) > most:
        raise ClientUpdateError(f"it holds {len(payload)} bytes, and this round expects {most} at most")
    return payload
