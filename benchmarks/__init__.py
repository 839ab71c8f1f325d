"""What the layer costs, and whether it helps: commands, such as `python -m benchmarks.layer` in the checkout."""
