"""The Carnet broker: authenticates workloads by mutual TLS, decides by policy, issues tokens, rotates keys in Vault."""
