"""The door to Flower: what a server and sites say to each other, over a network, on Ray, or within one process."""

import os

# Flower looks once, when it is imported. Nothing of a hospital's machine is told to anyone.
os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
