"""The labs of the notebooks: sliders around pure functions, one file per lab. Each has a `compute` and a figure."""
# ruff: noqa: F401

from mocolayers.labs.distributions import cdf_gap, distribution_lab
from mocolayers.labs.labels import label_draws, label_lab
from mocolayers.labs.losses import loss_lab, stages_of
from mocolayers.labs.queue import key_history, queue_lab
from mocolayers.labs.similarity import similarity_lab
from mocolayers.labs.training import TrainingPanel
from mocolayers.labs.views import learn_finding, outlined, view_lab
