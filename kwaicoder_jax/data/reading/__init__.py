"""Reading: from a config of places to documents.

place = from_config("packages", {"kind": "archives", "path": "sdists"})
for unit in place.units():
    for found in read(unit, Options(languages=("python",))):
        ...  # a Document, or Skipped(identifier, reason)
"""

from kwaicoder_jax.data.reading.archives import Skipped
from kwaicoder_jax.data.reading.licence_texts import PERMISSIVE
from kwaicoder_jax.data.reading.places import KINDS, Place, Unit, from_config
from kwaicoder_jax.data.reading.reader import Options, read
from kwaicoder_jax.data.reading.streams import Limits

__all__ = ["KINDS", "PERMISSIVE", "Limits", "Options", "Place", "Skipped", "Unit", "from_config", "read"]
