"""Names of today's place until the package is written."""

from orchestrator.on_ray import records

__all__ = ["records"]
