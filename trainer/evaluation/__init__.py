"""Models side by side on the same cases: images, volumes from one slice, videos from the first frame."""
