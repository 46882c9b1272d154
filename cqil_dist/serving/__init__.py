"""The service that `cqil serve` shows the network: gRPC, the OpenAI API, health and metrics."""
