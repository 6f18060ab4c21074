"""A model's name to local files: names, downloads with resume, Hugging Face, Kaggle, the demo model."""
