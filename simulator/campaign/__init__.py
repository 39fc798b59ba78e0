"""Many runs: where their results are kept, how they run in parallel, and the searches that decide what to run."""
