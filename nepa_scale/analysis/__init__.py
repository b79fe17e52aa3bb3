"""What a trained model looks at and what it predicts, as pictures and as numbers."""
