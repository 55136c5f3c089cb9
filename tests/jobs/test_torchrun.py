"""When a job may use several nodes, and what its processes get from the environment."""

import pytest

from longqlora.jobs.torchrun import nodes_problem, process_environment, run_on_nodes


def test_several_nodes_need_a_job_of_slurm(monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    message = r"num_nodes 2 needs SLURM, and this is no job of SLURM \(SLURM_JOB_ID is not set\): run Snakemake with --executor"
    with pytest.raises(ValueError, match=rf"^training\.{message}"):
        run_on_nodes([], num_nodes=2, num_processes=1, threads=1, environment={})
    assert nodes_problem(1) is None
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert nodes_problem(2) is None


def test_processes_of_one_node_use_the_loopback_interface_and_the_gpus_that_are_reserved(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth0")
    one = process_environment("cpu", 2)
    assert (one["GLOO_SOCKET_IFNAME"][:2], one["CUDA_VISIBLE_DEVICES"], one["OMP_NUM_THREADS"]) == ("lo", "1", "2")
    several = process_environment("cpu", 2, num_nodes=2)
    assert several["GLOO_SOCKET_IFNAME"] == "eth0"
    assert "CUDA_VISIBLE_DEVICES" not in several
