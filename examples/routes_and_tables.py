"""Routes, tables and token_rows, without an engine: needs torch, numpy and safetensors only.

    python examples/routes_and_tables.py [FILE.safetensors]

An inference engine returns, for each token of a sequence, the experts that each MoE layer selected.
`Routes` holds them for one sequence, `RouteTable` for all sequences of a training step, and
`token_rows` tells a batch which row belongs to which token.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

import routing_replay as rr
from routing_replay.analysis.inspection import inspect_table

# A model with four layers, of which the first is dense.
SHAPE = rr.MoEShape(layers=(1, 2, 3), num_experts=8, top_k=2)
LENGTHS = [7, 4]  # tokens of two sequences, prompt and response


def routes_of_a_rollout(num_tokens: int, seed: int) -> rr.Routes:
    """Return random routes; with SGLang, `routing_replay.rollout` returns them with the tokens.

    The last sampled token was never fed to the model, so there is one row less than tokens.
    """
    scores_TLE = np.random.default_rng(seed).random((num_tokens - 1, 3, SHAPE.num_experts))
    ids_TLK = np.argsort(-scores_TLE)[..., : SHAPE.top_k].astype(np.uint8)
    return rr.Routes(expert_ids_TLK=ids_TLK, layers=SHAPE.layers, num_experts=SHAPE.num_experts)


def main(path: Path) -> None:
    # 1. The step's routes, validated. The engine lost row 2 of the second sequence.
    sequences = [routes_of_a_rollout(n, seed) for seed, n in enumerate(LENGTHS)]
    sequences[1] = sequences[1].uncover(np.array([False, False, True]))

    # 2. One table, written once by rank 0 and memory-mapped by every rank of a node.
    rr.RouteTable.from_routes(sequences).save(path)
    table = rr.RouteTable.open(path)
    print(f"{path.name}: {table.num_rows} rows of {table.shape}\n")

    # 3. Which row belongs to which token. -1: padding, the last token, or no row: routes live.
    print("padded to [2, 8]:")
    print(table.token_rows(LENGTHS, width=8))
    print("packed (THD), each sequence padded to a multiple of 4:")
    print(table.token_rows(LENGTHS, cu_seqlens=[0, 8, 12]))
    for rank in (0, 1):
        part = table.token_rows(LENGTHS, cu_seqlens=[0, 8, 12], context=(rank, 2))
        print(f"the same on context-parallel rank {rank} of 2: {part.tolist()}")

    # 4. What replay does in layer 1: the table's experts, gates from the live logits.
    rows_T = table.token_rows(LENGTHS, width=8)[0]
    logits_TE = torch.randn(
        len(rows_T), SHAPE.num_experts, generator=torch.Generator().manual_seed(0)
    )
    live_TK = logits_TE.topk(SHAPE.top_k).indices
    replayed_TK = torch.from_numpy(table.gather([1], rows_T.numpy())[0]).long()
    selected_TK = torch.where(rows_T[:, None] >= 0, replayed_TK, live_TK)
    gates_TK = logits_TE.softmax(-1).gather(1, selected_TK)
    print("\ntoken  row  live experts  replayed experts  their gates")
    for token, row in enumerate(rows_T.tolist()):
        live, selected = str(live_TK[token].tolist()), str(selected_TK[token].tolist())
        gates = " ".join(f"{gate:.2f}" for gate in gates_TK[token])
        print(f"{token:5d} {row:4d}  {live:12s}  {selected:16s}  {gates}")

    # 5. What is in the file; the command line prints the same: routing-replay inspect FILE.
    print(f"\n{inspect_table(table).text()}")

    # 6. Wrong input is an error that says what, where, and what to do.
    try:
        table.token_rows([6, 4], width=8)
    except rr.TableError as error:
        print(f"\nThe routes of 7 tokens with a batch of 6:\n  {error}")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as folder:
            main(Path(folder) / "routes.safetensors")
