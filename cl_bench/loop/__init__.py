"""The one loop over the experiences, what watches it, and how it resumes."""
