"""What benchmarks/contestant.py builds: a module for each library, with a function build(task)."""
