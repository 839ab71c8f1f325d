"""Commands that measure what the layer costs and whether it helps, such as `python -m benchmarks.layer`."""
