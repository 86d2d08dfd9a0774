"""LDAM, the label-distribution-aware margin loss."""

from __future__ import annotations

DEFAULT_SCALE = 30.0
"""Scale s of a cosine head and of the margins (Cao et al., NeurIPS 2019: s = 30)."""
