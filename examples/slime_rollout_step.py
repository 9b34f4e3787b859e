"""One rollout in slime's trainer, by two flags of slime. Without a GPU:

    ROUTING_REPLAY_SLIME=CHECKOUT .venv-frameworks/bin/python examples/slime_rollout_step.py

`make test-frameworks` builds that environment; slime is on no package index (docs/adopt/slime.md).
slime parses the flags, scores reference and old policy, and updates twice. The rollout, with its
routes, is random here.
"""

import tempfile
from pathlib import Path

import frameworks_on_cpu  # noqa: F401

# isort: split
import slime_step
import tiny_batch

FLAGS = (
    *("--use-rollout-routing-replay",),
    *("--custom-megatron-init-path", "routing_replay.adapters.slime.init"),
)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = tiny_batch.write_checkpoint_of_words(Path(folder))
        job = {"package": "slime", "checkpoint": checkpoint, "flags": FLAGS, "folder": folder}
        result = slime_step.run(0, job)
    lines = [text for text in result["printed"].splitlines() if "routing_replay: " in text]
    print(*lines, sep="\n")
    # Hooks at the routers, which know nothing of replay, compare with the rollout's routes.
    for name, counts in result["seen"].items():
        if name:
            print(f"{name}: {counts['rows'] - counts['wrong']} of {counts['rows']} rows replayed")


if __name__ == "__main__":
    main()
