"""Claim: the server's peak memory while it receives and merges 4, 16 and 64 contributions is flat within 1.2x of one.

For each number, three times, a fresh process holds a state of 16 M parameters (64 MB), receives that many replies
through the server's own path (spool, check), merges them, and reports its high-water mark over what it stood at before
the first. The median of the three counts.

Run: python -m benchmarks.server_memory
"""

import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict

from benchmarks.report import save
from fedtune import merging
from fedtune.files import write_bytes_atomically
from fedtune.flower.message_identity import set_node_identity
from fedtune.memory import peak_rss, reset_peak_rss
from fedtune.recipe.schema import Unit
from fedtune.server.class_payloads import ClassPayload
from fedtune.server.client_device import ClientDevice
from fedtune.server.replies import ExpectedReply, receive_update
from fedtune.wire.client_update import ClientReport, pack

COUNTS = (1, 4, 16, 64)
SHAPES = {f"layer.{index}.weight": (1000, 1000) for index in range(16)}


def main() -> None:
    peaks = {count: statistics.median(measured(count) for _ in range(3)) for count in COUNTS}
    ratios = {count: peak / peaks[1] for count, peak in peaks.items()}
    save("server_memory", {"state_bytes": 16 * 4_000_000, "peak_bytes": peaks, "ratio_to_one": ratios})


def measured(count: int) -> int:
    with tempfile.TemporaryDirectory() as folder:
        random = torch.Generator().manual_seed(0)
        write_bytes_atomically(
            Path(folder) / "sent", pack({name: torch.randn(shape, generator=random) for name, shape in SHAPES.items()})
        )
        command = [sys.executable, "-m", "benchmarks.server_memory", str(count), folder]
        return int(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def receive_and_merge(count: int, folder: Path) -> int:
    set_node_identity(1)
    state = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    reset_peak_rss()
    before = peak_rss()
    contributions = []
    for client in range(count):
        expected = ExpectedReply(client, ClientDevice("phone"), ClassPayload({}, SHAPES, {}))
        _, sent = receive_update(reply(client, folder / "sent"), expected, folder)
        assert sent is not None
        contributions.append(sent)
    merged = merging.merge_client_updates(merging.build_pipeline([Unit(name="mean")]), state, SHAPES, contributions)
    assert all(tensor.isfinite().all() for tensor in merged.values())
    return peak_rss() - before


def reply(client: int, sent: Path) -> Message:
    """A client's reply as it reaches the server: bytes, of which nothing is known yet."""
    payload = sent.read_bytes()
    delta = ArrayRecord({"safetensors": Array("uint8", (len(payload),), "safetensors", payload)})
    fields = ClientReport(10 + client, loss=1.0, seconds=1.0, activation_memory=0, peak_memory=0).to_fields()
    report = MetricRecord(fields)  # type: ignore[arg-type]
    return Message(RecordDict({"delta": delta, "report": report}), 1, "train")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(receive_and_merge(int(sys.argv[1]), Path(sys.argv[2])))
    else:
        main()
