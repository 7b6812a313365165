"""Judging encoders: features, probes, fine-tuning, scores, similarity and output distances."""
