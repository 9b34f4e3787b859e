"""What a run starts from: a checkpoint, tasks, verifiers."""
