"""What goes on around the steps: work of rank 0, files between nodes, checkpoints, metrics."""
