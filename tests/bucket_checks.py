"""What the trainer's ranks in `test_recipe_buckets.py` do to a server."""

import json
import os
import threading
import urllib.request
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch
from megatron_worlds import megatron
from sglang_servers import MODEL, random_prompt, request, wait_for_decoding

from recipes.minirl.publish.broadcasts import Broadcasts
from recipes.minirl.publish.server_group import ServerGroup
from recipes.minirl.publish.shared_tensors import SharedTensors
from recipes.model.buckets import Buckets
from recipes.model.model import build_model, transformer_config
from recipes.model.parallel import ParallelLayout
from recipes.model.weights import load_hf
from routing_replay.rollout import RolloutClient
from routing_replay.rollout.streaming import WeightStream

# Each stage has its own source; the layers are three.
LAYOUT = ParallelLayout(pipeline=2, first_stage_layers=1)
BUCKET_BYTES = 40_000  # dozens of buckets
TIMEOUT_S = 60
PROMPTS = [random_prompt(500 + n, 12 + n) for n in range(3)]


class Trainer:
    """A model, and the means to send it to servers, on one rank."""

    def __init__(self, rank, urls, folder):
        self.chunks = build_model(transformer_config(folder, LAYOUT), LAYOUT)
        self.load(folder)
        self.client = RolloutClient(urls, MODEL) if rank == 0 else None
        stream = WeightStream(self.client) if self.client else None
        self.broadcasts = Broadcasts(stream, urls, TIMEOUT_S)
        self.shared = SharedTensors(stream)
        self.sender = self.broadcasts

    def load(self, folder):
        load_hf(self.chunks, folder)

    def send(self, version, converted=lambda tensors: tensors):
        """The error, if there is one."""
        return self.sender.send(Buckets(self.chunks, BUCKET_BYTES), version, converted)


class WithoutGpu(ServerGroup):
    """A group for which a server on a CPU has no backend."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.backend = "nccl"


def publish(rank, log_paths, folders):
    """By event: the error of an update, and what the servers then do (on rank 0).

    `log_paths` has the servers' URLs as its keys.
    """
    results, urls = {}, list(log_paths)
    with megatron(LAYOUT):
        trainer = Trainer(rank, urls, folders[1])
        buckets = Buckets(trainer.chunks, BUCKET_BYTES).buckets
        num_buckets = len(buckets)
        results["largest bucket"] = max(bucket.size_bytes for bucket in buckets)

        def note(event, error):
            seen = [observe(url) for url in urls] if rank == 0 else None
            results[event] = error, seen

        with mock.patch("recipes.minirl.publish.broadcasts.ServerGroup", WithoutGpu):
            note("refused", trainer.send(4))
        note("second", trainer.send(5))
        group = trainer.sender._group
        trainer.load(folders[0])
        note("first", trainer.send(6))
        results["same groups"] = trainer.sender._group is group
        results["running"] = send_to_running(trainer, 7, urls[0], log_paths[urls[0]])
        trainer.load(folders[1])
        note("left", trainer.send(8, leaving_after(rank, num_buckets // 2, urls[0], trainer)))
        note("healed", trainer.send(9))
        trainer.sender.leave()
        trainer.sender = trainer.shared
        trainer.load(folders[0])
        note("shared", trainer.send(10))
        results["kept memory"] = [kept_memory()]
        trainer.load(folders[1])
        note("shared ended", trainer.send(11, ending_after(rank, num_buckets // 2, urls[0])))
        note("shared healed", trainer.send(12))
        trainer.sender = trainer.broadcasts
        trainer.load(folders[0])
        note("groups again", trainer.send(13))
        trainer.sender.leave()
    results["kept memory"].append(kept_memory())
    results["sharing strategy"] = torch.multiprocessing.get_sharing_strategy()
    return results


def send_to_running(trainer, version, url, log_path):
    """The error of an update in the middle of a server's responses, and these (on rank 0)."""
    if trainer.client is None:
        return trainer.send(version), None
    asked, completions = [request(prompt, num_new=200) for prompt in PROMPTS], []
    sampling = RolloutClient([url], MODEL)
    thread = threading.Thread(target=lambda: completions.extend(sampling.generate(asked)))
    thread.start()
    wait_for_decoding(log_path, len(asked))
    trainer.client.pause("retract")
    error = trainer.send(version)
    trainer.client.resume()
    thread.join()
    return error, completions


def leaving_after(rank, count, url, trainer):
    """A conversion that does nothing but make a server leave its group in mid-update."""
    tensors_seen = []

    def converted(tensors):
        tensors_seen.append(tensors)
        if rank == 0 and len(tensors_seen) == count // 2:
            name = trainer.sender._names[0]
            post(url, "/destroy_weights_update_group", {"group_name": name})
        return tensors

    return converted


def kept_memory():
    """Bytes of this process's files in shared memory."""
    files = Path("/dev/shm").glob(f"torch_{os.getpid()}_*")
    return sum(path.stat().st_size for path in files)


def ending_after(rank, count, url):
    """A conversion that does nothing but make a server end its update in the middle."""
    tensors_seen = []

    def converted(tensors):
        tensors_seen.append(tensors)
        if rank == 0 and len(tensors_seen) == count // 2:
            post(url, "/end_weight_update", {})
        return tensors

    return converted


def die(rank, urls, folder):
    """Rank 1 dies as the servers wait for its broadcast."""
    with megatron(LAYOUT):
        trainer = Trainer(rank, urls, folder)
        if rank == 1:
            ServerGroup.broadcast = lambda self, flat: os._exit(1)
        trainer.send(10)


def observe(url):
    """A server's version, the checksum of its weights, and its answers to some prompts."""
    checksum = post(url, "/weights_checker", {"action": "checksum"})["per_engine_checksum"]
    asked = [replace(request(prompt), sampling=GREEDY) for prompt in PROMPTS]
    client = RolloutClient([url], MODEL)
    version = client.weight_versions()[url]
    if not version.isdigit():
        return version, checksum, None
    # One after another: rounding depends on what is computed together.
    completions = [client.generate([one])[0] for one in asked]
    answers = [
        (
            tuple(c.output_ids),
            c.mu_logprobs.tobytes(),
            c.routes.expert_ids_TLK.tobytes(),
            set(c.routes.weight_version_T.tolist()) | {int(c.weight_version)},
        )
        for c in completions
    ]
    return version, checksum, answers


GREEDY = {"temperature": 0.0, "max_new_tokens": 8, "ignore_eos": True}


def post(url, route, body):
    """The server's answer; an error says why."""
    data, headers = json.dumps(body).encode(), {"Content-Type": "application/json"}
    with urllib.request.urlopen(urllib.request.Request(url + route, data, headers)) as response:
        return json.loads(response.read())
