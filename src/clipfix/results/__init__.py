"""What a run leaves: scores before and after, where they come from, pictures, and runs side by side."""
