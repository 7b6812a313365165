"""The labs of the notebooks: sliders around pure functions, one file per lab. Each has a `compute` and a figure."""
