"""How fast, and compared with whom: speed suites, the GPU run, the compile report. Not installed."""
