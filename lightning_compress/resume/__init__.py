"""A calibration that goes on after a kill: the log of finished groups, the plan of the log, the lock of its folder."""
