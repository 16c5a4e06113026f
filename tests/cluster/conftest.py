"""Fixtures of the tests that start Ray."""

from tests.cluster.ray_nodes import ray_nodes

__all__ = ["ray_nodes"]
