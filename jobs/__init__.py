"""What people run: `densebridge <job> RECIPE --flags`, each also `python -m jobs.<job>`."""
