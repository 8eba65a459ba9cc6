"""One module per task; each is found by its presence here."""
