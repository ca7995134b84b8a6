"""One module a question: each has ``run(quick: bool) -> Result``. Start them with ``python -m benchmarks NAME``."""
