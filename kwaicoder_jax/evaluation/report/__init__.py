"""The report: from a work folder to one self-contained page.

material = report.read(workdir, stages, models, title=..., command=...)
text = report.build(material)
"""

from kwaicoder_jax.evaluation.report.material import Material, Part, read
from kwaicoder_jax.evaluation.report.page import build

__all__ = ["Material", "Part", "build", "read"]
