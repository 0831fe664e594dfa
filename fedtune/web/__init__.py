"""The page of runs: HTML made on this machine from the run store, and nothing else."""
