"""What a trained model is asked: predictions, an evaluation, an explanation."""
