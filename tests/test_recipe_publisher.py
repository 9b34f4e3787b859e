"""recipes.minirl.publish.publisher: when servers stop for new weights, and what their caches do."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from megatron_worlds import run_world

from routing_replay.errors import ServerError

UPDATE, PAUSE, CONTINUE = "/update_weights_from_disk", "/pause_generation", "/continue_generation"
MODES = ("wait", "retract", "in_place")


def publications(rank, folder):
    """What a server is told by three publications of each mode, the last in broken buckets."""
    from rollout_servers import MODEL, QUICK, FakeServer

    from recipes.minirl.job.first_rank import FirstRank
    from recipes.minirl.publish.publisher import Publisher
    from recipes.minirl.settings.command_line import parse
    from routing_replay.rollout import RolloutClient

    class Noting(Publisher):
        """Has no model to write."""

        def _write_files(self):
            server.calls.append(("written", {}))
            path = self._folder / str(self._version)
            path.mkdir(parents=True)
            return path

        def _send(self, sender):
            server.calls.append(("sent", {}))
            return "a server has left the group"

    told = {}
    for mode in MODES:
        status = {}
        with FakeServer(
            lambda route, body, answer, s=status: (s.get(route, 200), answer)
        ) as server:
            client = RolloutClient([server.url], MODEL, QUICK)
            path, config = Path(folder) / mode, parse(["--ahead", "1", "--publish-pause", mode])
            policy, first_rank = SimpleNamespace(config=config), FirstRank(path)
            publisher = Noting(policy, path, path, first_rank, client, (), client.paused)
            for version in (0, 1):
                publisher.publish(version)
            publisher._sender = object()
            publisher.publish(2)
            status[UPDATE] = 400
            with pytest.raises(ServerError, match="refused"):
                publisher.publish(3)
            told[mode] = [(route, body.get("flush_cache")) for route, body in server.calls]
    return told


def test_servers_stop_while_weights_come_and_continue_even_if_those_do_not(tmp_path):
    (told,) = run_world(publications, 1, str(tmp_path))
    for mode in MODES:
        stop, go = ([], []) if mode == "wait" else ([(PAUSE, None)], [(CONTINUE, None)])
        # Requests that go on where they were hold a part of the cache.
        update = (UPDATE, mode != "in_place")
        written, sent = ("written", None), ("sent", None)
        # Nothing runs before the first weights, and a cache may be another run's.
        expected = [written, (UPDATE, True)]
        expected += [written, *stop, update, *go]
        # No token of broken weights is sampled before the files have come.
        expected += [*stop, sent, written, update, *go] * 2
        assert told[mode] == expected, mode
