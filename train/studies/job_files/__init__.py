"""Job files for a scheduler, written from a run's configuration: Slurm, Kubernetes, SkyPilot."""
