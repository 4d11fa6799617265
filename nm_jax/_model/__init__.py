"""What a model does with its parameters: tracing, Gram matrices, the plan."""
