"""Naive references: plain Python loops over float64 numbers, one token at a time, no torch."""

import math


def softmax(logits):
    largest = max(logits)
    weights = [math.exp(x - largest) for x in logits]
    return [weight / sum(weights) for weight in weights]


def router_distribution(logits, score_function):
    """The router distribution of one token as docs/metrics.md defines it."""
    if score_function == "softmax":
        return softmax(logits)
    if score_function == "sigmoid":
        scores = [1 / (1 + math.exp(-x)) for x in logits]
    else:
        scores = [math.sqrt(math.log1p(math.exp(x))) for x in logits]
    return [score / sum(scores) for score in scores]


def top_k(values, k):
    return sorted(range(len(values)), key=lambda e: -values[e])[:k]


def kl(mu, pi):
    return sum(p * math.log(p / q) for p, q in zip(mu, pi, strict=True) if p > 0)


def bucket_kl(mu, pi, ids):
    """KL on the buckets {each of ids} + {everything else}."""
    mu_ids, pi_ids = [mu[e] for e in ids], [pi[e] for e in ids]
    return kl([*mu_ids, 1 - sum(mu_ids)], [*pi_ids, 1 - sum(pi_ids)])


def agreement(replayed, selection, probs):
    """All agreement statistics of one token in one layer.

    Args:
        replayed: Ids that were replayed.
        selection: What the live top-k compared, one value per expert.
        probs: Live router distribution.
    """
    live = top_k(selection, len(replayed))
    left_out = [selection[e] for e in range(len(selection)) if e not in live]
    mass = sum(probs[e] for e in replayed)
    return {
        "overlap": len(set(replayed) & set(live)) / len(replayed),
        "exact_match": float(set(replayed) == set(live)),
        "live_mass": mass,
        "replay_bias": math.log(sum(probs[e] for e in live) / mass),
        "margin": min(selection[e] for e in live) - max(left_out),
    }


def context_positions(segments, rank, size):
    """Positions that one context rank holds of segments (start, stop), by walking over them."""
    held = []
    for start, stop in segments:
        chunk = (stop - start) // (2 * size) or 1
        for mine in (rank, 2 * size - 1 - rank):
            held += [p for p in range(start, stop) if (p - start) // chunk == mine]
    return held if size > 1 else [p for start, stop in segments for p in range(start, stop)]


def token_rows(table, batch, rank, size):
    """Rows of a batch, token by token.

    Args:
        table: A RouteTable.
        batch: For each segment (number in the table or -1, tokens, positions).
    """
    line, segments = [], []
    for number, num_tokens, num_positions in batch:
        segments.append((len(line), len(line) + num_positions))
        for position in range(num_positions):
            row = int(table.offsets_S1[number]) + position
            has_row = number >= 0 and position < num_tokens - 1
            line.append(row if has_row and table.covered_T[row] else -1)
    return [line[p] for p in context_positions(segments, rank, size)]


def expert_counts(table):
    """Covered rows of each sequence that select each expert, slot by slot: lists [S][L][E]."""
    shape, counts = table.shape, []
    for start, stop in zip(table.offsets_S1[:-1], table.offsets_S1[1:], strict=True):
        counts.append([[0] * shape.num_experts for _ in shape.layers])
        for row in range(start, stop):
            for layer, ids_TK in enumerate(table.expert_ids_LTK):
                for expert in ids_TK[row] if table.covered_T[row] else ():
                    counts[-1][layer][expert] += 1
    return counts


def soft_selection(probs, replayed, live, ratio=0.0, mass=0.0, margin=math.inf):
    """Experts that one token takes under soft replay, slot by slot, and which replayed ones stay.

    Args:
        probs: The live router's distribution.
        replayed, live: Distinct experts.
    """
    weakest = min(probs[e] for e in live)
    best_left_out = max((probs[e] for e in range(len(probs)) if e not in live), default=0.0)
    is_trusted = sum(probs[e] for e in replayed) >= mass * sum(probs[e] for e in live)
    is_trusted &= weakest <= best_left_out * math.exp(margin)
    kept = [e in live or (is_trusted and probs[e] >= ratio * weakest) for e in replayed]
    stay = {e for e, stays in zip(replayed, kept, strict=True) if stays}
    free = sorted((e for e in live if e not in stay), key=lambda e: -probs[e])
    return [e if stays else free.pop(0) for e, stays in zip(replayed, kept, strict=True)], kept
