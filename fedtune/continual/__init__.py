"""Fine-tuning over a stream of tasks: what keeps memory of the past, and what tells that the data changed."""
