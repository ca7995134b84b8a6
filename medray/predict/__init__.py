"""From a prepared array to logits and probabilities: the runtimes (one a file), sliding windows, calibration."""
