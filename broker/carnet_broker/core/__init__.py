"""The rules of the broker: pure and synchronous. Bytes and values in, values out."""
