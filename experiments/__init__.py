"""One script per table or figure, benchmarks and the quick start. Run them as `python -m experiments.NAME`."""
