"""The model is elsewhere in the folder."""
