"""What solvers of single layers share: statistics of their inputs, factors, refits, calls of their parent."""
