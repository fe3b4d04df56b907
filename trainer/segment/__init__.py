"""`trainer predict --volume` and `trainer evaluate --volume`: one slice is shown, the volume is segmented."""
