"""Job files are what the configuration says, and what bash, torchrun, Hydra and the schedulers' formats take.

Golden files beside this one are written by the first line of their comment with `--out`. Schedulers themselves were
asked by hand (docs/launch.md).
"""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch.distributed.run import parse_args

from launch.cluster import SCHEDULERS, main
from train.config import CONFIGS, compose, convert
from train.job import JobConfig
from train.studies.job_files.grace import grace_of
from train.studies.job_files.job import IN_IMAGE, Job, job_of
from train.studies.preflight.arguments import parse

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
CLUSTERS = sorted(path.stem for path in (CONFIGS / "cluster").glob("*.yaml"))
MOUNTS = "job.mounts=[runs:/v3fp8/runs,stores:/v3fp8/stores]"
IMAGE = ["job.image=registry.local/v3fp8:1", MOUNTS]
EXCLUDE = "job.exclude=[gpu017,gpu101]"
SITE = ["job.partition=h800", "job.account=pretraining", "job.time_limit=2-00:00:00", EXCLUDE]
ALERT = "observe.alert_command=\"page --team 'v3'\""
# File -> scheduler and overrides.
GOLDEN: dict[str, tuple[str, list[str]]] = {
    "h800_2048.sbatch": (
        "slurm",
        ["+cluster=h800_2048", "run.name=first", ALERT, *SITE, "job.container=pyxis", *IMAGE],
    ),
    "h100_8.sbatch": ("slurm", ["+cluster=h100_8"]),
    "h800_2048.trainjob.yaml": ("kubernetes", ["+cluster=h800_2048", "job.rdma=rdma/hca:8", EXCLUDE, *IMAGE]),
    "h100_256.sky.yaml": ("sky", ["+cluster=h100_256", EXCLUDE]),
}
OTHERS = [("slurm", [f"+cluster={cluster}"]) for cluster in CLUSTERS if cluster != "h100_8"]


@cache
def job(*overrides: str) -> Job:
    return job_of(overrides)


def text(scheduler: str, overrides: Sequence[str]) -> str:
    return SCHEDULERS[scheduler](job(*overrides))


def without_model(written: str) -> str:
    """Without the line of the planner, which moves with its tables."""
    return "".join(line for line in written.splitlines(keepends=True) if not line.startswith("# A stop takes "))


@pytest.mark.parametrize("name", GOLDEN)
def test_a_job_file_is_the_golden_one(name: str) -> None:
    scheduler, overrides = GOLDEN[name]
    written = text(scheduler, overrides)
    assert without_model(written) == without_model((HERE / name).read_text())
    assert written == SCHEDULERS[scheduler](job(*overrides))
    assert written.splitlines()[2 if scheduler == "slurm" else 1].endswith(
        f"python -m launch.cluster {scheduler} {shlex.join(overrides)}"
    )


def scripts(scheduler: str, written: str) -> list[str]:
    """What bash reads: the file itself and what each node runs."""
    if scheduler == "slurm":
        return [written, *re.findall(r"<<'NODE'\n(.*?)\nNODE\n", written, flags=re.DOTALL)]
    document = yaml.safe_load(written)
    return [document["run"] if scheduler == "sky" else document["spec"]["trainer"]["command"][2]]


def commands(scheduler: str, written: str) -> tuple[list[str], list[str]]:
    """The words of a node's preflight and training, its variables set."""
    for name, value in {"NODES": "a,b", "HEAD": "a", "PET_MASTER_ADDR": "a"}.items():
        written = written.replace(f"${name}", value)
    written = re.sub(r"\$\(\(\w+ == 0\)\)", "1", re.sub(r"\$\w+(NODEID|NODE_RANK)", "0", written))
    lines = "\n".join(scripts(scheduler, written)).replace("\\\n", " ").splitlines()
    preflight, training = (
        next(shlex.split(line) for line in lines if word in line) for word in ("/preflight", "/pretrain")
    )
    return [each for each in preflight if each != "exec"], [each for each in training if each != "exec"]


@pytest.mark.parametrize(("scheduler", "overrides"), [*GOLDEN.values(), *OTHERS])
def test_bash_torchrun_and_hydra_read_what_a_file_runs(scheduler: str, overrides: list[str]) -> None:
    written, config = text(scheduler, overrides), job(*overrides).config
    for script in scripts(scheduler, written):
        subprocess.run(["bash", "-n"], input=script, text=True, check=True, capture_output=True)
    preflight, training = commands(scheduler, written)
    bin_ = ".venv/bin/" if config.job.image is None else ""
    assert preflight[:2] == [f"{bin_}python", "launch/preflight.py"]
    assert training[0] == f"{bin_}torchrun"
    # As torchrun and Hydra read them: the same run, on as many ranks as its layout has.
    options = parse_args(training[1:])
    assert int(options.nnodes) * int(options.nproc_per_node) == config.layout.world
    assert (options.rdzv_backend, options.max_restarts, options.shutdown_timeout) == ("c10d", 3, config.job.grace_s)
    assert (options.rdzv_endpoint, options.rdzv_conf) == ("a:29400", "is_host=1")
    assert options.training_script == "launch/pretrain.py"
    own = compose(options.training_script_args)
    assert (own.layout, own.model, own.observe) == (config.layout, config.model, config.observe)
    assert not [word for word in options.training_script_args if word.startswith("job.")]
    looked_at = parse(preflight[2:], "")
    assert looked_at.nnodes * looked_at.nproc_per_node == config.layout.world
    assert (looked_at.all_to_all_ranks, looked_at.device) == (config.layout.ep, "cuda")
    assert looked_at.expect.gemm_tflops == config.job.expect.gemm_tflops
    assert looked_at.endpoint == "a:29401"
    for name, value in config.network.environment.items():
        assert re.search(rf"{name}\b.*\n?.*{re.escape(value)}", written), f"{name} does not reach the nodes"


# Fields of a TrainJob, as far as ours has them: kubeflow/trainer v2.3.0, CRD trainjobs, read 2026-11-30.
TRAINER = {"image", "command", "env", "numNodes", "numProcPerNode", "resourcesPerNode"}
POD_PATCH = {"terminationGracePeriodSeconds", "affinity", "volumes", "containers"}
CONTAINER_PATCH = {"name", "volumeMounts", "securityContext"}
# What the plugin for torch sets itself and refuses to be given.
RESERVED = {"PET_NNODES", "PET_NPROC_PER_NODE", "PET_NODE_RANK", "PET_MASTER_ADDR", "PET_MASTER_PORT"}


def test_a_train_job_has_the_fields_of_the_published_schema() -> None:
    found = yaml.safe_load(text(*GOLDEN["h800_2048.trainjob.yaml"]))
    assert (found["apiVersion"], found["kind"]) == ("trainer.kubeflow.org/v1alpha1", "TrainJob")
    spec = found["spec"]
    assert set(spec) == {"runtimeRef", "trainer", "runtimePatches"}
    assert set(spec["trainer"]) == TRAINER
    assert (spec["trainer"]["numNodes"], spec["trainer"]["numProcPerNode"]) == (256, 8)
    assert spec["trainer"]["resourcesPerNode"] == {"limits": {"nvidia.com/gpu": 8, "rdma/hca": 8}}
    environment = {each["name"]: each["value"] for each in spec["trainer"]["env"]}
    assert not RESERVED & set(environment)
    assert all(isinstance(value, str) for value in environment.values())
    (patch,) = spec["runtimePatches"]
    assert set(patch) == {"manager", "trainingRuntimeSpec"}
    (node,) = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    pod = node["template"]["spec"]["template"]["spec"]
    assert (node["name"], set(pod)) == ("node", POD_PATCH)
    (container,) = pod["containers"]
    assert (container["name"], set(container)) == ("node", CONTAINER_PATCH)
    assert pod["terminationGracePeriodSeconds"] == 600
    (term,) = pod["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]
    assert term["matchExpressions"][0]["values"] == ["gpu017", "gpu101"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}


def test_a_name_of_kubernetes_is_a_label_of_dns() -> None:
    named = "run.name=V3_first.try"
    assert yaml.safe_load(text("kubernetes", ["+cluster=h100_1", named, *IMAGE]))["metadata"]["name"] == "v3-first-try"
    with pytest.raises(ValueError, match="use 50 or fewer"):
        text("kubernetes", ["+cluster=h100_1", f"run.name={'a' * 51}", *IMAGE])


REFUSED = {
    "no image": ("kubernetes", [], "job.image is not set: give what launch/container/Dockerfile builds, as job.image="),
    "no cards": ("kubernetes", IMAGE, "job.rdma is not set: give the resource of the InfiniBand cards"),
    "no device": ("sky", ["job.gpu=null"], "job.gpu is not set: give SkyPilot's name of the device"),
    "a container that loses the run": (
        "slurm",
        ["job.container=pyxis", "job.image=a", "job.mounts=[s:/v3fp8/stores]"],
        "run.directory=runs is /v3fp8/runs in the container, which no job.mounts holds",
    ),
    "half a node": (
        "slurm",
        ["model.n_group=1", "model.topk_group=1", "layout.ranks_per_node=3", "layout.dispatch=direct"],
        "2048 ranks do not fill nodes of layout.ranks_per_node=3",
    ),
    "a plan": ("slurm", ["dry_run=true"], "dry_run=true plans a run and trains nothing: leave it out of a job"),
    "a stop of a minute": (
        "slurm",
        ["job.grace_s=60"],
        "job.grace_s=60 is too short for a stop, which takes 2 steps of ",
    ),
    "a typo": ("slurm", ["job.partitoin=a"], "job.partitoin is not a configuration key: did you mean job.partition?"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_missing_or_contradicts_is_one_sentence(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    scheduler, overrides, sentence = REFUSED[case]
    assert main([scheduler, "+cluster=h800_2048", *overrides]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("cluster: ")
    assert sentence in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("fact", "sentence"),
    [
        ({"container": "apptainer"}, "job.container=apptainer needs job.image"),
        ({"container": "docker"}, "job.container=docker is not one of none, pyxis, apptainer"),
        ({"mounts": ["runs"]}, "job.mounts holds 'runs': write SOURCE:/path"),
        ({"exclude": ["gpu 1"]}, "job.exclude holds 'gpu 1': write NODE"),
        ({"port": 80}, "job.port=80 is out of range: use 1024 to 65534"),
        # YAML 1.1 reads an unquoted 1:00:00 as 3600.
        ({"time_limit": 3600}, "job.time_limit=3600 must be text, not int"),
        ({"rdma": "hca"}, "job.rdma=hca must be NAME:COUNT, such as rdma/hca:1"),
        ({"storage_gb_per_s": 0}, "job.storage_gb_per_s=0.0 must be above 0"),
        ({"expect": {"disk_gb_per_s": -1}}, "job.expect.disk_gb_per_s=-1.0 is negative"),
    ],
)
def test_a_fact_that_cannot_be_is_refused(fact: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=re.escape(sentence)):
        convert(JobConfig, fact, "job")


def test_the_grace_is_two_steps_and_two_saves() -> None:
    """V3: 2 x 34 s, and 2 x 682.6 B parameters x 10 bytes at 100 GB/s; signal, torchrun and pod have the same."""
    overrides = ["+cluster=h800_2048", "job.storage_gb_per_s=100"]
    config = compose(overrides)
    grace = grace_of(config, config.model)
    assert grace is not None
    # 671.0 B, of which biases of routers are no parameters, and 11.6 B in MTP layers.
    assert grace.checkpoint_bytes == pytest.approx(10 * 682.6e9, rel=1e-3)
    assert grace.save_s == pytest.approx(68.26, rel=1e-3)
    assert grace.least_s == 2 * grace.step_s + 2 * grace.save_s
    with pytest.raises(
        ValueError, match=r"job.grace_s=100 .* 2 saves of 6,826.\d GB in 68 s: use job.grace_s=\d+ or more"
    ):
        job_of([*overrides, "job.grace_s=100"])
    written = text("slurm", ["+cluster=h100_1", "job.grace_s=700"])
    assert "#SBATCH --signal=TERM@700\n" in written
    assert "--shutdown-timeout 700 " in written
    assert "terminationGracePeriodSeconds: 700\n" in text("sky", ["+cluster=h100_1", "job.grace_s=700"])


def test_where_no_speed_is_known_the_grace_is_the_one_that_is_given() -> None:
    overrides = ["experiment=tiny", "run.device=cpu", "layout.dp=2", "run.micro_batch_sequences=1"]
    assert job(*overrides).grace is None
    assert "gpus-per-node" not in text("slurm", overrides)


def test_the_files_go_where_they_are_sent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["slurm", "+cluster=h100_8", "--out", str(tmp_path / "job")]) == 0
    assert main(["slurm", "+cluster=h100_8"]) == 0
    assert (tmp_path / "job").read_text() == capsys.readouterr().out
    assert main(["slurm", "+cluster=h100_8", "--out", str(tmp_path / "no/job")]) == 2


def test_the_folder_in_the_image_is_that_of_the_dockerfile() -> None:
    assert f"WORKDIR {IN_IMAGE}\n" in (ROOT / "launch/container/Dockerfile").read_text()


def test_a_script_outside_the_container_reads_the_log_where_it_really_is() -> None:
    overrides = [
        "job.container=apptainer",
        "job.image=a.sif",
        "job.mounts=[/fs/all:/v3fp8/runs,/fs/text:/v3fp8/stores]",
    ]
    assert "\nlog=/fs/all/h800_2048/metrics.jsonl\n" in text("slurm", ["+cluster=h800_2048", *overrides])
