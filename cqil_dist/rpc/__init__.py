"""The wire form of the public API; `v1` is generated from protos/ by `make proto`."""
