"""How many replicas the load needs. The controller of Ray Serve imports this module, so it imports nothing."""

from __future__ import annotations

from typing import Any

POLICY = f"{__name__}:by_load"
"""Import path, for Ray Serve."""
JOBS = "jobs"
"""Name of what a replica tells beside its requests: jobs that it computes, or that wait in it."""


def by_load(context: Any) -> tuple[float, dict[str, Any]]:
    """Replicas that are needed by requests under way and by jobs, of which Ray knows nothing by itself.

    Bounds, and how long the load must last, are applied by Ray to what this gives.

    Args:
        context: Ray Serve's ``AutoscalingContext``.

    Returns:
        How many, a fraction; and nothing to be remembered.
    """
    if context.current_num_replicas == 0:  # the first are just starting
        return context.target_num_replicas, {}
    jobs = sum((context.aggregated_metrics or {}).get(JOBS, {}).values())
    return (context.total_num_requests + jobs) / context.config.get_target_ongoing_requests(), {}
