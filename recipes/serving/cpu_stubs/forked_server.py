"""Run `sglang.launch_server` with forked instead of spawned processes; arguments are SGLang's.

SGLang spawns its scheduler and its detokenizer because CUDA does not survive a fork. Each of them
then imports SGLang again, which is most of what a server's start costs on a CPU.
"""

import multiprocessing
import runpy

if __name__ == "__main__":
    multiprocessing.set_start_method("fork")
    # SGLang sets "spawn" just before it starts them.
    multiprocessing.set_start_method = lambda method, force=False: None
    runpy.run_module("sglang.launch_server", run_name="__main__", alter_sys=True)
