"""Measurements; `README.md` says what each script prints."""
