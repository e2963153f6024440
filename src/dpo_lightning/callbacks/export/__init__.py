"""Writing the trained model as a Hugging Face folder."""
