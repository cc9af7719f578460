"""Model-based quality: a classifier that is trained on labels, calibrated, and run over every document."""

from kwaicoder_jax.data.quality.asking import Judge
from kwaicoder_jax.data.quality.calibration import calibrated, measures
from kwaicoder_jax.data.quality.features import Features, features
from kwaicoder_jax.data.quality.labels import Labelled, fit, read
from kwaicoder_jax.data.quality.scorer import Scorer, train

__all__ = ["Features", "Judge", "Labelled", "Scorer", "calibrated", "features", "fit", "measures", "read", "train"]
