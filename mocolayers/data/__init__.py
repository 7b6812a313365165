"""The prepared format, label subsets and random views."""
