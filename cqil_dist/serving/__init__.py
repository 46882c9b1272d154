"""The network service of `cqil serve`: gRPC, the OpenAI API, health checks and metrics."""
