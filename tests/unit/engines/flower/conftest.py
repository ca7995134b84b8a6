"""Flower reads whether to report home when it is first imported: the engine says no, and must come before it."""

import medray.engines.flower  # noqa: F401
