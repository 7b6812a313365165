"""What the notebooks need around the science: figures, checked exercises, batch runs."""
