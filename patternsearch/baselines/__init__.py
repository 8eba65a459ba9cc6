"""Native baselines of torch's own layers: one kind a file, found by its presence."""
