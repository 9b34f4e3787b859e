"""A batch as rectangles [S, T], the naive form of its columns; and small batches by hand."""

import torch

from routing_replay.routes.batch import RaggedBatch


def batch_of(lengths, **columns):
    """Sequences of so many tokens, zeros but for the given columns; all labels were sampled."""
    num_positions = sum(lengths) - len(lengths)
    defaults = {
        "input_ids_N": torch.zeros(num_positions, dtype=torch.int64),
        "labels_N": torch.zeros(num_positions, dtype=torch.int64),
        "mask_N": torch.ones(num_positions, dtype=torch.bool),
        "logp_mu_N": torch.zeros(num_positions),
    }
    return RaggedBatch(**defaults | columns, lengths_S=torch.tensor(lengths))


def padded(batch, values_N, width):
    """A column as [S, width]: each sequence from the left, and zeros behind it."""
    rows, start = [], 0
    for length in batch.lengths_S.tolist():
        row = values_N.new_zeros(width, *values_N.shape[1:])
        row[: length - 1] = values_N[start : start + length - 1]
        start += length - 1
        rows.append(row)
    return torch.stack(rows)
