"""The migrations of the shared store, run by Alembic at the start of a broker."""
