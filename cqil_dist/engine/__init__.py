"""From requests to steps, and from logits to text; knows neither Ray nor sockets."""
