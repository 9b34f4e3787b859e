"""Peak memory and time of token log-probs, chunked against the plain softmax, as ratios.

    python tools/bench/logprobs.py                         # V = 151,936, float32, CPU or GPU as
    found python tools/bench/logprobs.py --tokens 4096 --dtype bfloat16

Every measurement runs in a process of its own, so that one's memory is not another's. Memory is
what is allocated beyond the logits, forward and backward, on the CPU by the high-water mark of the
resident set.
"""

import argparse
import json
import resource
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch

from routing_replay.objectives import logprobs

# Qwen3's vocabulary.
VOCABULARY = 151_936
WAYS = ("plain", "chunked", "chunked in place")


def plain(logits_TV, targets_T, with_entropy):
    """What frameworks do without a fused kernel: a log-softmax of the logits' size, in float32."""
    logs_TV = logits_TV.float().log_softmax(dim=1)
    logp_T = logs_TV.gather(1, targets_T[:, None]).squeeze(1)
    return logp_T, -(logs_TV.exp() * logs_TV).sum(dim=1) if with_entropy else None


def score(way, logits_TV, targets_T, with_entropy):
    if way == "plain":
        return plain(logits_TV, targets_T, with_entropy)
    in_place = way == "chunked in place"
    scores = logprobs.token_logprobs(logits_TV, targets_T, reuse_logits=in_place)
    return scores.logp_T, scores.entropy_T if with_entropy else None


class PeakMemory:
    """Bytes above the start: the allocator's on a GPU, the resident set's high-water mark on the
    CPU.
    """

    def __init__(self, device):
        self.device = device

    def __enter__(self):
        if self.device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.start = torch.cuda.memory_allocated()
            return self
        self.start = self.peak = _resident_bytes()
        self.stop = threading.Event()
        self.watch = threading.Thread(target=self._sample, daemon=True)
        self.watch.start()
        return self

    def __exit__(self, *_):
        if self.device == "cuda":
            torch.cuda.synchronize()
            self.size_bytes = torch.cuda.max_memory_allocated() - self.start
            return
        self.stop.set()
        self.watch.join()
        self.size_bytes = self.peak - self.start

    def _sample(self):
        while not self.stop.wait(0.001):
            self.peak = max(self.peak, _resident_bytes())


def _resident_bytes():
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def measure(way, options) -> dict:
    """One step: best time of the repetitions, and the largest memory of any of them."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(options.threads)
    targets_T = torch.randint(0, options.vocabulary, (options.tokens,), device=device)
    dtype = getattr(torch, options.dtype)
    # Processor time is not disturbed by other processes; on a GPU only the wall clock sees the
    # kernels.
    clock = time.perf_counter if device == "cuda" else time.process_time
    times, sizes = [], []
    for _ in range(options.repeat):
        leaf_TV = torch.randn(options.tokens, options.vocabulary, device=device).to(dtype)
        leaf_TV.requires_grad_()
        # A view, as the logits are in a model: the output of an operation that needs no copy.
        logits_TV = leaf_TV.view_as(leaf_TV)
        with PeakMemory(device) as memory:
            started = clock()
            logp_T, entropy_T = score(way, logits_TV, targets_T, options.entropy)
            loss = logp_T.sum() if entropy_T is None else logp_T.sum() + 0.01 * entropy_T.sum()
            (gradient,) = torch.autograd.grad(loss, logits_TV)
            if device == "cuda":
                torch.cuda.synchronize()
            times.append(clock() - started)
        sizes.append(memory.size_bytes)
        checksum = gradient[0, :64].double().abs().sum().item()
        del logits_TV, leaf_TV, gradient, loss, logp_T, entropy_T
    return {"time_s": min(times), "size_bytes": max(sizes), "checksum": checksum, "device": device}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--vocabulary", type=int, default=VOCABULARY)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--entropy", action="store_true", help="with the entropy's gradient")
    parser.add_argument("--chunk-mib", type=int, help="size of a chunk, to see what it changes")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.chunk_mib:
        logprobs.CHUNK_BYTES.update(cpu=options.chunk_mib * 2**20, cuda=options.chunk_mib * 2**20)
    if options.way:
        print(json.dumps(measure(options.way, options)))
        return
    results = {}
    for way in WAYS:
        command = [sys.executable, __file__, *sys.argv[1:], "--way", way]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        results[way] = json.loads(done.stdout)
    size_bytes = options.tokens * options.vocabulary * getattr(torch, options.dtype).itemsize
    print(
        f"{options.tokens} tokens, V = {options.vocabulary}, {options.dtype}, entropy gradient ",
        end="",
    )
    print(f"{options.entropy}, {results['plain']['device']}; logits {size_bytes / 2**20:.0f} MiB")
    print(f"{'':18}{'time s':>8}{'ratio':>8}{'peak MiB':>10}{'ratio':>8}{'/ logits':>10}")
    base = results["plain"]
    for way, found in results.items():
        print(
            f"{way:18}{found['time_s']:8.3f}{found['time_s'] / base['time_s']:8.2f}"
            f"{found['size_bytes'] / 2**20:10.0f}{found['size_bytes'] / base['size_bytes']:8.2f}"
            f"{found['size_bytes'] / size_bytes:10.2f}"
        )


if __name__ == "__main__":
    main()
