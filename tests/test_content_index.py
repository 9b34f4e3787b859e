"""Rows by content: the longest prefix that is a sequence of the table, and what cannot be told."""

import numpy as np
import pytest

from routing_replay.adapters import content
from routing_replay.adapters.content import ContentIndex, prefix_hashes
from routing_replay.errors import TableError
from routing_replay.routes.routes import Routes
from routing_replay.routes.table import RouteTable

RNG = np.random.default_rng(5)


def index_of(*sequences, routes=None):
    """An index of sequences of fed tokens; two layers, four experts, top-2."""
    routes = routes or [random_ids(len(tokens)) for tokens in sequences]
    table = RouteTable.from_routes(
        [Routes(expert_ids_TLK=ids, layers=(0, 1), num_experts=4) for ids in routes]
    )
    return ContentIndex(table, np.concatenate(sequences))


def random_ids(num_tokens):
    scores = RNG.random((num_tokens, 2, 4))
    return np.ascontiguousarray(np.argsort(scores, -1)[..., :2].astype(np.uint8))


def test_a_sequence_and_its_padding_get_rows_and_minus_one():
    index = index_of([7, 8, 9], [5, 6])
    batch = np.array([[5, 6, 0, 0], [7, 8, 9, 0]])
    assert index.rows(batch).tolist() == [[3, 4, -1, -1], [0, 1, 2, -1]]


def test_the_longest_sequence_wins_over_its_own_prefix():
    index = index_of([7, 8], [7, 8, 9])
    assert index.rows(np.array([[7, 8, 9, 0], [7, 8, 1, 0]])).tolist() == [
        [2, 3, 4, -1],
        [0, 1, -1, -1],
    ]


def test_unknown_tokens_route_live():
    index = index_of([7, 8, 9])
    assert (index.rows(np.array([[7, 8, 1, 1], [1, 7, 8, 9]])) == -1).all()


def test_packed_segments_are_looked_up_one_by_one():
    index = index_of([7, 8, 9], [5, 6])
    packed = np.array([[5, 6, 0, 7, 8, 9, 5, 6]])
    assert index.rows(packed, [0, 3, 6, 8]).tolist() == [[3, 4, -1, 0, 1, 2, 3, 4]]


def test_equal_sequences_share_the_rows_on_which_their_routes_agree():
    first, second = random_ids(3), random_ids(3)
    second[0], second[2] = first[0, :, ::-1], first[2]  # the order of slots is no difference
    second[1] = (first[1] + 1) % 4
    index = index_of([7, 8, 9], [7, 8, 9], routes=[first, second])
    assert index.rows(np.array([[7, 8, 9]])).tolist() == [[0, -1, 2]]
    assert index.num_ambiguous == 1


def test_equal_hashes_of_other_tokens_are_no_hit(monkeypatch):
    monkeypatch.setattr(content, "BASE", np.uint64(1))  # the hash is now the sum of the tokens
    index = index_of([1, 4], [2, 3])
    assert index.rows(np.array([[2, 3], [1, 4], [4, 1]])).tolist() == [[2, 3], [0, 1], [-1, -1]]


def test_the_hash_is_the_polynomial():
    tokens = [3, 0, 2**31 - 1]
    base, total, expected = int(content.BASE), 0, []
    for i, token in enumerate(tokens):
        total = (total + (token + 1) * base ** (i + 1)) % 2**64
        expected.append(total)
    assert prefix_hashes(np.array(tokens)).tolist() == expected


def test_token_ids_of_another_length_are_refused():
    table = index_of([7, 8, 9]).table
    with pytest.raises(TableError, match="token ids do not match the rows"):
        ContentIndex(table, np.array([7, 8]))


@pytest.mark.parametrize("bounds", [[0, 5], [1, 3], [0, 3, 2]])
def test_cu_seqlens_that_do_not_fit_are_refused(bounds):
    with pytest.raises(TableError, match="cu_seqlens do not describe"):
        index_of([7, 8, 9]).rows(np.array([[7, 8, 9, 0]]), bounds)


def test_fed_tokens_ride_with_the_table_through_its_file(tmp_path):
    table = index_of([7, 8, 9], [5, 6]).table.with_tokens([[7, 8, 9, 1], [5, 6, 2]])
    opened = RouteTable.open(table.save(tmp_path / "t.safetensors"))
    assert opened.token_ids_T.tolist() == [7, 8, 9, 5, 6]
    assert ContentIndex(opened, opened.token_ids_T).rows(np.array([[5, 6]])).tolist() == [[3, 4]]


@pytest.mark.parametrize("tokens", [[[7, 8, 9, 1]], [[7, 8, 9], [5, 6, 2]]])
def test_tokens_of_other_sequences_are_refused(tokens):
    with pytest.raises(TableError, match="tokens do not belong to the sequences"):
        index_of([7, 8, 9], [5, 6]).table.with_tokens(tokens)
