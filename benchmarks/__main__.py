"""All claims, one after the other: python -m benchmarks. Takes about an hour on two cores."""

import subprocess
import sys

CLAIMS = ("startup", "techniques", "overhead", "server_memory", "engines", "kills", "central")

for claim in CLAIMS:
    print(f"== {claim}", flush=True)
    subprocess.run([sys.executable, "-m", f"benchmarks.{claim}"], check=True)
