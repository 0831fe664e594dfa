"""Run every attack: ``python -m tests.attacks`` ends with 0 when all were refused, recorded and harmless.

Words after it choose those attacks whose names hold one of them.
"""

import os
import signal
import sys
import tempfile
import time
from pathlib import Path

from tests.attacks import among_others, devices, in_a_round, machine, strangers
from tests.attacks.scene import Attack, Scene, scene

_SERVED_WITHIN = 1.0
"""Seconds; as much longer on a machine that is busy with something else, as there are processes waiting for a core."""
_MORE_MEMORY = 200 << 20
_WITHIN = 900
"""Seconds for all of it. On two quiet cores it takes 150 to 200."""
_ALL = [*machine.ATTACKS, *devices.ATTACKS, *among_others.ATTACKS, *in_a_round.ATTACKS, *strangers.ATTACKS]


def main(words: list[str]) -> int:
    signal.signal(signal.SIGALRM, _end)
    signal.alarm(_WITHIN)
    failed = 0
    chosen = [one for one in _ALL if not words or any(word in one.name for word in words)]
    with tempfile.TemporaryDirectory(prefix="fedtune-attacks-") as folder, scene(Path(folder)) as made:
        time.sleep(1.0)
        for attack in chosen:
            trouble = _tried(made, attack)
            failed += bool(trouble)
            for line in trouble:
                print(f"      FAILED: {line}", flush=True)
    print(f"{failed} attacks of consequence" if failed else "all refused, recorded and harmless")
    return 1 if failed else 0


def _end(*_: object) -> None:
    raise SystemExit(f"the attacks did not end within {_WITHIN} s")


def _tried(made: Scene, attack: Attack) -> list[str]:
    """Attack, and say what there is to complain of."""
    if why := attack.skip():
        print(f"skip  {attack.name}: {why}", flush=True)
        return []
    made.honest.look()
    memory, started = made.memory(), time.monotonic()
    try:
        told, trouble = attack.run(made), []
    except AssertionError as error:
        told, trouble = "not refused", [str(error)]
    longest, failures = made.honest.look()
    seconds = time.monotonic() - started
    if attack.recorded and not made.audit_mentions(attack.recorded):
        trouble.append(f"the audit does not mention {attack.recorded!r}")
    if made.server.process.poll() is not None:
        trouble.append(f"the server ended: {made.server.log.read_text()[-500:]}")
    allowed = _SERVED_WITHIN * max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))
    if failures or longest > allowed:
        trouble.append(f"the honest device waited {longest:.2f} s of {allowed:.1f}; {failures[:2]}")
    if made.memory() - memory > _MORE_MEMORY:
        trouble.append(f"the server holds {(made.memory() - memory) / 1e6:.0f} MB more")
    print(
        f"{'ok' if not trouble else 'BAD':5} {attack.name}: {told[:90]} ({seconds:.1f} s, honest {longest:.2f} s)",
        flush=True,
    )
    return trouble


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
