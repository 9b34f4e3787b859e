"""What a batch costs the client."""

import asyncio
import gc
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rollout_servers import MODEL, FakeServer, asked

from routing_replay.rollout import (
    ClientOptions,
    RolloutClient,
)
from routing_replay.rollout.garbage import OBJECTS_BETWEEN, RARE_COLLECTIONS

pytest.importorskip("aiohttp")


def test_the_processor_time_of_a_batch_grows_with_its_requests_alone():
    """Every request waits at once; a pool that is searched for each would be quadratic."""
    code = "; ".join(
        [
            "import asyncio, time, test_rollout_load as t",
            "print(*(asyncio.run(t.seconds_of_waiting_requests(n)) for n in (100, 200, 800)))",
        ]
    )
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": path},
    )
    assert done.returncode == 0, done.stderr
    _, few, many = map(float, done.stdout.split())  # the first has what is done once
    # 4 times as many requests; with httpx's pool they cost 10 times as much.
    assert many < 7 * few, done.stdout


def test_garbage_is_collected_rarely_in_a_batch_and_as_before_after_it():
    before, seen = gc.get_threshold(), []

    def look(route, body, answer):
        seen.append(gc.get_threshold()[0])
        return 200, answer

    with FakeServer(look) as fake:
        client = RolloutClient([fake.url], MODEL)
        client.generate([asked()])
    assert max(seen) == OBJECTS_BETWEEN
    assert gc.get_threshold() == before


def test_overlapping_batches_restore_the_threshold_once_and_leave_an_own_choice():
    first, second, before = RARE_COLLECTIONS, RARE_COLLECTIONS, gc.get_threshold()
    with first:
        with second:
            pass
        assert gc.get_threshold()[0] == OBJECTS_BETWEEN
    assert gc.get_threshold() == before
    gc.set_threshold(0)  # a process that never collects
    try:
        with first:
            assert gc.get_threshold()[0] == 0
    finally:
        gc.set_threshold(*before)


async def seconds_of_waiting_requests(count):
    """Processor seconds of a batch whose requests are all in flight together."""
    arrived, everyone = [], asyncio.Event()

    async def answer(reader, writer):
        while line := await reader.readline():
            head = line + await reader.readuntil(b"\r\n\r\n")
            length = re.search(rb"content-length: (\d+)", head.lower())
            await reader.readexactly(int(length.group(1)) if length else 0)
            if b"/generate" in line:
                arrived.append(1)
                if len(arrived) == count:
                    everyone.set()
                await everyone.wait()
            content = json.dumps({"meta_info": EMPTY}).encode()
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(content))
            writer.write(content)

    server = await asyncio.start_server(answer, "127.0.0.1", 0, backlog=count)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    client = RolloutClient([url], options=ClientOptions(max_in_flight=count, health_every_s=3600))
    start = time.process_time()
    await client.agenerate([asked(capture="off") for _ in range(count)])
    seconds = time.process_time() - start
    server.close()
    return seconds


EMPTY = {"output_token_logprobs": [], "finish_reason": {"type": "length"}, "weight_version": "0"}
