"""Carnet: short-lived, audience-scoped, certificate-bound tokens between services."""
