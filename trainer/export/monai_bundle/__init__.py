"""What a MONAI bundle holds of code: it is copied there, and needs nothing of sam-trainer."""
