"""The launcher, with the job run here by submitit, as Slurm would run it there."""


def test_a_door_runs_as_a_job(door):
    command = ("-m", "launch.slurm", "--local", "True", "--cpus-per-task", "1", "--")
    tiny = ("pretrain", "mae", "--config", "tiny.yaml", "--run.out", "run", "--run.length", "2st")
    result = door(*command, *tiny)
    assert result.returncode == 0, result.stderr
    assert "python -m ssl_vit.pretrain mae --config tiny.yaml" in result.stdout
    assert "random encoder" in result.stdout
    assert (door.folder / "run" / "encoder.safetensors").is_file()
    assert (door.folder / "slurm").stat().st_mode & 0o777 == 0o700
    failed = door(*command, *tiny, "--optim.lr", "7")
    assert failed.returncode == 1
    assert "--optim.lr is 7.0, but the run in run was started with 0.001" in failed.stderr


def test_what_the_launcher_refuses(door):
    for arguments, fragment in (
        (("--nodes", "2", "--local", "True", "--", "pretrain"), "--nodes is 2"),
        (("--nodes", "1"), "after -- comes a door (pretrain, evaluate)"),
        (("--", "pretran"), "after -- comes a door"),
        (("--nods", "1", "--", "pretrain"), "--nodes"),
    ):
        result = door("-m", "launch.slurm", *arguments)
        assert result.returncode == 2
        assert fragment in result.stderr
        assert len(result.stderr.splitlines()) == 1
