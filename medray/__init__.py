"""medray: AutoML and federated learning on medical images, on Ray."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from medray.workflows.automl import AutoML
    from medray.workflows.client import Client

__all__ = ["AutoML", "Client", "__version__"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """What Python users are offered, imported when it is asked for: ``medray --help`` shall not wait for it."""
    if name == "AutoML":
        from medray.workflows.automl import AutoML

        return AutoML
    if name == "Client":
        from medray.workflows.client import Client

        return Client
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
