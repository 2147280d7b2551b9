"""The claims in the order of the article."""

from __future__ import annotations

from dropkit.claims import inverted
from dropkit.claims.claim import Claim

CLAIMS: tuple[Claim, ...] = (inverted.CLAIM,)
