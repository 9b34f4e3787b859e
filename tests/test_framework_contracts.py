"""What adapters rely on: sources that changed and jobs that contradict are named, one line each."""

import sys

import pytest

from routing_replay.adapters import contracts, seams
from routing_replay.adapters.seams import Framework, Seam, Switch
from routing_replay.cli import frameworks, main
from routing_replay.errors import ConfigError, PreflightError

SOURCE = """
from other.place import imported
try:
    import missing
except ImportError:
    missing = None
CONSTANT = 1
def function(first, second=None, *, third): ...
def function(first, second, *args, third=3): ...
class Worker:
    def method(self, first): ...
"""


def checkout(folder, source=SOURCE):
    package = folder / "framework"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "inner.py").write_text(source)
    return [str(folder)]


def entry(*seams, switches=()):
    return Framework(package="framework", tested="1.0", seams=seams, switches=switches)


def seam(name, *parameters, module="framework.inner"):
    return Seam(module=module, name=name, parameters=parameters)


def test_seams_that_are_there_make_no_line_and_nothing_is_imported(tmp_path):
    path = checkout(tmp_path)
    right = entry(
        seam("function", "first", "third"),
        seam("imported"),
        seam("missing"),
        seam("CONSTANT"),
        seam("Worker.method", "first"),
    )
    assert list(seams.compare(right, path)) == []
    assert seams.is_installed(right, path) and "framework" not in sys.modules


@pytest.mark.parametrize(
    ("wrong", "line"),
    [
        (seam("gone"), "framework.inner.gone does not exist"),
        (seam("a", module="framework.none"), "framework.none does not exist"),
        (
            seam("function", "fourth"),
            "framework.inner.function(first, second, *args, third=3) does not take (fourth)",
        ),
        (seam("Worker.other"), "framework.inner.Worker.other does not exist"),
        (seam("CONSTANT", "first"), "framework.inner.CONSTANT (no function) does not take (first)"),
    ],
)
def test_a_seam_that_changed_is_one_line_with_both_texts(tmp_path, wrong, line):
    assert list(seams.compare(entry(wrong), checkout(tmp_path))) == [line]


def test_an_adapter_refuses_another_version_of_its_framework(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", checkout(tmp_path))
    monkeypatch.setitem(contracts.FRAMEWORKS, "slime", entry(seam("gone")))
    with pytest.raises(PreflightError, match="framework.inner.gone does not exist") as refusal:
        contracts.require("slime")
    assert refusal.value.expected == "1.0" and "docs/adopt/slime.md" in str(refusal.value)


def test_every_framework_of_the_doctor_is_declared():
    # Adapters that are not written yet have no entry.
    assert set(contracts.FRAMEWORKS) <= set(frameworks.FRAMEWORKS)
    with pytest.raises(ConfigError, match="Did you mean 'slime'"):
        contracts.framework("slimee")


def test_a_script_is_read_with_flags_overrides_and_variables(tmp_path):
    script = tmp_path / "run.sh"
    script.write_text(
        "export MODE=R3 # it's a comment\n"
        "ARGS=(\n   --switch\n   --path a.b.c\n)\n"
        'python train.py ${ARGS[@]} --other=1 ++policy.replay.enabled=true \\\n  key="two words"\n'
    )
    assert frameworks.read_job(script) == {
        "MODE": "R3",
        "ARGS": "(",
        "--switch": "",
        "--path": "a.b.c",
        "--other": "1",
        "policy.replay.enabled": "true",
        "key": "two words",
    }


def test_a_configuration_is_read_by_dotted_keys(tmp_path):
    path = tmp_path / "job.yaml"
    path.write_text("policy:\n  router_replay: {enabled: true}\n  name: a\n")
    assert frameworks.read_job(path) == {
        "policy.router_replay.enabled": "True",
        "policy.name": "a",
    }


SWITCHES = (
    Switch(setting="--init", value="ours.init", cause="Nothing loads the adapter"),
    Switch(setting="replay.enabled", value="true", cause="No routes arrive"),
    Switch(setting="--theirs", is_needed=False, cause="Both would replay"),
    Switch(setting="mode", value="R3", is_needed=False, cause="Both would replay"),
)


@pytest.mark.parametrize(
    ("script", "problems"),
    [
        ("run --init ours.init replay.enabled=True mode=disabled", []),
        (
            "run --init other.init --theirs mode=R3",
            [
                "the job sets --init to 'other.init'. Nothing loads the adapter. "
                "Set --init ours.init",
                "the job does not set replay.enabled. No routes arrive. Add replay.enabled=true",
                "the job sets --theirs. Both would replay. Remove it",
                "the job sets mode=R3. Both would replay. Remove it",
            ],
        ),
    ],
)
def test_a_job_that_contradicts_is_told_what_to_change(tmp_path, monkeypatch, script, problems):
    monkeypatch.setattr(sys, "path", checkout(tmp_path))
    monkeypatch.setitem(contracts.FRAMEWORKS, "slime", entry(seam("imported"), switches=SWITCHES))
    job = tmp_path / "run.sh"
    job.write_text(script)
    findings = list(frameworks.check_framework("slime", str(job)))
    assert [str(f).partition(": ")[2] for f in findings if f.is_error] == problems
    assert [f.name for f in findings if f.level == "ok"] == ["slime"] + (
        ["slime-switches"] if not problems else []
    )


JOBS = {
    "verl": """
        python -m verl.trainer.main_ppo \\
            actor_rollout_ref.actor.megatron.router_replay.mode=disabled \\
            actor_rollout_ref.rollout.enable_rollout_routing_replay=True \\
            +ray_kwargs.ray_init.runtime_env.env_vars.ROUTING_REPLAY_MODE=R3
    """,
    "skyrl": """
        RAY_RUNTIME_ENV_HOOK=routing_replay.adapters.ray.runtime_env_hook ROUTING_REPLAY_MODE=R3 \\
            python -m skyrl.train.entrypoints.main_base \\
            generator.inference_engine.enable_return_routed_experts=true \\
            trainer.policy.megatron_config.moe_enable_routing_replay=true
    """,
    "nemo-rl": """
        RAY_RUNTIME_ENV_HOOK=routing_replay.adapters.ray.runtime_env_hook ROUTING_REPLAY_MODE=R3 \\
            uv run examples/run_grpo.py ++policy.router_replay.enabled=true
    """,
    "slime": """
        python train.py --use-rollout-routing-replay \\
            --custom-megatron-init-path routing_replay.adapters.slime.init
    """,
    "megatron-lm": """
        torchrun -m routing_replay.adapters.run pretrain_gpt.py --routing-replay-routes FILE
    """,
}
JOBS["miles"] = JOBS["slime"]
VERL_R2 = JOBS["verl"].replace("=R3", "=R2").replace("replay=True", "replay=False")
SLIME_R2 = JOBS["slime"].replace("--use-rollout-routing-replay", "--use-routing-replay")
OVERLAP = " --overlap-moe-expert-parallel-comm"
SKYRL_REFERENCE = "trainer.ref.megatron_config.moe_enable_routing_replay"


@pytest.mark.parametrize(
    ("name", "script", "problems"),
    [
        *((name, script, []) for name, script in JOBS.items()),
        ("verl", VERL_R2, []),
        ("slime", SLIME_R2, []),
        ("verl", JOBS["verl"].replace("disabled", "R3"), ["the job sets actor_rollout_ref"]),
        ("verl", JOBS["verl"].replace("replay=True", "replay=False"), ["the job sets actor_roll"]),
        ("verl", JOBS["verl"] + " VERL_USE_EXTERNAL_PLUGINS=none", ["the job sets VERL_USE"]),
        ("verl", VERL_R2 + " algorithm.rollout_correction.bypass_mode=True", ["the job sets algo"]),
        ("skyrl", JOBS["skyrl"] + f" {SKYRL_REFERENCE}=true", [f"the job sets {SKYRL_REFERENCE}"]),
        ("nemo-rl", JOBS["nemo-rl"].replace("MODE=R3", ""), ["the job does not set ROUTING_REPL"]),
        ("slime", SLIME_R2 + " --use-rollout-logprobs", ["the job sets --use-rollout-logprobs"]),
        ("slime", JOBS["slime"] + OVERLAP, [f"the job sets{OVERLAP}"]),
        ("megatron-lm", JOBS["megatron-lm"] + OVERLAP, [f"the job sets{OVERLAP}"]),
    ],
)
def test_the_command_of_a_page_is_right_and_what_contradicts_it_is_named(
    tmp_path, monkeypatch, name, script, problems
):
    for variable in ("ROUTING_REPLAY_MODE", "RAY_RUNTIME_ENV_HOOK"):
        monkeypatch.delenv(variable, raising=False)
    job = tmp_path / "run.sh"
    job.write_text(script)
    found = [
        finding.what
        for finding in frameworks.check_framework(name, str(job))
        if finding.is_error and finding.name == f"{name}-switch"
    ]
    assert len(found) == len(problems)
    assert all(what.startswith(problem) for what, problem in zip(found, problems, strict=True))


def test_a_variable_of_rays_runtime_environment_counts_as_a_variable(tmp_path):
    job = tmp_path / "run.sh"
    job.write_text("python -m x +ray_kwargs.ray_init.runtime_env.env_vars.ROUTING_REPLAY_MODE=R3\n")
    assert frameworks.read_job(job)["ROUTING_REPLAY_MODE"] == "R3"


def test_a_framework_that_is_not_installed_is_an_error_and_the_command_fails(monkeypatch, capsys):
    monkeypatch.setattr(sys, "path", [])
    assert main(["doctor", "--framework", "slime"]) == 1
    printed = capsys.readouterr().out
    assert "error   slime: the package slime is not on the path" in printed
    assert "it needs --custom-megatron-init-path routing_replay.adapters.slime.init" in printed


def test_the_megatron_of_this_environment_has_what_its_adapter_needs():
    entry = contracts.framework("megatron-lm")
    if not seams.is_installed(entry):
        pytest.skip("megatron-core is not installed")
    assert list(seams.compare(entry)) == []


def test_a_job_without_its_framework_is_refused(capsys):
    assert main(["doctor", "--job", "run.sh"]) == 1
    assert "--job is read for a framework; expected --framework NAME" in capsys.readouterr().err
