"""The experiments that test a search's claims on the user's own model and data (arXiv:2407.13906)."""
