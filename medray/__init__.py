"""medray: AutoML and federated learning on medical images, on Ray."""

__version__ = "0.1.0"
