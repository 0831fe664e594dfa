"""What becomes of a reply: a checked contribution spooled to disk, or a record of why there is none."""

import math
from dataclasses import fields, replace
from pathlib import Path

from flwr.app import Error, Message, MetricRecord

from fedtune.answers import DECLINED
from fedtune.contribution import Contribution, Report, check
from fedtune.errors import ContributionError
from fedtune.federation import Late
from fedtune.files import write
from fedtune.merging import staleness_scale
from fedtune.tracking import ContributionRecord
from server.parts import Part

__all__ = ["aged", "missing", "receive"]


def receive(
    reply: Message,
    client: int,
    device: str,
    part: Part,
    max_norm: float | None,
    spool: Path,
    limit: str = "federation.max_norm",
) -> tuple[ContributionRecord, Contribution | None]:
    """The record of a reply, and the contribution when it is one that may be merged; ``limit`` is max_norm's key."""
    bytes_down = part.size
    if reply.has_error():
        return _absent(client, device, *_error(reply.error), bytes_down), None
    path = spool / f"client-{client:06d}.safetensors"
    try:
        write(path, _payload(reply))
        report = _report(reply.content.metric_records.get("report"))
        norm = check(path, part.expected, part.extras, max_norm, limit)
    except ContributionError as error:
        path.unlink(missing_ok=True)
        return _absent(client, device, "refused", str(error), bytes_down), None
    record = ContributionRecord(
        client=client,
        device=device,
        status="merged",
        reason=f"in micro-batches of {report.micro_batch}, to fit its memory" if report.micro_batch else "",
        examples=report.examples,
        bytes_down=bytes_down,
        bytes_up=path.stat().st_size,
        seconds=report.seconds,
        saved_bytes=report.saved_bytes,
        peak_rss=report.peak_rss,
        norm=norm,
        loss=report.loss,
    )
    return record, Contribution(client, report.examples, path, report.own, report.trained)


_LISTS = ("own_more", "own_after")


def aged(
    record: ContributionRecord, sent: Contribution | None, tau: int | None, late: Late | None
) -> tuple[ContributionRecord, Contribution | None]:
    """Both with how late they are: ``tau`` rounds, by which a delta is scaled."""
    if tau is None or late is None:
        return record, sent
    scaled = replace(sent, scale=staleness_scale(tau, late.staleness)) if sent is not None else None
    return replace(record, staleness=tau), scaled


def _error(error: Error) -> tuple[str, str]:
    """Status and reason; a device declines before it trains when its budget cannot hold what it is asked."""
    reason = error.reason or ""
    if reason.startswith(DECLINED):
        return "declined", reason.removeprefix(DECLINED)
    return "error", f"code {error.code}: {error.reason}"


def missing(client: int, device: str, bytes_down: int, reason: str) -> ContributionRecord:
    """The record of a client that did not answer in time."""
    return _absent(client, device, "missing", reason, bytes_down)


def _absent(client: int, device: str, status: str, reason: str, bytes_down: int) -> ContributionRecord:
    return ContributionRecord(
        client=client,
        device=device,
        status=status,
        reason=reason,
        examples=0,
        bytes_down=bytes_down,
        bytes_up=0,
        seconds=0.0,
        saved_bytes=0,
        peak_rss=0,
        norm=0.0,
        loss=0.0,
    )


def _payload(reply: Message) -> bytes:
    """Taken out of the reply: messages hold themselves in a cycle, and would keep it until the next collection."""
    record = reply.content.array_records.get("delta")
    if record is None or list(record) != ["safetensors"]:
        raise ContributionError("the reply carries no deltas; update the client")
    return record.pop("safetensors").data


def _report(record: MetricRecord | None) -> Report:
    if record is None or record.keys() != {field.name for field in fields(Report)}:
        raise ContributionError("the reply carries no report that fits; update the client")
    report = Report(**record)  # type: ignore[arg-type]
    strange = [name for name, figure in record.items() if isinstance(figure, list) != (name in _LISTS)]
    if strange:
        raise ContributionError(f"its report gives {strange[0]} as a list, or no list for one; update the client")
    if not isinstance(report.examples, int) or report.examples < 1:
        raise ContributionError(f"it counts {report.examples} examples; a contribution needs at least one")
    if not isinstance(report.own_predictions, int) or report.own_predictions < 0:
        raise ContributionError(f"it counts {report.own_predictions} held-out predictions; update the client")
    if not isinstance(report.micro_batch, int) or report.micro_batch < 0:
        raise ContributionError(f"it counts micro-batches of {report.micro_batch}; update the client")
    if any(math.isinf(figure) for figure in (*report.own_more, *report.own_after)) or len(report.own_after) == 1:
        raise ContributionError("its scores on held-out examples are none; check its data, or update the client")
    if not math.isfinite(report.own_loss) or not 0 <= report.own_accuracy <= 1:
        raise ContributionError("its score on held-out examples is none; check its data, or update the client")
    return report
