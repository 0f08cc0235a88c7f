"""The libraries that benchmarks/contestant.py builds: a module for each, with a function build(task)."""
