"""The ledger on a file system."""
