"""The way from a spec to the loss kernels' launchers, and nothing else. There are no such kernels yet: the table
of capabilities refuses this backend for every loss."""
