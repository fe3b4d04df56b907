"""From a recipe and a cluster file to a job: with torchrun here, with SLURM or with Kubernetes.

Those are the engines. This package checks, renders, submits and remembers; it supervises nothing.
"""
