"""The engine turns requests into steps and logits into text; it knows neither Ray nor sockets."""
