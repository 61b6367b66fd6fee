"""What `flashcocos evaluate` scores: a model's pictures against exact answers or photographs."""
