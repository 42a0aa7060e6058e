"""One file a mode, each with `run(config, *, workdir, allow_changes) -> exit code`: here the rooms meet, and nowhere else."""
