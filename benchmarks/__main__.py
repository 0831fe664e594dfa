"""All claims, one after the other: python -m benchmarks. Takes a day on two cores."""

import subprocess
import sys

CLAIMS = (
    "startup",
    "techniques",
    "architectures",
    "full_memory",
    "overhead",
    "server_memory",
    "engines",
    "kills",
    "central",
    "meft_gradients",
    "meft_depth",
    "meft_quality",
    "smollm2_step",
    "noisy_labels",
    "large_text",
    "deft minilm",
    "deft swiglu",
    "deft cost",
    "mobiletl_memory",
    "mobiletl_accuracy",
    "activation_pruning",
    "fedmef",
    "merge_values",
    "merge_cost",
    "adapters",
    "low_rank_default",
    "base_increments",
    "rebasin",
    "aim",
    "aim_federation",
    "asynchronous",
    "privacy",
    "chat_masks",
    "instruct_format",
    "device_phases",
    "device_crowd",
    "device_faults",
    "device_links",
)

for claim in CLAIMS:
    print(f"== {claim}", flush=True)
    subprocess.run([sys.executable, "-m", *f"benchmarks.{claim}".split()], check=True)
