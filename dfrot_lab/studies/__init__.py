"""Studies: the measurement behind each notebook, a function from a `Lab` to a plain result."""
