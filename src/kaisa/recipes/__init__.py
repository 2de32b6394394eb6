"""Reference applications: data, model, loop, report."""
