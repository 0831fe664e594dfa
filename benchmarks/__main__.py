"""All claims, one after the other: python -m benchmarks. Takes a day on two cores.

One that fails, for example because it needs a package that is not installed, does not stop the others.
"""

import subprocess
import sys

CLAIMS = (
    "startup",
    "submit_latency",
    "techniques",
    "plan",
    "architectures",
    "full_memory",
    "allocator",
    "overhead",
    "server_memory",
    "engines",
    "kills",
    "central",
    "meft_gradients",
    "meft_depth",
    "meft_quality",
    "smollm2_step",
    "keep_less",
    "paged",
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
    "robust_merges",
    "small_messages",
    "adapters",
    "low_rank_default",
    "base_increments",
    "rebasin",
    "aim",
    "aim_federation",
    "continual_merges",
    "asynchronous",
    "privacy",
    "drift",
    "continual_classes",
    "continual_text",
    "chat_masks",
    "instruct_format",
    "device_phases",
    "device_crowd",
    "device_faults",
    "device_links",
)

failed = []
for claim in CLAIMS:
    print(f"== {claim}", flush=True)
    done = subprocess.run([sys.executable, "-m", *f"benchmarks.{claim}".split()], check=False)
    failed += [claim] if done.returncode else []
if failed:
    sys.exit(f"these did not end well, see their messages above: {', '.join(failed)}")
