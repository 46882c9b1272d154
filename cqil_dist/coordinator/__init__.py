"""The coordinator: the Ray actor around the engine, and the generation service it offers."""
