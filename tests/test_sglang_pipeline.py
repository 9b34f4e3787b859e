"""Two pipeline stages, each of which sees its own layers: the same tests again."""

import pytest
from sglang_servers import running
from test_sglang_capture import (
    test_a_long_prompt_is_true_over_all_its_chunks,
    test_a_prefix_hit_returns_the_rows_that_computed_the_prefix,
    test_samples_of_one_prompt_each_keep_their_own_rows,
)
from test_sglang_interruptions import (
    test_an_aborted_request_returns_the_rows_of_the_tokens_it_returns,
)

from routing_replay.sglang import versions

__all__ = [
    "test_a_long_prompt_is_true_over_all_its_chunks",
    "test_a_prefix_hit_returns_the_rows_that_computed_the_prefix",
    "test_an_aborted_request_returns_the_rows_of_the_tokens_it_returns",
    "test_samples_of_one_prompt_each_keep_their_own_rows",
]
pytestmark = [
    pytest.mark.skipif(
        versions.installed() < versions.COVERS_FEATURES, reason="older SGLangs are refused with it"
    ),
    pytest.mark.slow,  # a server of two processes
]


@pytest.fixture(scope="module")
def sglang_server():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SGLANG_CPU_OMP_THREADS_BIND", "0|1")
        with running("gates", "--pp-size", "2") as server:
            yield server
