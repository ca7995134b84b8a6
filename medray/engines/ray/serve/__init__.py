"""Bundles over HTTP, on Ray Serve: the only door to FastAPI, Starlette and Prometheus."""
