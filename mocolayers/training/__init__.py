"""Pretraining: the loop, its monitors, what is kept of a run, and several processes."""
