"""Without the overlap scheduler and without mixed batches the same holds: the same tests again."""

import pytest
from sglang_servers import running
from test_sglang_capture import (
    test_a_long_prompt_is_true_over_all_its_chunks,
    test_a_prefix_hit_returns_the_rows_that_computed_the_prefix,
    test_requests_of_all_levels_share_a_batch_and_each_gets_its_own_rows,
)
from test_sglang_interruptions import (
    test_a_retraction_for_lack_of_slots_leaves_every_row_its_first_pass,
    test_an_aborted_request_returns_the_rows_of_the_tokens_it_returns,
    test_rows_survive_retraction_under_the_weights_that_computed_them,
)

__all__ = [
    "test_a_long_prompt_is_true_over_all_its_chunks",
    "test_a_prefix_hit_returns_the_rows_that_computed_the_prefix",
    "test_a_retraction_for_lack_of_slots_leaves_every_row_its_first_pass",
    "test_an_aborted_request_returns_the_rows_of_the_tokens_it_returns",
    "test_requests_of_all_levels_share_a_batch_and_each_gets_its_own_rows",
    "test_rows_survive_retraction_under_the_weights_that_computed_them",
]


@pytest.fixture(scope="module")
def sglang_server():
    with running("logits", "--disable-overlap-schedule") as server:
        yield server
