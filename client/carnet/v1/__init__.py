"""The wire, package carnet.v1: generated from protos/ by `make proto`, all but this file."""
