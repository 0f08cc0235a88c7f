"""Many runs that differ in a few settings: planned, trained on a base that is read once, and compared."""
