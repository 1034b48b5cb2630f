"""The engine's tests run with the imports of a stage's process."""

from azu.models.slim import import_for_stages

import_for_stages()
