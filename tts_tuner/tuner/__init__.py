"The tuner: search, rungs, child processes, registry."
