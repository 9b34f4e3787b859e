"""Rows that are not covered: counted by cause, and bounded."""

import numpy as np
import pytest

from routing_replay.errors import RoutesError
from routing_replay.routes.origin import Origin, is_covered, num_uncovered, require_covered
from routing_replay.routes.payload import decode_compact, encode
from routing_replay.routes.routes import Routes
from routing_replay.routes.table import RouteTable


def routes_of(*origins):
    """Rows of these origins; the ids of uncovered ones are zero, as an engine sends them."""
    origin_T = np.array(origins, np.uint8)
    covered_T = is_covered(origin_T)
    ids_TLK = np.where(covered_T, [[[1]], [[2]]], 0).astype(np.uint8).T.reshape(-1, 1, 2)
    return Routes(
        expert_ids_TLK=ids_TLK, layers=(0,), num_experts=4, covered_T=covered_T, origin_T=origin_T
    )


LOST = routes_of(Origin.PREFILL, Origin.EVICTED, Origin.EVICTED, Origin.SPECULATIVE)
WHOLE = routes_of(Origin.PREFILL, Origin.DECODE, Origin.INJECTED, Origin.NOT_FED)


def test_a_cause_travels_with_its_row_through_payload_and_table(tmp_path):
    received, _ = decode_compact(encode(LOST))
    assert received.origin_T.tolist() == LOST.origin_T.tolist()
    assert received.covered_T.tolist() == [True, False, False, False]
    table = RouteTable.from_routes([received, WHOLE])
    table = RouteTable.open(table.save(tmp_path / "routes.safetensors"))
    expected = {"evicted": 2, "speculative": 1, "injected": 1, "not_fed": 1}
    assert num_uncovered([table]) == expected
    assert num_uncovered(table.sequences()) == expected


def test_an_uncovered_row_that_names_a_forward_pass_has_no_known_cause():
    routes = routes_of(Origin.PREFILL, Origin.DECODE)
    routes.covered_T[1] = False
    assert num_uncovered([routes]) == {"absent": 1}
    assert decode_compact(encode(routes))[0].origin_T.tolist() == [Origin.PREFILL, Origin.ABSENT]


def test_rows_within_the_bound_are_fractions_by_cause():
    # 3 of 8 rows are lost, 2 are uncovered on purpose: these do not count.
    fractions = require_covered([LOST, WHOLE], max_uncovered=3 / 8)
    assert fractions == {
        "evicted": 2 / 8,
        "speculative": 1 / 8,
        "injected": 1 / 8,
        "not_fed": 1 / 8,
    }


def test_above_the_bound_the_error_names_the_causes():
    wording = r"at most 25.00% of 8 rows; got 37.50%: evicted 2, speculative 1 \[step 3\]"
    with pytest.raises(RoutesError, match=wording):
        require_covered([LOST, WHOLE], max_uncovered=0.25, where="step 3")
    assert require_covered([], 0.0) == {}


def test_uncovering_keeps_an_earlier_cause():
    mask = np.ones(4, np.bool_)
    routes = LOST.uncover(mask, Origin.STALE)
    assert routes.origin_T.tolist() == [Origin.STALE, *LOST.origin_T[1:].tolist()]
