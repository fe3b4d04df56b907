"""Volumes: what is found in single slices becomes objects in three dimensions."""

from trainer.volumes.instances import Instances

__all__ = ["Instances"]
