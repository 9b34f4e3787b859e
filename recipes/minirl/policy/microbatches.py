"""How the sequences of a step become microbatches of this rank, and tokens find their way back.

A microbatch is a grid [B, T]. Each cell names a position of the step (axis N of the batch), so that
one gather fills any layout: B padded sequences, or several packed ones in one row (B = 1, THD).
Padding exists in grids only.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from routing_replay.objectives.logprobs import Support
from routing_replay.routes.batch import RaggedBatch, position_bounds
from routing_replay.routes.token_rows import RowSource, context_positions

from ..rollout.batch import Batch

PADDING = -1  # cell of a grid that no position of the step fills


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Which token of the step each cell of a microbatch holds on this rank.

    Args:
        cell_BT: int64 index on the batch's axis N, or `PADDING`.
        position_BT: int64 position within the sequence; that of padding lies behind its end.
        index_BT: int64, the sequence's number within the microbatch.
        lengths: Positions of each sequence over all context-parallel ranks, padding included.
        is_packed: B is 1: the sequences follow each other in one row.
    """

    cell_BT: torch.Tensor
    position_BT: torch.Tensor
    index_BT: torch.Tensor
    lengths: tuple[int, ...]
    is_packed: bool

    def take(self, values_N: torch.Tensor) -> torch.Tensor:
        """Return the grid's cells of a column of the batch, [B, T, ...]; 0 in padding."""
        cell_BT = self.cell_BT.to(values_N.device)
        is_padding = (cell_BT == PADDING).view(*cell_BT.shape, *[1] * (values_N.dim() - 1))
        return values_N[cell_BT].masked_fill(is_padding, 0)

    def bounds(self) -> torch.Tensor:
        """Return where each sequence starts, and the end; int32 [sequences + 1]."""
        return torch.tensor([0, *self.lengths]).cumsum(0).int()


@dataclass(frozen=True, kw_only=True)
class Microbatch:
    """What one rank feeds to the model at once; [B, T] each, T being this rank's positions.

    Everything is on the model's device except `token_rows_BT` and `host_mask_BT`, which routing
    replay reads on the CPU.

    Args:
        sequences: Its sequences, as rows of the batch.
        mask_BT: bool, the label was sampled; `host_mask_BT` is the same on the CPU.
        version_BT: int32, of the weights that sampled the label; see `Batch`.
        index_T: The sequence's number within the microbatch, of the flattened positions.
        packed_lengths: Of packed sequences: `Grid.lengths`; None if they are padded.
        bounds: int32 [sequences + 1], where packed sequences start over all context-parallel
            ranks; None if they are padded.
        support, top_ids_TK, top_logp_mu_TK: Of the flattened positions.
        fixed: Further constants of the loss, flattened, by name in `LossInputs`.
    """

    sequences: tuple[int, ...]
    input_ids_BT: torch.Tensor
    position_ids_BT: torch.Tensor
    labels_BT: torch.Tensor
    mask_BT: torch.Tensor
    host_mask_BT: torch.Tensor
    logp_mu_BT: torch.Tensor
    advantages_BT: torch.Tensor
    version_BT: torch.Tensor
    token_rows_BT: torch.Tensor
    index_T: torch.Tensor
    packed_lengths: tuple[int, ...] | None = None
    bounds: torch.Tensor | None = None
    support: Support | None = None
    top_ids_TK: torch.Tensor | None = None
    top_logp_mu_TK: torch.Tensor | None = None
    fixed: Mapping[str, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Sharding:
    """This rank's share of a step under data and context parallelism.

    Args:
        data_rank, data_size: Data parallelism: its share of the sequences of every minibatch.
        context_rank, context_size: Context parallelism: its share of every sequence.
        minibatch_size: Sequences per update, over all ranks.
        microbatch_size: Padded sequences per forward pass of this rank, at most its share.
        microbatch_tokens: Pack sequences into microbatches of at most so many tokens (longer
            sequences stand alone); 0: pad them.
        multiple: What the parallel layout divides the length of a sequence by.
        device: Of the model.
        planned: The microbatches of each minibatch, if the step is planned; see `step_plan.py`.
    """

    data_rank: int = 0
    data_size: int = 1
    context_rank: int = 0
    context_size: int = 1
    minibatch_size: int
    microbatch_size: int = 1
    microbatch_tokens: int = 0
    multiple: int = 1
    device: torch.device = torch.device("cpu")
    planned: tuple[tuple[tuple[int, ...], ...], ...] | None = None

    def plan(self, lengths_S: torch.Tensor) -> list[list[tuple[int, ...]]]:
        """Return the sequences of this rank's microbatches, for each minibatch.

        All data-parallel ranks get the same number of microbatches.
        """
        if self.planned is not None:
            return [list(minibatch) for minibatch in self.planned]
        lengths = self.padded_lengths(lengths_S)
        starts = range(0, len(lengths), self.minibatch_size)
        if self.microbatch_tokens:
            return [self._packed(lengths, start) for start in starts]
        return [self._consecutive(start) for start in starts]

    def microbatch(
        self, batch: Batch, sequences: tuple[int, ...], source: RowSource | None
    ) -> Microbatch:
        """Gather one microbatch.

        Args:
            batch: The whole step's batch.
            sequences: Their rows in it.
            source: Of the rows of their routes, which are laid out exactly as the input ids; None:
                all tokens route live.
        """
        grid = self.grid(batch.lengths_S, sequences)
        host_mask_BT = grid.take(batch.mask_N)
        advantages_B = batch.advantages_S[list(sequences)]
        return Microbatch(
            sequences=sequences,
            input_ids_BT=self.to_device(grid.take(batch.input_ids_N)),
            position_ids_BT=self.to_device(grid.position_BT),
            labels_BT=self.to_device(grid.take(batch.labels_N)),
            mask_BT=self.to_device(host_mask_BT),
            host_mask_BT=host_mask_BT,
            logp_mu_BT=self.to_device(grid.take(batch.logp_mu_N)),
            advantages_BT=self.to_device(advantages_B[grid.index_BT]),
            version_BT=self.to_device(grid.take(batch.version_N)),
            token_rows_BT=token_rows(batch, sequences, grid, source),
            index_T=self.to_device(grid.index_BT.flatten()),
            packed_lengths=grid.lengths if grid.is_packed else None,
            bounds=self.to_device(grid.bounds()) if grid.is_packed else None,
            support=self._support(batch, grid),
            top_ids_TK=self._top(batch.top_ids_NK, grid, torch.int64),
            top_logp_mu_TK=self._top(batch.top_logp_mu_NK, grid, torch.float32),
        )

    def grid(self, lengths_S: torch.Tensor, sequences: Sequence[int]) -> Grid:
        """Return this rank's cells of a microbatch of these sequences."""
        lengths = self.padded_lengths(lengths_S[list(sequences)])
        is_packed = self.microbatch_tokens > 0
        if not is_packed:
            lengths = [max(lengths)] * len(lengths)
        join = _in_one_row if is_packed else torch.stack
        context = self.context_rank, self.context_size
        positions = [
            torch.from_numpy(context_positions([0, length], *context)) for length in lengths
        ]
        position_BT = join(positions)
        index_BT = join([torch.full_like(p, i) for i, p in enumerate(positions)])
        numbers = list(sequences)
        starts_B, num_B = position_bounds(lengths_S)[numbers], lengths_S[numbers] - 1
        cell_BT = torch.where(
            position_BT < num_B[index_BT], starts_B[index_BT] + position_BT, PADDING
        )
        return Grid(
            cell_BT=cell_BT,
            position_BT=position_BT,
            index_BT=index_BT,
            lengths=tuple(lengths),
            is_packed=is_packed,
        )

    def scatter(
        self, values: Mapping[tuple[int, ...], torch.Tensor], batch: RaggedBatch
    ) -> torch.Tensor:
        """Return [N] with this rank's tokens in their positions and 0 elsewhere.

        Args:
            values: The flattened tokens of each microbatch, by its sequences.
            batch: The step's batch.
        """
        values_N = torch.zeros(len(batch.mask_N), device=self.device)
        for sequences, values_T in values.items():
            cell_T = self.grid(batch.lengths_S, sequences).cell_BT.flatten()
            held_M = (cell_T != PADDING).nonzero().flatten()  # here no device is waited for
            values_N[cell_T[held_M].to(self.device)] = values_T.float()[held_M.to(self.device)]
        return values_N

    def to_device(self, values: torch.Tensor) -> torch.Tensor:
        """Copy to the model's device without waiting for it."""
        if self.device.type == "cpu":
            return values
        return values.pin_memory().to(self.device, non_blocking=True)

    def sequences(self, lengths_S: torch.Tensor) -> list[int]:
        """Return this rank's sequences of the step, ascending."""
        microbatches = [m for minibatch in self.plan(lengths_S) for m in minibatch]
        return sorted({sequence for microbatch in microbatches for sequence in microbatch})

    def padded_lengths(self, lengths_S: torch.Tensor) -> list[int]:
        """Return the positions of each sequence in a grid, alone and packed."""
        return (-(-(lengths_S - 1) // self.multiple) * self.multiple).tolist()

    def _consecutive(self, start: int) -> list[tuple[int, ...]]:
        share = self.minibatch_size // self.data_size
        size = min(self.microbatch_size, share)
        first = start + self.data_rank * share
        return [tuple(range(i, i + size)) for i in range(first, first + share, size)]

    def _packed(self, lengths: Sequence[int], start: int) -> list[tuple[int, ...]]:
        """The fewest balanced packs that keep the token budget, dealt out to the ranks."""
        sequences = range(start, start + self.minibatch_size)
        most = self.minibatch_size // self.data_size
        for count in range(1, most + 1):
            packs = balanced_packs(lengths, sequences, count * self.data_size)
            largest = max(sum(lengths[s] for s in pack) for pack in packs)
            if largest <= self.microbatch_tokens or count == most:
                break
        return packs[self.data_rank :: self.data_size]

    def _support(self, batch: Batch, grid: Grid) -> Support | None:
        if batch.support_ids_C is None:
            return None
        assert batch.support_offsets_N1 is not None
        starts_T = grid.take(batch.support_offsets_N1[:-1]).flatten()
        counts_T = grid.take(batch.support_offsets_N1[1:]).flatten() - starts_T
        offsets_T1 = torch.nn.functional.pad(counts_T.cumsum(0), (1, 0))
        within_C = torch.arange(int(offsets_T1[-1])) - offsets_T1[:-1].repeat_interleave(counts_T)
        ids_C = batch.support_ids_C[starts_T.repeat_interleave(counts_T) + within_C]
        return Support(ids_N=self.to_device(ids_C.long()), offsets_T1=offsets_T1)

    def _top(
        self, values_NK: torch.Tensor | None, grid: Grid, dtype: torch.dtype
    ) -> torch.Tensor | None:
        if values_NK is None:
            return None
        return self.to_device(grid.take(values_NK).flatten(0, 1).to(dtype))


def token_rows(
    batch: RaggedBatch, sequences: Sequence[int], grid: Grid, source: RowSource | None
) -> torch.Tensor:
    """Return the rows of a microbatch's routes in the layout of its grid, or -1; int64 [B, T]."""
    if source is None:
        return torch.full(grid.cell_BT.shape, -1)
    bounds = grid.bounds()
    lengths_B = batch.lengths_S[list(sequences)]
    rows_T = source.token_rows(lengths_B, cu_seqlens=bounds, sequences=sequences)
    return rows_T[bounds[grid.index_BT] + grid.position_BT]


def _in_one_row(parts: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat(parts)[None]


def balanced_packs(
    lengths: Sequence[int], sequences: Iterable[int], count: int
) -> list[tuple[int, ...]]:
    """Distribute sequences over `count` packs of about equally many tokens.

    The longest sequence that is left goes into the shortest pack (Graham 1969: the largest pack
    has at most 4/3 of the tokens of the best distribution's). No pack is empty if there are at
    least `count` sequences.
    """
    packs: list[list[int]] = [[] for _ in range(count)]
    shortest = [(0, number) for number in range(count)]
    for sequence in sorted(sequences, key=lambda s: (-lengths[s], s)):
        tokens, number = heapq.heappop(shortest)
        packs[number].append(sequence)
        heapq.heappush(shortest, (tokens + lengths[sequence], number))
    return [tuple(sorted(pack)) for pack in packs]
