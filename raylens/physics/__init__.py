"""How light bends: pure and deterministic, in arcsec, km/s and solar masses."""
