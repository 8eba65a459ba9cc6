"""One module per kind of mixing; each is found by its presence here."""
