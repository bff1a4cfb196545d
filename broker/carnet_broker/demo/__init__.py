"""The demo: everything real, in one place, on one machine. Nothing in here is meant for production."""
