"""What runs a model: Keras, or the runtime of an exported file."""
