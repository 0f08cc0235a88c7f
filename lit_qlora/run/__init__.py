"""A run around its loop: plan, folder, checkpoints, trackers, reports."""
